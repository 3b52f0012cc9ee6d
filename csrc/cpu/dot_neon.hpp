// SPDX-License-Identifier: Apache-2.0
// The dot products of vec_*.hpp by sdot alone. Included inside an anonymous namespace, after vec_neon.hpp.

template <int kBits, int kBlocks, bool kAsym, int T, int M, bool kPrefetch>
inline __attribute__((always_inline)) void dot_tokens(const std::uint8_t* w, const std::int8_t* a,
                                                      const std::int32_t* sums, i32x16* acc) {
    constexpr int kNow = tokens_now(T);
    sdot_tokens<kBits, kBlocks, kAsym, kNow, M, kPrefetch>(w, a, sums, acc);
    if constexpr (T > kNow)
        dot_tokens<kBits, kBlocks, kAsym, T - kNow, M, false>(w, a + kNow * 32, sums + kNow, acc + kNow);
}

template <int kBits, int kBlocks, bool kAsym, int N, int M, bool kPrefetch>
inline __attribute__((always_inline)) void dot_group(const std::uint8_t* const (&w)[N], const std::int8_t* a,
                                                     const std::int32_t* sums, i32x16 (&acc)[N][M]) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) dot_tokens<kBits, kBlocks, kAsym, M, M, kPrefetch>(w[n], a, sums, acc[n]);
}

inline std::int64_t int8_peak(std::int64_t iterations) {
    constexpr int kChains = 16;
    int32x4_t sum[kChains];
    int8x16_t x = vdupq_n_s8(1);
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) {
        sum[i] = vdupq_n_s32(0);
        asm("" : "+w"(sum[i]));  // else the chains are one to the compiler
    }
    for (std::int64_t k = 0; k < iterations; ++k) {
        asm volatile("" : "+w"(x));
#pragma GCC unroll 16
        for (int i = 0; i < kChains; ++i) sum[i] = vdotq_laneq_s32(sum[i], x, x, 0);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) asm volatile("" ::"w"(sum[i]));
    return iterations * kChains * 16;
}
