// SPDX-License-Identifier: Apache-2.0
// The dot products of vec_*.hpp by smmla. Included inside an anonymous namespace, after vec_neon.hpp.
//
// smmla multiplies two rows by two tokens over eight columns: [r0 m0, r0 m1, r1 m0, r1 m1] += ... Lines t and t + 1 of
// a block hold four and four consecutive columns of the same rows, so zipping them word by word, still packed, gives
// {row r, 8 columns | row r + 1, 8 columns}. An odd last token is paired with itself; a single one goes to sdot, which
// does as many useful products.

/// Eight columns: x[p] = {of token 2p | of token 2p + 1}, the last token standing in for one that is missing.
template <int T>
inline __attribute__((always_inline)) void load_pairs(const std::int8_t* a, int8x16_t (&x)[(T + 1) / 2]) {
#pragma GCC unroll 3
    for (int p = 0; p < (T + 1) / 2; ++p) {
        const std::int8_t* even = a + 2 * p * 32;
        x[p] = vcombine_s8(vld1_s8(even), vld1_s8(2 * p + 1 < T ? even + 32 : even));
    }
}

/// Lines t and t + 1 of four rows, still packed: rows 0 and 1, rows 2 and 3.
struct RowPairs {
    uint8x16_t first, second;
};
inline __attribute__((always_inline)) RowPairs zip_lines(const std::uint8_t* lines) {
    const uint32x4_t a = vreinterpretq_u32_u8(vld1q_u8(lines)), b = vreinterpretq_u32_u8(vld1q_u8(lines + 64));
    return {vreinterpretq_u8_u32(vzip1q_u32(a, b)), vreinterpretq_u8_u32(vzip2q_u32(a, b))};
}

/// Rows 4c .. 4c + 3 times P pairs of tokens over eight columns.
template <int P>
inline __attribute__((always_inline)) void smmla(int c, int8x16_t first, int8x16_t second, const int8x16_t (&x)[P],
                                                 int32x4_t (&sum)[P][8]) {
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) {
        sum[p][2 * c] = vmmlaq_s32(sum[p][2 * c], first, x[p]);
        sum[p][2 * c + 1] = vmmlaq_s32(sum[p][2 * c + 1], second, x[p]);
    }
}

/// Two 4-bit lines: their low nibbles times x, their high ones times y, or only one of the two.
template <bool kLow, bool kHigh, int P>
inline __attribute__((always_inline)) void smmla_nibbles(const std::uint8_t* lines, const int8x16_t (&x)[P],
                                                         const int8x16_t (&y)[P], int32x4_t (&sum)[P][8]) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const RowPairs rows = zip_lines(lines + 16 * c);
        if constexpr (kLow) smmla<P>(c, low_nibbles(rows.first), low_nibbles(rows.second), x, sum);
        if constexpr (kHigh) smmla<P>(c, high_nibbles(rows.first), high_nibbles(rows.second), y, sum);
    }
}

/// Makes the compiler read the block again for its other nibbles, not keep 16 registers of it.
inline __attribute__((always_inline)) void again(const std::uint8_t*& block) { asm("" : "+r"(block)); }

/// A block of 32 columns. Three pairs leave no registers for the activations of both nibbles at a time.
template <int kBits, int T>
inline __attribute__((always_inline)) void smmla_block(const std::uint8_t* block, const std::int8_t* a,
                                                       int32x4_t (&sum)[(T + 1) / 2][8]) {
    constexpr int P = (T + 1) / 2;
    int8x16_t x[P], y[P];
#pragma GCC unroll 4
    for (int j = 0; j < kBits / 2; ++j) {
        load_pairs<T>(a + 8 * j, x);
        if constexpr (kBits == 8) {
#pragma GCC unroll 4
            for (int c = 0; c < 4; ++c) {
                const RowPairs rows = zip_lines(block + 128 * j + 16 * c);
                smmla<P>(c, centred(rows.first), centred(rows.second), x, sum);
            }
        } else {
            if constexpr (P < 3) load_pairs<T>(a + 16 + 8 * j, y);
            smmla_nibbles<true, (P < 3), P>(block + 128 * j, x, y, sum);
        }
    }
    if constexpr (kBits == 4 && P == 3) {
        again(block);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            load_pairs<T>(a + 16 + 8 * j, y);
            smmla_nibbles<false, true, P>(block + 128 * j, x, y, sum);
        }
    }
}

/// As sdot_tokens, for 2 .. 6 tokens: up to 24 registers of sums.
template <int kBits, int kBlocks, bool kAsym, int T, int M>
inline __attribute__((always_inline)) void smmla_tokens(const std::uint8_t* w, const std::int8_t* a,
                                                        const std::int32_t* sums, i32x16* acc) {
    static_assert(T >= 2 && T <= 6);
    constexpr int P = (T + 1) / 2;
    int32x4_t sum[P][8];
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) {
        const int32x4_t even = vdupq_n_s32(start_of<kBits, kAsym>(sums[2 * p]));
        const int32x4_t odd = vdupq_n_s32(start_of<kBits, kAsym>(sums[2 * p + 1 < T ? 2 * p + 1 : 2 * p]));
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) sum[p][r] = vzip1q_s32(even, odd);
    }
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
        const std::uint8_t* block = w + b * 64 * kBits;
        smmla_block<kBits, T>(block, a + b * M * 32, sum);
    }
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) {
        const int32x4_t(&s)[8] = sum[p];
        acc[2 * p] = {vuzp1q_s32(s[0], s[1]), vuzp1q_s32(s[2], s[3]), vuzp1q_s32(s[4], s[5]), vuzp1q_s32(s[6], s[7])};
        if (2 * p + 1 < T)
            acc[2 * p + 1] = {vuzp2q_s32(s[0], s[1]), vuzp2q_s32(s[2], s[3]), vuzp2q_s32(s[4], s[5]),
                              vuzp2q_s32(s[6], s[7])};
    }
}

template <int kBits, int kBlocks, bool kAsym, int T, int M>
inline __attribute__((always_inline)) void dot_tokens(const std::uint8_t* w, const std::int8_t* a,
                                                      const std::int32_t* sums, i32x16* acc) {
    constexpr int kNow = tokens_now(T);
    if constexpr (kNow == 1)
        sdot_tokens<kBits, kBlocks, kAsym, kNow, M>(w, a, sums, acc);
    else
        smmla_tokens<kBits, kBlocks, kAsym, kNow, M>(w, a, sums, acc);
    if constexpr (T > kNow) dot_tokens<kBits, kBlocks, kAsym, T - kNow, M>(w, a + kNow * 32, sums + kNow, acc + kNow);
}

inline std::int64_t int8_peak(std::int64_t iterations) {
    return int8_chains<32>(iterations, [](int32x4_t sum, int8x16_t x) { return vmmlaq_s32(sum, x, x); });
}
