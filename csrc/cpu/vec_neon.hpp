// SPDX-License-Identifier: Apache-2.0
// Vectors of 16 in four 128-bit registers (Advanced SIMD), and the sums of sdot that both NEON tables need.
// Contracts as in vec_scalar.hpp. Included inside an anonymous namespace.
//
// NaN is one thing here: which of its bits are set (x86 makes it negative, Arm positive) is not part of any contract.

struct f32x16 {
    float32x4_t a, b, c, d;
};
struct i32x16 {
    int32x4_t a, b, c, d;
};

constexpr int kQueryTile = 4;  // queries x vectors of sums x 4 registers of 32
constexpr int kMaxSums = 4;
constexpr int kPanels = 1;

inline f32x16 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
inline void store(float* p, f32x16 x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
    vst1q_f32(p + 8, x.c);
    vst1q_f32(p + 12, x.d);
}
inline f32x16 bcast(float x) {
    const float32x4_t v = vdupq_n_f32(x);
    return {v, v, v, v};
}
inline f32x16 add(f32x16 x, f32x16 y) {
    return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b), vaddq_f32(x.c, y.c), vaddq_f32(x.d, y.d)};
}
inline f32x16 sub(f32x16 x, f32x16 y) {
    return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b), vsubq_f32(x.c, y.c), vsubq_f32(x.d, y.d)};
}
inline f32x16 mul(f32x16 x, f32x16 y) {
    return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b), vmulq_f32(x.c, y.c), vmulq_f32(x.d, y.d)};
}
inline f32x16 div(f32x16 x, f32x16 y) {
    return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b), vdivq_f32(x.c, y.c), vdivq_f32(x.d, y.d)};
}
/// x * y + z
inline f32x16 fma(f32x16 x, f32x16 y, f32x16 z) {
    return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b), vfmaq_f32(z.c, x.c, y.c), vfmaq_f32(z.d, x.d, y.d)};
}
// Compare and select, not fmax and fmin: those of Arm propagate NaN from either side.
inline float32x4_t max4(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
inline float32x4_t min4(float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }
inline f32x16 max(f32x16 x, f32x16 y) { return {max4(x.a, y.a), max4(x.b, y.b), max4(x.c, y.c), max4(x.d, y.d)}; }
inline f32x16 min(f32x16 x, f32x16 y) { return {min4(x.a, y.a), min4(x.b, y.b), min4(x.c, y.c), min4(x.d, y.d)}; }
inline f32x16 abs(f32x16 x) { return {vabsq_f32(x.a), vabsq_f32(x.b), vabsq_f32(x.c), vabsq_f32(x.d)}; }
inline f32x16 select_less(f32x16 p, f32x16 q, f32x16 x, f32x16 y) {
    return {vbslq_f32(vcltq_f32(p.a, q.a), x.a, y.a), vbslq_f32(vcltq_f32(p.b, q.b), x.b, y.b),
            vbslq_f32(vcltq_f32(p.c, q.c), x.c, y.c), vbslq_f32(vcltq_f32(p.d, q.d), x.d, y.d)};
}
inline float32x4_t first_lanes4(float32x4_t x, int n, float32x4_t fill) {
    alignas(16) static constexpr std::int32_t kLane[4] = {0, 1, 2, 3};
    return vbslq_f32(vcltq_s32(vld1q_s32(kLane), vdupq_n_s32(n)), x, fill);
}
inline f32x16 first_lanes(f32x16 x, int n, f32x16 fill) {
    return {first_lanes4(x.a, n, fill.a), first_lanes4(x.b, n - 4, fill.b), first_lanes4(x.c, n - 8, fill.c),
            first_lanes4(x.d, n - 12, fill.d)};
}
inline float reduce_add(f32x16 x) {
    const float32x4_t h4 = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
    const float32x2_t h2 = vadd_f32(vget_low_f32(h4), vget_high_f32(h4));
    return vget_lane_f32(h2, 0) + vget_lane_f32(h2, 1);
}
inline float reduce_max(f32x16 x) {
    const float32x4_t h4 = max4(max4(x.a, x.c), max4(x.b, x.d));
    const float32x4_t h2 = max4(h4, vextq_f32(h4, h4, 2));
    return vgetq_lane_f32(max4(h2, vextq_f32(h2, h2, 1)), 0);
}

inline f32x16 to_f32(i32x16 x) {
    return {vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b), vcvtq_f32_s32(x.c), vcvtq_f32_s32(x.d)};
}
inline float32x4_t pow2_4(float32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
inline f32x16 pow2(f32x16 n) { return {pow2_4(n.a), pow2_4(n.b), pow2_4(n.c), pow2_4(n.d)}; }

// fcvtl and fcvtn of the base architecture: IEEE halves, subnormal ones too, nearest even.
inline f32x16 load_half(const void* p) {
    const std::uint16_t* h = static_cast<const std::uint16_t*>(p);
    const float16x8_t low = vreinterpretq_f16_u16(vld1q_u16(h)), high = vreinterpretq_f16_u16(vld1q_u16(h + 8));
    return {vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)),
            vcvt_high_f32_f16(high)};
}
inline void store_half(void* p, f32x16 x) {
    std::uint16_t* h = static_cast<std::uint16_t*>(p);
    vst1q_u16(h, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b)));
    vst1q_u16(h + 8, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.c), x.d)));
}
inline f32x16 load_int8(const std::int8_t* p) {
    const int8x16_t v = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_high_s8(v);
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))};
}
/// 16 integral floats modulo 256.
inline int8x16_t to_bytes(f32x16 x) {
    const int16x8_t low = vmovn_high_s32(vmovn_s32(vcvtq_s32_f32(x.a)), vcvtq_s32_f32(x.b));
    const int16x8_t high = vmovn_high_s32(vmovn_s32(vcvtq_s32_f32(x.c)), vcvtq_s32_f32(x.d));
    return vmovn_high_s16(vmovn_s16(low), high);
}
inline void store_int8(std::int8_t* p, f32x16 x) { vst1q_s8(p, to_bytes(x)); }
inline void store_uint8(std::uint8_t* p, f32x16 x) { vst1q_u8(p, vreinterpretq_u8_s8(to_bytes(x))); }

inline std::int32_t block_sum(const std::int8_t* p) {
    const int16x8_t pairs = vpadalq_s8(vpaddlq_s8(vld1q_s8(p)), vld1q_s8(p + 16));
    const int16x4_t h4 = vadd_s16(vget_low_s16(pairs), vget_high_s16(pairs));
    return vget_lane_s32(vreinterpret_s32_s16(vadd_s16(h4, vext_s16(h4, h4, 2))), 0);
}
inline std::int32_t add_sums(std::int32_t a, std::int32_t b) {
    const int16x4_t x = vreinterpret_s16_s32(vdup_n_s32(a)), y = vreinterpret_s16_s32(vdup_n_s32(b));
    return vget_lane_s32(vreinterpret_s32_s16(vadd_s16(x, y)), 0);
}
inline std::int32_t whole_sum(std::int32_t pair) { return static_cast<std::int16_t>(pair & 0xffff) + (pair >> 16); }

/// Always inlined: GCC takes an out-of-line function that only prefetches for one without effect and drops its calls.
inline __attribute__((always_inline)) void prefetch(const void* p) { __builtin_prefetch(p); }

// Weight bytes as the signed operand of a product. The nibbles 0 .. 15 are that already; bytes lose their offset of 128
// by a flipped bit.
inline int8x16_t low_nibbles(uint8x16_t packed) { return vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15))); }
inline int8x16_t high_nibbles(uint8x16_t packed) { return vreinterpretq_s8_u8(vshrq_n_u8(packed, 4)); }
inline int8x16_t centred(uint8x16_t bytes) { return vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(128))); }

/// Where the sums of a token start, so that the offset of its weights is folded away.
template <int kBits, bool kAsym>
inline std::int32_t start_of(std::int32_t pair) {
    return kBits == 4 && !kAsym ? -8 * whole_sum(pair) : 0;
}

/// Four columns of 8 rows, 4 of them a register, times lane kLane of each token's activations: x those of columns
/// 0 .. 15 of the block, y of 16 .. 31. `line` is that of x; 8-bit weights have the one of y 256 bytes on.
template <int kBits, int kLane, int T>
inline __attribute__((always_inline)) void sdot_line(const std::uint8_t* line, const int8x16_t (&x)[T],
                                                     const int8x16_t (&y)[T], int32x4_t (&sum)[T][2]) {
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
        const uint8x16_t packed = vld1q_u8(line + 16 * c);
        const int8x16_t low = kBits == 4 ? low_nibbles(packed) : centred(packed);
        const int8x16_t high = kBits == 4 ? high_nibbles(packed) : centred(vld1q_u8(line + 256 + 16 * c));
#pragma GCC unroll 6
        for (int m = 0; m < T; ++m) {
            sum[m][c] = vdotq_laneq_s32(sum[m][c], low, x[m], kLane);
            sum[m][c] = vdotq_laneq_s32(sum[m][c], high, y[m], kLane);
        }
    }
}

/// The sums of one group (dot_group) over 8 rows for T of M tokens, by sdot: 2T registers of sums, 2T of activations.
template <int kBits, int kBlocks, bool kAsym, int T, int M>
inline __attribute__((always_inline)) void sdot_rows(const std::uint8_t* w, const std::int8_t* a,
                                                     const std::int32_t* sums, int32x4_t (&sum)[T][2]) {
#pragma GCC unroll 6
    for (int m = 0; m < T; ++m) sum[m][0] = sum[m][1] = vdupq_n_s32(start_of<kBits, kAsym>(sums[m]));
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
        const std::uint8_t* block = w + b * 64 * kBits;
        int8x16_t x[T], y[T];
#pragma GCC unroll 6
        for (int m = 0; m < T; ++m) {
            x[m] = vld1q_s8(a + (b * M + m) * 32);
            y[m] = vld1q_s8(a + (b * M + m) * 32 + 16);
        }
        sdot_line<kBits, 0, T>(block, x, y, sum);
        sdot_line<kBits, 1, T>(block + 64, x, y, sum);
        sdot_line<kBits, 2, T>(block + 128, x, y, sum);
        sdot_line<kBits, 3, T>(block + 192, x, y, sum);
    }
}

/// Makes the compiler read the activations again for the other 8 rows, not keep them.
inline __attribute__((always_inline)) void again(const std::int8_t*& a) { asm("" : "+r"(a)); }

/// The same over 16 rows, for 1 .. 6 tokens.
template <int kBits, int kBlocks, bool kAsym, int T, int M>
inline __attribute__((always_inline)) void sdot_tokens(const std::uint8_t* w, const std::int8_t* a,
                                                       const std::int32_t* sums, i32x16* acc) {
    static_assert(T <= 6);
    int32x4_t low[T][2], high[T][2];
    sdot_rows<kBits, kBlocks, kAsym, T, M>(w, a, sums, low);
    again(a);
    sdot_rows<kBits, kBlocks, kAsym, T, M>(w + 32, a, sums, high);
#pragma GCC unroll 6
    for (int m = 0; m < T; ++m) acc[m] = {low[m][0], low[m][1], high[m][0], high[m][1]};
}

/// Of `left` tokens, how many are taken at a time: all up to 6, then about half of them, an even number.
constexpr int tokens_now(int left) { return left <= 6 ? left : (left / 2 + 1) / 2 * 2; }
static_assert(tokens_now(7) == 4 && tokens_now(9) == 4 && tokens_now(10) == 6 && tokens_now(12) == 6);

/// As sdot_tokens, for 1 .. 12 tokens; dot_neon*.hpp define it.
template <int kBits, int kBlocks, bool kAsym, int T, int M>
inline __attribute__((always_inline)) void dot_tokens(const std::uint8_t* w, const std::int8_t* a,
                                                      const std::int32_t* sums, i32x16* acc);

template <int kBits, int kBlocks, bool kAsym, int N, int M>
inline __attribute__((always_inline)) void dot_group(const std::uint8_t* const (&w)[N], const std::int8_t* a,
                                                     const std::int32_t* sums, i32x16 (&acc)[N][M]) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) dot_tokens<kBits, kBlocks, kAsym, M, M>(w[n], a, sums, acc[n]);
}

/// Runs `step`, (sums, values) -> sums by one instruction of kProducts products, in chains enough to hide its latency.
/// Returns the products.
template <int kProducts, typename Step>
inline std::int64_t int8_chains(std::int64_t iterations, Step step) {
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
        for (int i = 0; i < kChains; ++i) sum[i] = step(sum[i], x);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) asm volatile("" ::"w"(sum[i]));
    return iterations * kChains * kProducts;
}
