// SPDX-License-Identifier: Apache-2.0
// Vectors of 16 in plain C++: the reference that the other instruction sets equal bit for bit.
// Included inside an anonymous namespace. The other vec_*.hpp provide the same names.

struct f32x16 {
    float v[16];
};
struct i32x16 {
    std::int32_t v[16];
};

constexpr int kQueryTile = 4;  // queries that attention holds in registers
constexpr int kMaxSums = 8;    // vectors of sums it may hold
constexpr int kPanels = 1;     // panels whose sums a matmul holds in registers

template <typename F>
inline f32x16 map(F f) {
    f32x16 r;
    for (int i = 0; i < 16; ++i) r.v[i] = f(i);
    return r;
}

inline f32x16 load(const float* p) {
    return map([&](int i) { return p[i]; });
}
inline void store(float* p, const f32x16& a) {
    for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
inline f32x16 bcast(float x) {
    return map([&](int) { return x; });
}
inline f32x16 add(const f32x16& a, const f32x16& b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
}
inline f32x16 sub(const f32x16& a, const f32x16& b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
}
inline f32x16 mul(const f32x16& a, const f32x16& b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
}
inline f32x16 div(const f32x16& a, const f32x16& b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
}
inline f32x16 fma(const f32x16& a, const f32x16& b, const f32x16& c) {
    return map([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
// As x86 has them: the second operand when either is NaN.
inline f32x16 max(const f32x16& a, const f32x16& b) {
    return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline f32x16 min(const f32x16& a, const f32x16& b) {
    return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline f32x16 abs(const f32x16& a) {
    return map([&](int i) { return __builtin_fabsf(a.v[i]); });
}
/// a < b ? x : y
inline f32x16 select_less(const f32x16& a, const f32x16& b, const f32x16& x, const f32x16& y) {
    return map([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}
/// Lanes 0 .. n - 1 of a, then fill. n in 0 .. 16.
inline f32x16 first_lanes(const f32x16& a, int n, const f32x16& fill) {
    return map([&](int i) { return i < n ? a.v[i] : fill.v[i]; });
}
inline float reduce_add(const f32x16& a) {
    float r[8];
    for (int i = 0; i < 8; ++i) r[i] = a.v[i] + a.v[i + 8];
    for (int n = 4; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) r[i] = r[i] + r[i + n];
    return r[0];
}
inline float reduce_max(const f32x16& a) {
    float r[8];
    for (int i = 0; i < 8; ++i) r[i] = a.v[i] > a.v[i + 8] ? a.v[i] : a.v[i + 8];
    for (int n = 4; n > 0; n /= 2)
        for (int i = 0; i < n; ++i) r[i] = r[i] > r[i + n] ? r[i] : r[i + n];
    return r[0];
}

inline f32x16 to_f32(const i32x16& a) {
    return map([&](int i) { return static_cast<float>(a.v[i]); });
}
/// 2^n for integral n in -126 .. 127; anything for NaN.
inline f32x16 pow2(const f32x16& n) {
    return map([&](int i) {
        const int e = n.v[i] >= -126.0f && n.v[i] <= 127.0f ? static_cast<int>(n.v[i]) : 0;
        return __builtin_bit_cast(float, static_cast<std::uint32_t>(e + 127) << 23);
    });
}
inline f32x16 load_half(const void* p) {
    return map([&](int i) {
        std::uint16_t h;
        __builtin_memcpy(&h, static_cast<const char*>(p) + 2 * i, 2);
        return half_to_float(h);
    });
}
inline void store_half(void* p, const f32x16& a) {
    for (int i = 0; i < 16; ++i) {
        const std::uint16_t h = float_to_half(a.v[i]);
        __builtin_memcpy(static_cast<char*>(p) + 2 * i, &h, 2);
    }
}
inline f32x16 load_int8(const std::int8_t* p) {
    return map([&](int i) { return static_cast<float>(p[i]); });
}
/// Integral values in -128 .. 127.
inline void store_int8(std::int8_t* p, const f32x16& a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<std::int8_t>(a.v[i]);
}
/// Integral values in 0 .. 255.
inline void store_uint8(std::uint8_t* p, const f32x16& a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<std::uint8_t>(a.v[i]);
}

inline std::int32_t make_pair(int low, int high) {
    return static_cast<std::int32_t>((static_cast<std::uint32_t>(high) << 16) |
                                     (static_cast<std::uint32_t>(low) & 0xffffu));
}
inline int pair_low(std::int32_t pair) { return static_cast<std::int16_t>(pair & 0xffff); }
inline int pair_high(std::int32_t pair) { return pair >> 16; }

/// The sum of 32 values in the form in which dot_group starts: here, as for kernels that add in int16, one half over
/// the values k with k % 4 in {0, 1}, the other over the rest.
inline std::int32_t block_sum(const std::int8_t* p) {
    int low = 0, high = 0;
    for (int i = 0; i < 32; i += 4) {
        low += p[i] + p[i + 1];
        high += p[i + 2] + p[i + 3];
    }
    return make_pair(low, high);
}
inline std::int32_t add_sums(std::int32_t a, std::int32_t b) {
    return make_pair(pair_low(a) + pair_low(b), pair_high(a) + pair_high(b));
}
inline std::int32_t whole_sum(std::int32_t pair) { return pair_low(pair) + pair_high(pair); }

inline void prefetch(const void*) {}

/// sum[r] += 32 columns of row r times x. Not inlined: 48 unrolled copies would cost compile time for nothing.
template <int kBits>
__attribute__((noinline)) void dot_block(const std::uint8_t* block, const std::int8_t* x, std::int32_t* sum) {
    constexpr int kLines = kBits == 4 ? 4 : 8;
    for (int t = 0; t < kLines; ++t) {
        const std::uint8_t* line = block + t * 64;
        for (int r = 0; r < 16; ++r)
            for (int i = 0; i < 4; ++i) {
                const int q = line[4 * r + i];
                if constexpr (kBits == 4)
                    sum[r] += (q & 15) * x[4 * t + i] + (q >> 4) * x[16 + 4 * t + i];
                else
                    sum[r] += q * x[4 * t + i];
            }
    }
}

/// acc[n][m] = exact sum over kBlocks * 32 columns of (q - zero) * a for each of 16 rows, zero = 0 if kAsym. Rows of
/// panel n begin at w[n]; token m's columns lie at a + (block * M + m) * 32, its two sums (QuantizeSpan) at sums[m].
template <int kBits, int kBlocks, bool kAsym, int N, int M>
inline void dot_group(const std::uint8_t* const (&w)[N], const std::int8_t* a, const std::int32_t* sums,
                      i32x16 (&acc)[N][M]) {
    constexpr int kZero = kAsym ? 0 : 1 << (kBits - 1);
    for (int n = 0; n < N; ++n)
        for (int m = 0; m < M; ++m) {
            const int start = -kZero * (pair_low(sums[m]) + pair_high(sums[m]));
            for (int r = 0; r < 16; ++r) acc[n][m].v[r] = start;
            for (int b = 0; b < kBlocks; ++b)
                dot_block<kBits>(w[n] + b * 64 * kBits, a + (b * M + m) * 32, acc[n][m].v);
        }
}

inline std::int64_t int8_peak(std::int64_t iterations) {
    std::int32_t sum[16] = {};
    for (std::int64_t k = 0; k < iterations; ++k)
        for (int i = 0; i < 16; ++i) {
            sum[i] += static_cast<std::int32_t>(k & 15) * i;
            asm volatile("" : "+m"(sum[i]));
        }
    return iterations * 16;
}
