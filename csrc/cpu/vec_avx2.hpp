// SPDX-License-Identifier: Apache-2.0
// Vectors of 16 in two 256-bit registers (AVX2, FMA and F16C). Contracts as in vec_scalar.hpp. Where the including file
// is compiled for AVX-VNNI the integer sums use its vpdpbusd. Included inside an anonymous namespace.

struct f32x16 {
    __m256 a, b;
};
struct i32x16 {
    __m256i a, b;
};

constexpr int kQueryTile = 4;
constexpr int kMaxSums = 5;
constexpr int kPanels = 1;

inline f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, f32x16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline f32x16 bcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline f32x16 add(f32x16 x, f32x16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline f32x16 sub(f32x16 x, f32x16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline f32x16 mul(f32x16 x, f32x16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline f32x16 div(f32x16 x, f32x16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline f32x16 fma(f32x16 x, f32x16 y, f32x16 z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline f32x16 max(f32x16 x, f32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline f32x16 min(f32x16 x, f32x16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline f32x16 abs(f32x16 x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline f32x16 select_less(f32x16 p, f32x16 q, f32x16 x, f32x16 y) {
    return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(p.a, q.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(p.b, q.b, _CMP_LT_OQ))};
}
inline f32x16 first_lanes(f32x16 x, int n, f32x16 fill) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i low = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
    const __m256i high = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane);
    return {_mm256_blendv_ps(fill.a, x.a, _mm256_castsi256_ps(low)),
            _mm256_blendv_ps(fill.b, x.b, _mm256_castsi256_ps(high))};
}
inline float reduce_add(f32x16 x) {
    const __m256 h8 = _mm256_add_ps(x.a, x.b);
    const __m128 h4 = _mm_add_ps(_mm256_castps256_ps128(h8), _mm256_extractf128_ps(h8, 1));
    const __m128 h2 = _mm_add_ps(h4, _mm_movehl_ps(h4, h4));
    return _mm_cvtss_f32(_mm_add_ss(h2, _mm_movehdup_ps(h2)));
}
inline float reduce_max(f32x16 x) {
    const __m256 h8 = _mm256_max_ps(x.a, x.b);
    const __m128 h4 = _mm_max_ps(_mm256_castps256_ps128(h8), _mm256_extractf128_ps(h8, 1));
    const __m128 h2 = _mm_max_ps(h4, _mm_movehl_ps(h4, h4));
    return _mm_cvtss_f32(_mm_max_ss(h2, _mm_movehdup_ps(h2)));
}

inline f32x16 to_f32(i32x16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline __m256 pow2_half(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline f32x16 pow2(f32x16 n) { return {pow2_half(n.a), pow2_half(n.b)}; }
inline f32x16 load_half(const void* p) {
    const __m128i* h = static_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
}
inline void store_half(void* p, f32x16 x) {
    constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    __m128i* h = static_cast<__m128i*>(p);
    _mm_storeu_si128(h, _mm256_cvtps_ph(x.a, kMode));
    _mm_storeu_si128(h + 1, _mm256_cvtps_ph(x.b, kMode));
}
inline f32x16 load_int8(const std::int8_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)))};
}
/// 16 integral floats as int16, in order.
inline __m256i to_int16(f32x16 x) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)), 0xd8);
}
inline void store_int8(std::int8_t* p, f32x16 x) {
    const __m256i v = to_int16(x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}
inline void store_uint8(std::uint8_t* p, f32x16 x) {
    const __m256i v = to_int16(x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}

inline std::int32_t block_sum(const std::int8_t* p) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), values);
    const __m128i h4 = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    const __m128i h2 = _mm_add_epi16(h4, _mm_unpackhi_epi64(h4, h4));
    return _mm_cvtsi128_si32(_mm_add_epi16(h2, _mm_srli_epi64(h2, 32)));
}
inline std::int32_t add_sums(std::int32_t a, std::int32_t b) {
    return _mm_cvtsi128_si32(_mm_add_epi16(_mm_cvtsi32_si128(a), _mm_cvtsi32_si128(b)));
}
inline std::int32_t whole_sum(std::int32_t pair) { return static_cast<std::int16_t>(pair & 0xffff) + (pair >> 16); }

/// Always inlined: GCC takes an out-of-line function that only prefetches for one without effect and drops its calls.
inline __attribute__((always_inline)) void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

inline __m256i bcast4(const std::int8_t* p) {
    std::int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
}

#if defined(__AVXVNNI__)
/// 8 rows of a group for T of M tokens. The sums are exact in 32 bits; starting from -zero * sum(a) takes the offset of
/// symmetric weights away.
template <int kBits, int kBlocks, bool kAsym, int T, int M>
inline __attribute__((always_inline)) void dot_rows_vnni(const std::uint8_t* w, const std::int8_t* a,
                                                         const std::int32_t* sums, __m256i* out) {
    constexpr int kLines = kBits == 4 ? 4 : 8;
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i zero = _mm256_set1_epi16(static_cast<short>(-(1 << (kBits - 1))));
    __m256i sum[T];
#pragma GCC unroll 8
    for (int m = 0; m < T; ++m)
        sum[m] = kAsym ? _mm256_setzero_si256() : _mm256_madd_epi16(_mm256_set1_epi32(sums[m]), zero);
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 8
        for (int t = 0; t < kLines; ++t) {
            const std::uint8_t* p = w + (b * kLines + t) * 64;
            const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
            const __m256i low = kBits == 4 ? _mm256_and_si256(line, mask) : line;
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(line, 4), mask);
#pragma GCC unroll 8
            for (int m = 0; m < T; ++m) {
                const std::int8_t* x = a + (b * M + m) * 32 + 4 * t;
                sum[m] = _mm256_dpbusd_avx_epi32(sum[m], low, bcast4(x));
                if constexpr (kBits == 4) sum[m] = _mm256_dpbusd_avx_epi32(sum[m], high, bcast4(x + 16));
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < T; ++m) out[m] = sum[m];
}
#else
/// Keeps a sum as it is: without it GCC rebuilds 16 additions as a tree, and 16 products do not fit the registers.
inline __attribute__((always_inline)) void pin(__m256i& x) { asm("" : "+x"(x)); }

/// 8 rows of a 4-bit group for T of M tokens. vpmaddubsw adds two products of at most 15 * 127, so it does not
/// saturate. The int16 sums may wrap on the way, but they start from -8 * sum(a) and so end at a sum of 32 products (q
/// - 8) * a, at most 32512.
template <int kBlocks, bool kAsym, int T, int M>
inline __attribute__((always_inline)) void dot_rows4(const std::uint8_t* w, const std::int8_t* a,
                                                     const std::int32_t* sums, __m256i* out) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i sum[T];
#pragma GCC unroll 8
    for (int m = 0; m < T; ++m) sum[m] = _mm256_mullo_epi16(_mm256_set1_epi32(sums[m]), _mm256_set1_epi16(-8));
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) {
            const std::uint8_t* p = w + (b * 4 + t) * 64;
            const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
            const __m256i low = _mm256_and_si256(line, mask);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(line, 4), mask);
#pragma GCC unroll 8
            for (int m = 0; m < T; ++m) {
                const std::int8_t* x = a + (b * M + m) * 32 + 4 * t;
                sum[m] = _mm256_add_epi16(sum[m], _mm256_maddubs_epi16(low, bcast4(x)));
                pin(sum[m]);
                sum[m] = _mm256_add_epi16(sum[m], _mm256_maddubs_epi16(high, bcast4(x + 16)));
                pin(sum[m]);
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < T; ++m) {
        out[m] = _mm256_madd_epi16(sum[m], _mm256_set1_epi16(1));
        if constexpr (kAsym)
            out[m] = _mm256_add_epi32(out[m], _mm256_madd_epi16(_mm256_set1_epi32(sums[m]), _mm256_set1_epi16(8)));
    }
}

/// 8 rows of an 8-bit group for T of M tokens. vpmaddubsw would saturate, so the weights are taken as two nibbles,
/// whose int16 sums over 32 columns stay below 8 * 2 * 15 * 127 = 30480.
template <int kBlocks, int T, int M>
inline __attribute__((always_inline)) void dot_rows8(const std::uint8_t* w, const std::int8_t* a,
                                                     const std::int32_t* sums, __m256i* out) {
    const __m256i mask = _mm256_set1_epi8(15);
#pragma GCC unroll 4
    for (int m = 0; m < T; ++m) out[m] = _mm256_madd_epi16(_mm256_set1_epi32(sums[m]), _mm256_set1_epi16(-128));
    for (int b = 0; b < kBlocks; ++b) {
        __m256i low_sum[T], high_sum[T];
#pragma GCC unroll 4
        for (int m = 0; m < T; ++m) low_sum[m] = high_sum[m] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int t = 0; t < 8; ++t) {
            const std::uint8_t* p = w + (b * 8 + t) * 64;
            const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
            const __m256i low = _mm256_and_si256(line, mask);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(line, 4), mask);
#pragma GCC unroll 4
            for (int m = 0; m < T; ++m) {
                const __m256i x = bcast4(a + (b * M + m) * 32 + 4 * t);
                low_sum[m] = _mm256_add_epi16(low_sum[m], _mm256_maddubs_epi16(low, x));
                pin(low_sum[m]);
                high_sum[m] = _mm256_add_epi16(high_sum[m], _mm256_maddubs_epi16(high, x));
                pin(high_sum[m]);
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < T; ++m) {
            out[m] = _mm256_add_epi32(out[m], _mm256_madd_epi16(low_sum[m], _mm256_set1_epi16(1)));
            out[m] = _mm256_add_epi32(out[m], _mm256_madd_epi16(high_sum[m], _mm256_set1_epi16(16)));
        }
    }
}

#endif

/// Makes the compiler read the activations again for the next 8 rows, not keep them: there are 16 registers.
inline __attribute__((always_inline)) void again(const std::int8_t*& a, const std::int32_t*& sums) {
    asm volatile("" : "+r"(a), "+r"(sums) : : "memory");
}

/// 8 rows of one group for T of M tokens, as many at a time as there are registers for.
template <int kBits, int kBlocks, bool kAsym, int T, int M>
inline __attribute__((always_inline)) void dot_rows(const std::uint8_t* w, const std::int8_t* a,
                                                    const std::int32_t* sums, __m256i* out) {
#if defined(__AVXVNNI__)
    constexpr int kMost = 6;
    constexpr int kNow = T < kMost ? T : kMost;
    dot_rows_vnni<kBits, kBlocks, kAsym, kNow, M>(w, a, sums, out);
#else
    constexpr int kMost = kBits == 4 ? 6 : 3;
    constexpr int kNow = T < kMost ? T : kMost;
    if constexpr (kBits == 4)
        dot_rows4<kBlocks, kAsym, kNow, M>(w, a, sums, out);
    else
        dot_rows8<kBlocks, kNow, M>(w, a, sums, out);
#endif
    if constexpr (T > kMost)
        dot_rows<kBits, kBlocks, kAsym, T - kMost, M>(w, a + kMost * 32, sums + kMost, out + kMost);
}

template <int kBits, int kBlocks, bool kAsym, int N, int M>
inline __attribute__((always_inline)) void dot_group(const std::uint8_t* const (&w)[N], const std::int8_t* a,
                                                     const std::int32_t* sums, i32x16 (&acc)[N][M]) {
    for (int n = 0; n < N; ++n) {
        __m256i low[M], high[M];
        dot_rows<kBits, kBlocks, kAsym, M, M>(w[n], a, sums, low);
        again(a, sums);
        dot_rows<kBits, kBlocks, kAsym, M, M>(w[n] + 32, a, sums, high);
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) acc[n][m] = {low[m], high[m]};
        again(a, sums);
    }
}

inline std::int64_t int8_peak(std::int64_t iterations) {
    constexpr int kChains = 10;
    __m256i sum[kChains], x = _mm256_set1_epi8(1);
#pragma GCC unroll 10
    for (int i = 0; i < kChains; ++i) {
        sum[i] = _mm256_setzero_si256();
        asm("" : "+x"(sum[i]));  // else the chains are one to the compiler
    }
    for (std::int64_t k = 0; k < iterations; ++k) {
        asm volatile("" : "+x"(x));
#pragma GCC unroll 10
        for (int i = 0; i < kChains; ++i) {
#if defined(__AVXVNNI__)
            sum[i] = _mm256_dpbusd_avx_epi32(sum[i], x, x);
#else
            sum[i] = _mm256_add_epi16(sum[i], _mm256_maddubs_epi16(x, x));
#endif
        }
    }
#pragma GCC unroll 10
    for (int i = 0; i < kChains; ++i) asm volatile("" ::"x"(sum[i]));
    return iterations * kChains * 32;
}
