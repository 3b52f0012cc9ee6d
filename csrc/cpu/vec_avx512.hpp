// SPDX-License-Identifier: Apache-2.0
// Vectors of 16 in one 512-bit register (AVX-512 F, BW, VL, DQ and VNNI). Contracts as in vec_scalar.hpp.
// Included inside an anonymous namespace.

using f32x16 = __m512;
using i32x16 = __m512i;

constexpr int kQueryTile = 8;
constexpr int kMaxSums = 16;
constexpr int kPanels = 2;

inline f32x16 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a); }
inline f32x16 bcast(float x) { return _mm512_set1_ps(x); }
inline f32x16 add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
inline f32x16 sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
inline f32x16 mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
inline f32x16 div(f32x16 a, f32x16 b) { return _mm512_div_ps(a, b); }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
inline f32x16 max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
inline f32x16 min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
inline f32x16 abs(f32x16 a) { return _mm512_abs_ps(a); }
inline f32x16 select_less(f32x16 a, f32x16 b, f32x16 x, f32x16 y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
inline f32x16 first_lanes(f32x16 a, int n, f32x16 fill) {
    return _mm512_mask_blend_ps(static_cast<__mmask16>((1u << n) - 1u), fill, a);
}
inline float reduce_add(f32x16 a) {
    const __m256 h8 = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 h4 = _mm_add_ps(_mm256_castps256_ps128(h8), _mm256_extractf128_ps(h8, 1));
    const __m128 h2 = _mm_add_ps(h4, _mm_movehl_ps(h4, h4));
    return _mm_cvtss_f32(_mm_add_ss(h2, _mm_movehdup_ps(h2)));
}
inline float reduce_max(f32x16 a) {
    const __m256 h8 = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 h4 = _mm_max_ps(_mm256_castps256_ps128(h8), _mm256_extractf128_ps(h8, 1));
    const __m128 h2 = _mm_max_ps(h4, _mm_movehl_ps(h4, h4));
    return _mm_cvtss_f32(_mm_max_ss(h2, _mm_movehdup_ps(h2)));
}

inline f32x16 to_f32(i32x16 a) { return _mm512_cvtepi32_ps(a); }
inline f32x16 pow2(f32x16 n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline f32x16 load_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
inline void store_half(void* p, f32x16 a) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline f32x16 load_int8(const std::int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store_int8(std::int8_t* p, f32x16 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a)));
}
inline void store_uint8(std::uint8_t* p, f32x16 a) { store_int8(reinterpret_cast<std::int8_t*>(p), a); }

/// -8 times the sum: what takes the offset of 4-bit weights away, ready to be loaded. Multiplying here and not in
/// dot_group leaves the units that multiply to the products; on Zen 4 they are what binds from four tokens on.
inline std::int32_t block_sum(const std::int8_t* p) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), values);
    const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(-8));
    const __m128i h4 = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    const __m128i h2 = _mm_add_epi32(h4, _mm_unpackhi_epi64(h4, h4));
    return _mm_cvtsi128_si32(_mm_add_epi32(h2, _mm_srli_epi64(h2, 32)));
}
inline std::int32_t add_sums(std::int32_t a, std::int32_t b) { return a + b; }
inline std::int32_t whole_sum(std::int32_t sum) { return -(sum >> 3); }

/// Always inlined: GCC takes an out-of-line function that only prefetches for one without effect and drops its calls.
inline __attribute__((always_inline)) void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

inline __m512i bcast4(const std::int8_t* p) {
    std::int32_t x;
    __builtin_memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
}

/// acc + w * x, x being the same four columns for every row. GCC 12 makes two instructions of it, and a loop that waits
/// for memory sees as far ahead as the processor's window has instructions.
inline __attribute__((always_inline)) __m512i dot(__m512i acc, __m512i w, const std::int8_t* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<const std::int32_t*>(x)));
    return acc;
}

template <int kBits, int kBlocks, bool kAsym, int N, int M>
inline __attribute__((always_inline)) void dot_group(const std::uint8_t* const (&w)[N], const std::int8_t* a,
                                                     const std::int32_t* sums, i32x16 (&acc)[N][M]) {
    constexpr int kLines = kBits == 4 ? 4 : 8;
    const __m512i mask = _mm512_set1_epi8(15);
    // Symmetric weights are stored with an offset: starting from -zero * sum(a) takes it away for nothing.
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
        __m512i start = kAsym ? _mm512_setzero_si512() : _mm512_set1_epi32(sums[m]);
        if constexpr (kBits == 8) start = _mm512_slli_epi32(start, 4);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) acc[n][m] = start;
    }
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 8
        for (int t = 0; t < kLines; ++t) {
            __m512i low[N], high[N];
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) {
                const std::uint8_t* p = w[n] + (b * kLines + t) * 64;
                const __m512i line = _mm512_loadu_si512(p);
                low[n] = kBits == 4 ? _mm512_and_si512(line, mask) : line;
                high[n] = _mm512_and_si512(_mm512_srli_epi16(line, 4), mask);
            }
#pragma GCC unroll 12
            for (int m = 0; m < M; ++m) {
                const std::int8_t* x = a + (b * M + m) * 32 + 4 * t;
                if constexpr (N == 1) {
                    acc[0][m] = dot(acc[0][m], low[0], x);
                    if constexpr (kBits == 4) acc[0][m] = dot(acc[0][m], high[0], x + 16);
                } else {  // two panels share what was loaded
                    const __m512i x0 = bcast4(x);
#pragma GCC unroll 2
                    for (int n = 0; n < N; ++n) acc[n][m] = _mm512_dpbusd_epi32(acc[n][m], low[n], x0);
                    if constexpr (kBits == 4) {
                        const __m512i x1 = bcast4(x + 16);
#pragma GCC unroll 2
                        for (int n = 0; n < N; ++n) acc[n][m] = _mm512_dpbusd_epi32(acc[n][m], high[n], x1);
                    }
                }
            }
        }
    }
}

inline std::int64_t int8_peak(std::int64_t iterations) {
    constexpr int kChains = 12;
    __m512i sum[kChains], x = _mm512_set1_epi8(1);
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
        sum[i] = _mm512_setzero_si512();
        asm("" : "+v"(sum[i]));  // else the chains are one to the compiler
    }
    for (std::int64_t k = 0; k < iterations; ++k) {
        asm volatile("" : "+v"(x));
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) sum[i] = _mm512_dpbusd_epi32(sum[i], x, x);
    }
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) asm volatile("" ::"v"(sum[i]));
    return iterations * kChains * 64;
}
