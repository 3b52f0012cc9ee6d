// SPDX-License-Identifier: Apache-2.0
// Attention over one chunk of keys. Included inside an anonymous namespace.
//
// The bits: a score is a sequential sum over the dimensions; the maximum and the sum of p go over 16 lanes and then a
// fixed tree; p v is a sequential sum over the positions. A query never touches a key beyond its own limit (such a
// page entry may hold anything, NaN included), and so its result does not know which queries shared its tile.

struct HalfElement {
    static constexpr int kBytes = 2;
    static f32x16 read(const std::uint8_t* p) { return load_half(p); }
};
struct Int8Element {
    static constexpr int kBytes = 1;
    static f32x16 read(const std::uint8_t* p) { return load_int8(reinterpret_cast<const std::int8_t*>(p)); }
};

/// Scores of R queries against B blocks of 16 positions. Each vector of keys is read and converted once.
template <typename Element, int R, int B>
inline void score_blocks(const AttentionChunk& c, const std::uint8_t* k, const float* q, float* scores) {
    const int d = c.shape.padded_dim;
    f32x16 sum[R][B];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) sum[r][b] = zeros();
    for (int j = 0; j < c.shape.head_dim; ++j) {
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
inline void accumulate_dims(const AttentionChunk& c, const std::uint8_t* v, const float* p, int count, float* acc) {
    const int d = c.shape.padded_dim;
    f32x16 sum[R][D];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < D; ++i) sum[r][i] = load(acc + static_cast<std::int64_t>(r) * d + i * 16);
    for (int t = 0; t < count; ++t) {
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
inline void accumulate(const AttentionChunk& c, const std::uint8_t* v, const float* p, int count, float* acc, int dim) {
    for (; dim + D * 16 <= c.shape.padded_dim; dim += D * 16)
        accumulate_dims<Element, R, D>(c, v + dim * Element::kBytes, p, count, acc + dim);
    if constexpr (D > 1) accumulate<Element, R, D / 2>(c, v, p, count, acc, dim);
}

constexpr int round_to_power(int n) { return n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1; }

/// Scores of R queries from query r0 on, softmax numerators in place, maxima and sums.
template <typename Element, int R>
inline void score_queries(const AttentionChunk& c, int r0, int blocks) {
    constexpr int B = round_to_power(kMaxSums / R) > 4 ? 4 : round_to_power(kMaxSums / R);
    const int d = c.shape.padded_dim;
    const float* q = c.q + static_cast<std::int64_t>(r0) * d;
    float* scores = c.scores + static_cast<std::int64_t>(r0) * kChunkKeys;
    for (int b = 0; b < blocks;) {
        const std::uint8_t* k = c.slabs[b / 4] + static_cast<std::int64_t>(b % 4) * d * 16 * Element::kBytes;
        if (b % 4 + B <= 4 && b + B <= blocks) {
            score_blocks<Element, R, B>(c, k, q, scores + b * 16);
            b += B;
        } else {
            score_blocks<Element, R, 1>(c, k, q, scores + b * 16);
            b += 1;
        }
    }
}

inline void softmax_query(const AttentionChunk& c, int r) {
    float* scores = c.scores + static_cast<std::int64_t>(r) * kChunkKeys;
    const int keys = c.keys[r], blocks = (keys + 15) / 16;
    const f32x16 minus_infinity = bcast(-__builtin_inff());
    f32x16 top = minus_infinity;
    for (int b = 0; b < blocks; ++b) {
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

/// p v of R queries from query r0 on: together as far as all of them see, then each alone.
template <typename Element, int R>
inline void value_queries(const AttentionChunk& c, int r0, int shared) {
    constexpr int D = round_to_power(kMaxSums / R);
    const int d = c.shape.padded_dim;
    float* acc = c.acc + static_cast<std::int64_t>(r0) * d;
    const float* p = c.scores + static_cast<std::int64_t>(r0) * kChunkKeys;
    for (int page = 0; page * kPageKeys < shared; ++page) {
        const int count = shared - page * kPageKeys;
        accumulate<Element, R, D>(c, c.slabs[page] + c.shape.v_offset, p + page * kPageKeys,
                                  count < kPageKeys ? count : kPageKeys, acc, 0);
    }
    if constexpr (R > 1) {
        for (int r = 0; r < R; ++r) {
            for (int t = shared; t < c.keys[r0 + r];) {
                const int page = t / kPageKeys;
                const int stop = (page + 1) * kPageKeys < c.keys[r0 + r] ? (page + 1) * kPageKeys : c.keys[r0 + r];
                const std::uint8_t* v =
                    c.slabs[page] + c.shape.v_offset + static_cast<std::int64_t>(t % kPageKeys) * d * Element::kBytes;
                accumulate<Element, 1, round_to_power(kMaxSums)>(c, v, p + r * kChunkKeys + t, stop - t,
                                                                 acc + static_cast<std::int64_t>(r) * d, 0);
                t = stop;
            }
        }
    }
}

template <typename Element, int R>
inline void attend_queries(const AttentionChunk& c, int& r) {
    for (; r + R <= c.queries; r += R) {
        int most = 0, shared = kChunkKeys;
        for (int i = r; i < r + R; ++i) {
            most = c.keys[i] > most ? c.keys[i] : most;
            shared = c.keys[i] < shared ? c.keys[i] : shared;
        }
        score_queries<Element, R>(c, r, (most + 15) / 16);
        for (int i = r; i < r + R; ++i) softmax_query(c, i);
        value_queries<Element, R>(c, r, shared);
    }
}

template <typename Element>
inline void attend(const AttentionChunk& c) {
    const std::int64_t n = static_cast<std::int64_t>(c.queries) * c.shape.padded_dim;
    for (std::int64_t i = 0; i < n; i += 16) store(c.acc + i, zeros());
    int r = 0;
    attend_queries<Element, kQueryTile>(c, r);
    if constexpr (kQueryTile > 4) attend_queries<Element, 4>(c, r);
    attend_queries<Element, 2>(c, r);
    attend_queries<Element, 1>(c, r);
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
