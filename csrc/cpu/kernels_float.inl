// SPDX-License-Identifier: Apache-2.0
// Element-wise kernels over the vectors of vec_*.hpp: exp, RMSNorm, activation quantization, SwiGLU, RoPE, cache
// writes. Included inside an anonymous namespace.

inline f32x16 zeros() { return bcast(0.0f); }

/// kMaxSums chains of multiply-adds whose operands the compiler cannot know.
inline std::int64_t float_peak(std::int64_t iterations) {
    volatile float factor = 0.999f, sink;
    const f32x16 x = bcast(factor);
    f32x16 sum[kMaxSums];
    for (int i = 0; i < kMaxSums; ++i) sum[i] = bcast(factor + static_cast<float>(i));
    for (std::int64_t k = 0; k < iterations; ++k)
#pragma GCC unroll 16
        for (int i = 0; i < kMaxSums; ++i) sum[i] = fma(sum[i], x, x);
    for (int i = 0; i < kMaxSums; ++i) sink = reduce_add(sum[i]);
    static_cast<void>(sink);
    return iterations * kMaxSums * 16;
}

/// To the nearest integer, ties to even, for |x| < 2^22; NaN stays.
inline f32x16 round_even(f32x16 x) {
    const f32x16 magic = bcast(12582912.0f);  // 1.5 * 2^23: the sum has no fraction bits left
    return sub(add(x, magic), magic);
}

/// exp(x) within 2 ulp: 2^n * p(r) with |r| <= ln(2) / 2, p of degree 7. 0 below -87.33; above 88.37 the value there.
inline f32x16 exp_f32(f32x16 x) {
    const f32x16 lowest = bcast(-87.33f);
    // The second operand is x, so that NaN stays.
    const f32x16 y = min(bcast(88.37f), max(lowest, x));
    const f32x16 n = round_even(mul(y, bcast(1.44269504f)));
    f32x16 r = fma(n, bcast(-0.693145752f), y);
    r = fma(n, bcast(-1.42860677e-6f), r);
    f32x16 p = bcast(1.98412698e-4f);
    p = fma(p, r, bcast(1.38888889e-3f));
    p = fma(p, r, bcast(8.33333333e-3f));
    p = fma(p, r, bcast(4.16666667e-2f));
    p = fma(p, r, bcast(1.66666667e-1f));
    p = fma(p, r, bcast(0.5f));
    p = fma(p, r, bcast(1.0f));
    p = fma(p, r, bcast(1.0f));
    return select_less(x, lowest, zeros(), mul(p, pow2(n)));
}

inline void exp_row(const float* x, float* out, std::int64_t n) {
    for (std::int64_t i = 0; i < n; i += 16) store(out + i, exp_f32(load(x + i)));
}

inline void swiglu(const float* gate, const float* up, float* out, std::int64_t n) {
    for (std::int64_t i = 0; i < n; i += 16) {
        const f32x16 z = load(gate + i);
        const f32x16 silu = div(z, add(bcast(1.0f), exp_f32(sub(zeros(), z))));
        store(out + i, mul(silu, load(up + i)));
    }
}

/// The first n floats of p, then zeros, without reading past them. n in 1 .. 16.
inline f32x16 load_first(const float* p, std::int64_t n) {
    if (n >= 16) return load(p);
    float copy[16] = {};
    for (std::int64_t i = 0; i < n; ++i) copy[i] = p[i];
    return load(copy);
}

inline float rms_factor(const float* x, std::int64_t cols, float eps) {
    f32x16 sum = zeros();
    for (std::int64_t i = 0; i < cols; i += 16) {
        const f32x16 v = load_first(x + i, cols - i);
        sum = fma(v, v, sum);
    }
    return 1.0f / __builtin_sqrtf(reduce_add(sum) / static_cast<float>(cols) + eps);
}

inline void quantize_span(const QuantizeSpan& s) {
    float y[kSpan];
    const int padded = (s.cols + 63) / 64 * 64;
    f32x16 largest = zeros(), poison = zeros();
    for (int i = 0; i < padded; i += 16) {
        f32x16 v = i < s.cols ? load_first(s.x + i, s.cols - i) : zeros();
        if (s.gamma && i < s.cols) v = mul(mul(v, bcast(s.factor)), load_first(s.gamma + i, s.cols - i));
        store(y + i, v);
        largest = max(largest, abs(v));
        poison = fma(v, zeros(), poison);  // 0, or NaN once a value is NaN or infinite: the scale must say so
    }
    const float top = reduce_max(largest);
    const bool usable = top > 0.0f;
    *s.scale = (usable ? top / 127.0f : 0.0f) + reduce_add(poison);
    const f32x16 inverse = bcast(usable ? 127.0f / top : 0.0f);
    for (int b = 0; b < padded / 32; ++b) {
        std::int8_t* values = s.values + static_cast<std::int64_t>(b) * s.tokens * 32;
        for (int i = 0; i < 32; i += 16) {
            // The value is the first operand: NaN becomes the bound.
            const f32x16 v = max(min(mul(load(y + 32 * b + i), inverse), bcast(127.0f)), bcast(-127.0f));
            store_int8(values + i, round_even(v));
        }
        const std::int32_t sums = block_sum(values);
        s.sums32[static_cast<std::int64_t>(b) * s.tokens] = sums;
        std::int32_t* sums64 = s.sums64 + static_cast<std::int64_t>(b / 2) * s.tokens;
        *sums64 = b % 2 == 0 ? sums : add_sums(*sums64, sums);
        s.whole64[static_cast<std::int64_t>(b / 2) * s.tokens] = static_cast<float>(whole_sum(*sums64));
    }
}

inline void rope(float* x, const float* cos, const float* sin, int half) {
    for (int j = 0; j < half; j += 16) {
        const int n = half - j;
        const f32x16 c = load_first(cos + j, n), s = load_first(sin + j, n);
        const f32x16 a = load_first(x + j, n), b = load_first(x + half + j, n);
        const f32x16 low = fma(a, c, mul(sub(zeros(), b), s));
        const f32x16 high = fma(b, c, mul(a, s));
        if (n >= 16) {
            store(x + j, low);
            store(x + half + j, high);
        } else {
            float copy[32];
            store(copy, low);
            store(copy + 16, high);
            for (int i = 0; i < n; ++i) {
                x[j + i] = copy[i];
                x[half + j + i] = copy[16 + i];
            }
        }
    }
}

/// int8 of one row (zero-padded to padded_dim) and its fp16 scale.
inline void quantize_kv(const float* x, const KvShape& shape, std::int8_t* out, std::uint16_t* scale) {
    f32x16 largest = zeros(), poison = zeros();
    for (int i = 0; i < shape.head_dim; i += 16) {
        const f32x16 v = load_first(x + i, shape.head_dim - i);
        largest = max(largest, abs(v));
        poison = fma(v, zeros(), poison);
    }
    std::uint16_t halves[16];
    store_half(halves, bcast(reduce_max(largest) / 127.0f));
    float rounded[16];
    store(rounded, load_half(halves));
    const f32x16 inverse = bcast(rounded[0] > 0.0f ? 1.0f / rounded[0] : 0.0f);
    store_half(halves, bcast(rounded[0] + reduce_add(poison)));
    *scale = halves[0];
    for (int i = 0; i < shape.padded_dim; i += 16) {
        const f32x16 v = i < shape.head_dim ? load_first(x + i, shape.head_dim - i) : zeros();
        store_int8(out + i, round_even(max(min(mul(v, inverse), bcast(127.0f)), bcast(-127.0f))));
    }
}

template <typename Element>
inline void scatter_key(Element* keys, const Element* row, int padded_dim, int position) {
    Element* block = keys + static_cast<std::int64_t>(position / 16) * padded_dim * 16 + position % 16;
    for (int j = 0; j < padded_dim; j += 64 / (16 * static_cast<int>(sizeof(Element)))) prefetch(block + j * 16);
    for (int j = 0; j < padded_dim; ++j) block[j * 16] = row[j];
}

inline void kv_store(const KvShape& shape, std::uint8_t* slab, int position, const float* k, const float* v) {
    constexpr int kMaxDim = 1024;
    const int d = shape.padded_dim;
    if (shape.int8) {
        std::int8_t row[kMaxDim];
        std::uint16_t* k_scales = reinterpret_cast<std::uint16_t*>(slab + shape.k_scale_offset);
        std::uint16_t* v_scales = reinterpret_cast<std::uint16_t*>(slab + shape.v_scale_offset);
        quantize_kv(k, shape, row, k_scales + position);
        scatter_key(reinterpret_cast<std::int8_t*>(slab), row, d, position);
        std::int8_t* values = reinterpret_cast<std::int8_t*>(slab + shape.v_offset);
        quantize_kv(v, shape, values + static_cast<std::int64_t>(position) * d, v_scales + position);
        return;
    }
    std::uint16_t row[kMaxDim];
    std::uint16_t* values =
        reinterpret_cast<std::uint16_t*>(slab + shape.v_offset) + static_cast<std::int64_t>(position) * d;
    for (int i = 0; i < d; i += 16) {
        const int n = shape.head_dim - i;
        store_half(row + i, load_first(k + i, n));
        store_half(values + i, load_first(v + i, n));
    }
    scatter_key(reinterpret_cast<std::uint16_t*>(slab), row, d, position);
}
