// SPDX-License-Identifier: Apache-2.0
// Attention over one chunk of keys. Included inside an anonymous namespace.
//
// The bits: a score is a sequential sum over the dimensions; the maximum and the sum of p go over 16 lanes and then a
// fixed tree; p v is a sequential sum over the positions. A query never touches a key beyond its own limit (such a
// page entry may hold anything, NaN included), and so its result does not know which queries shared its tile.
//
// The reading: all keys of the chunk, page by page, then all values. A page is 4 to 16 KB of consecutive bytes, and the
// next one lies somewhere else, which no hardware prefetcher guesses: beside the arithmetic of a page the lines of the
// next are asked for. With several queries the first tile of them does that, the others find the page in the first
// cache.

struct HalfElement {
    static constexpr int kBytes = 2;
    static f32x16 read(const std::uint8_t* p) { return load_half(p); }
};
struct Int8Element {
    static constexpr int kBytes = 1;
    static f32x16 read(const std::uint8_t* p) { return load_int8(reinterpret_cast<const std::int8_t*>(p)); }
};

/// Lines that are read after the present ones.
struct Ahead {
    const std::uint8_t* next;
    const std::uint8_t* end;
    /// Beside row `i` of kBytes bytes: as many lines as that, every few rows where it is less than one.
    template <int kBytes>
    inline __attribute__((always_inline)) void ask(int i) {
        constexpr int kEvery = kBytes < 64 ? 64 / kBytes : 1, kLines = kBytes < 64 ? 1 : kBytes / 64;
        if (i % kEvery != 0 || next >= end) return;
#pragma GCC unroll 16
        for (int line = 0; line < kLines; ++line) prefetch(next + line * 64);
        next += kLines * 64;
    }
};

constexpr int kSoftmaxAsk = 256;  // bytes asked for beside 16 scores

/// Scores of R queries against B blocks of 16 positions. Each vector of keys is read and converted once.
template <typename Element, int R, int B>
inline void score_blocks(const AttentionChunk& c, const std::uint8_t* k, const float* q, float* scores, Ahead& ahead) {
    const int d = c.shape.padded_dim;
    f32x16 sum[R][B];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) sum[r][b] = zeros();
    for (int j = 0; j < c.shape.head_dim; ++j) {
        ahead.ask<B * 16 * Element::kBytes>(j);
        f32x16 key[B];
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b)
            key[b] = Element::read(k + static_cast<std::int64_t>(b * d + j) * 16 * Element::kBytes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const f32x16 x = bcast(q[static_cast<std::int64_t>(r) * d + j]);
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b) sum[r][b] = fma(key[b], x, sum[r][b]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) store(scores + r * kChunkKeys + b * 16, sum[r][b]);
}

/// acc += p v over `count` positions for R queries and D vectors of dimensions.
template <typename Element, int R, int D>
inline void accumulate_dims(const AttentionChunk& c, const std::uint8_t* v, const float* p, int count, float* acc,
                            Ahead& ahead) {
    const int d = c.shape.padded_dim;
    f32x16 sum[R][D];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < D; ++i) sum[r][i] = load(acc + static_cast<std::int64_t>(r) * d + i * 16);
    for (int t = 0; t < count; ++t) {
        ahead.ask<D * 16 * Element::kBytes>(t);
        f32x16 value[D];
#pragma GCC unroll 8
        for (int i = 0; i < D; ++i)
            value[i] = Element::read(v + (static_cast<std::int64_t>(t) * d + i * 16) * Element::kBytes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const f32x16 x = bcast(p[r * kChunkKeys + t]);
#pragma GCC unroll 8
            for (int i = 0; i < D; ++i) sum[r][i] = fma(x, value[i], sum[r][i]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < D; ++i) store(acc + static_cast<std::int64_t>(r) * d + i * 16, sum[r][i]);
}

template <typename Element, int R, int D>
inline void accumulate(const AttentionChunk& c, const std::uint8_t* v, const float* p, int count, float* acc, int dim,
                       Ahead& ahead) {
    for (; dim + D * 16 <= c.shape.padded_dim; dim += D * 16)
        accumulate_dims<Element, R, D>(c, v + dim * Element::kBytes, p, count, acc + dim, ahead);
    if constexpr (D > 1) accumulate<Element, R, D / 2>(c, v, p, count, acc, dim, ahead);
}

constexpr int round_to_power(int n) { return n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1; }

inline int page_part(int keys, int page) {
    const int left = keys - page * kPageKeys;
    return left < 0 ? 0 : left < kPageKeys ? left : kPageKeys;
}

/// Scores of R queries from query r on against one page, as far as any of them sees it.
template <typename Element, int R>
inline void score_page(const AttentionChunk& c, int page, int r, Ahead& ahead) {
    constexpr int B = round_to_power(kMaxSums / R) > 4 ? 4 : round_to_power(kMaxSums / R);
    const int d = c.shape.padded_dim;
    int most = 0;
    for (int i = r; i < r + R; ++i) most = c.keys[i] > most ? c.keys[i] : most;
    const int blocks = (page_part(most, page) + 15) / 16;
    const float* q = c.q + static_cast<std::int64_t>(r) * d;
    float* scores = c.scores + static_cast<std::int64_t>(r) * kChunkKeys + page * kPageKeys;
    const std::uint8_t* k = c.slabs[page];
    const std::int64_t stride = static_cast<std::int64_t>(d) * 16 * Element::kBytes;
    int b = 0;
    for (; b + B <= blocks; b += B) score_blocks<Element, R, B>(c, k + b * stride, q, scores + b * 16, ahead);
    if constexpr (B > 1)
        for (; b < blocks; ++b) score_blocks<Element, R, 1>(c, k + b * stride, q, scores + b * 16, ahead);
}

inline void softmax_query(const AttentionChunk& c, int r, Ahead& ahead) {
    float* scores = c.scores + static_cast<std::int64_t>(r) * kChunkKeys;
    const int keys = c.keys[r], blocks = (keys + 15) / 16;
    const f32x16 minus_infinity = bcast(-__builtin_inff());
    f32x16 top = minus_infinity;
    for (int b = 0; b < blocks; ++b) {
        ahead.ask<kSoftmaxAsk>(b);
        f32x16 s = load(scores + b * 16);
        if (c.shape.int8) s = mul(s, load_half(c.slabs[b / 4] + c.shape.k_scale_offset + b % 4 * 32));
        const int n = keys - b * 16;
        if (n < 16) s = first_lanes(s, n, minus_infinity);
        store(scores + b * 16, s);
        top = max(top, s);
    }
    const float largest = reduce_max(top);
    f32x16 sum = zeros();
    for (int b = 0; b < blocks; ++b) {
        const int n = keys - b * 16;
        f32x16 p = exp_f32(sub(load(scores + b * 16), bcast(largest)));
        if (n < 16) p = first_lanes(p, n, zeros());
        sum = add(sum, p);
        if (c.shape.int8) p = mul(p, load_half(c.slabs[b / 4] + c.shape.v_scale_offset + b % 4 * 32));
        store(scores + b * 16, p);
    }
    c.max[r] = largest;
    c.sum[r] = reduce_add(sum);
}

/// p v of R queries from query r on over one page: together as far as all of them see, then each alone.
template <typename Element, int R>
inline void value_page(const AttentionChunk& c, int page, int r, Ahead& ahead) {
    const int d = c.shape.padded_dim;
    int shared = kChunkKeys;
    for (int i = r; i < r + R; ++i) shared = c.keys[i] < shared ? c.keys[i] : shared;
    shared = page_part(shared, page);
    float* acc = c.acc + static_cast<std::int64_t>(r) * d;
    const float* p = c.scores + static_cast<std::int64_t>(r) * kChunkKeys + page * kPageKeys;
    const std::uint8_t* v = c.slabs[page] + c.shape.v_offset;
    accumulate<Element, R, round_to_power(kMaxSums / R)>(c, v, p, shared, acc, 0, ahead);
    if constexpr (R > 1) {
        const std::uint8_t* rest = v + static_cast<std::int64_t>(shared) * d * Element::kBytes;
        for (int i = 0; i < R; ++i) {
            const int count = page_part(c.keys[r + i], page) - shared;
            if (count <= 0) continue;
            accumulate<Element, 1, round_to_power(kMaxSums)>(c, rest, p + i * kChunkKeys + shared, count,
                                                             acc + static_cast<std::int64_t>(i) * d, 0, ahead);
        }
    }
}

/// body<R>(r) for all queries, as many together as registers hold.
template <typename Body>
inline void for_tiles(int queries, Body&& body) {
    int r = 0;
    for (; r + kQueryTile <= queries; r += kQueryTile) body.template operator()<kQueryTile>(r);
    if constexpr (kQueryTile > 4)
        for (; r + 4 <= queries; r += 4) body.template operator()<4>(r);
    for (; r + 2 <= queries; r += 2) body.template operator()<2>(r);
    for (; r < queries; ++r) body.template operator()<1>(r);
}

template <typename Element>
inline void attend(const AttentionChunk& c) {
    const int d = c.shape.padded_dim;
    const std::int64_t n = static_cast<std::int64_t>(c.queries) * d;
    for (std::int64_t i = 0; i < n; i += 16) store(c.acc + i, zeros());
    int most = 0;
    for (int i = 0; i < c.queries; ++i) most = c.keys[i] > most ? c.keys[i] : most;
    const int pages = (most + kPageKeys - 1) / kPageKeys;
    const std::int64_t row = static_cast<std::int64_t>(d) * Element::kBytes;
    const auto keys_of = [&](int page) {
        return Ahead{c.slabs[page], c.slabs[page] + (page_part(most, page) + 15) / 16 * 16 * row};
    };
    const auto values_of = [&](int page) {
        const std::uint8_t* v = c.slabs[page] + c.shape.v_offset;
        return Ahead{v, v + page_part(most, page) * row};
    };
    if (Element::kBytes == 1)
        for (int page = 0; page < pages; ++page)  // the scales: 128 bytes for keys, 128 for values
            for (int i = 0; i < 4 * kPageKeys; i += 64) prefetch(c.slabs[page] + c.shape.k_scale_offset + i);
    // The last of the first values are left to the softmax, or memory would idle there.
    Ahead values = values_of(0), late = values;
    const std::int64_t lines = (values.end - values.next) / 64;
    values.end -= lines / 4 * 64;
    late.next = values.end;
    for (int page = 0; page < pages; ++page) {
        Ahead ahead = page + 1 < pages ? keys_of(page + 1) : values;
        for_tiles(c.queries, [&]<int R>(int r) { score_page<Element, R>(c, page, r, ahead); });
    }
    for (int i = 0; i < c.queries; ++i) softmax_query(c, i, late);
    for (int page = 0; page < pages; ++page) {
        Ahead ahead = page + 1 < pages ? values_of(page + 1) : Ahead{c.next, c.next + c.next_bytes};
        for_tiles(c.queries, [&]<int R>(int r) { value_page<Element, R>(c, page, r, ahead); });
    }
}

inline void attention_chunk(const AttentionChunk& c) {
    if (c.shape.int8)
        attend<Int8Element>(c);
    else
        attend<HalfElement>(c);
}

inline void attention_merge(float* max_so_far, float* sum, float* acc, float next_max, float next_sum,
                            const float* next_acc, int padded_dim) {
    const float top = *max_so_far > next_max ? *max_so_far : next_max;
    const f32x16 old_weight = exp_f32(bcast(*max_so_far - top));
    const f32x16 new_weight = exp_f32(bcast(next_max - top));
    float lanes[16];
    store(lanes, fma(bcast(*sum), old_weight, mul(bcast(next_sum), new_weight)));
    *sum = lanes[0];
    *max_so_far = top;
    for (int i = 0; i < padded_dim; i += 16)
        store(acc + i, fma(load(acc + i), old_weight, mul(load(next_acc + i), new_weight)));
}

inline void attention_finish(const float* acc, float sum, int head_dim, float* out) {
    const f32x16 factor = bcast(1.0f / sum);
    int i = 0;
    for (; i + 16 <= head_dim; i += 16) store(out + i, mul(load(acc + i), factor));
    float rest[16];
    if (i < head_dim) store(rest, mul(load(acc + i), factor));
    for (int j = i; j < head_dim; ++j) out[j] = rest[j - i];
}
