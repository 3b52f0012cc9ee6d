// SPDX-License-Identifier: Apache-2.0
// The dot products of vec_*.hpp by sdot alone. Included inside an anonymous namespace, after vec_neon.hpp.

template <int kBits, int kBlocks, bool kAsym, int T, int M>
inline __attribute__((always_inline)) void dot_tokens(const std::uint8_t* w, const std::int8_t* a,
                                                      const std::int32_t* sums, i32x16* acc) {
    constexpr int kNow = tokens_now(T);
    sdot_tokens<kBits, kBlocks, kAsym, kNow, M>(w, a, sums, acc);
    if constexpr (T > kNow) dot_tokens<kBits, kBlocks, kAsym, T - kNow, M>(w, a + kNow * 32, sums + kNow, acc + kNow);
}

inline std::int64_t int8_peak(std::int64_t iterations) {
    return int8_chains<16>(iterations, [](int32x4_t sum, int8x16_t x) { return vdotq_laneq_s32(sum, x, x, 0); });
}
