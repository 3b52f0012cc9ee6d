// SPDX-License-Identifier: Apache-2.0
// The matmul micro-kernel: the order of its float operations, which fixes the bits, over the exact integer sums of
// dot_group (vec_*.hpp). Included inside an anonymous namespace.
//
// Per row and token:   c += scale_a * sum over groups ( scale_w * (float) sum (q - zero) a   [+ min_w * sum a] )
//
// for every superblock of 256 columns in order, all by fused multiply-adds. N panels of 16 rows by M tokens sit in
// registers; c is visited once a superblock only, so it may lie in memory and the columns may be cut there.

/// A stream (kStream) asks for its own lines ahead, all others for those of the next call.
template <int kIndex, int N, int M, bool kStream>
inline void multiply(const MatmulTile& t) {
    constexpr WeightShape kShape = kShapes[kIndex];
    constexpr bool kAsym = kShape.asymmetric;
    // A group of 128 is two of 64 with one scale.
    constexpr int kPerScale = kShape.group > 64 ? kShape.group / 64 : 1;
    constexpr int kColumns = kShape.group / kPerScale;
    constexpr int kBlocks = kColumns / 32;
    constexpr int kGroupBytes = 16 * kColumns * kShape.bits / 8;
    static_assert(kShape.bits == 4 || kShape.bits == 8);
    static_assert(!kAsym || kColumns == 64, "the whole sums are those of 64 columns");

    const std::uint8_t* w[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) w[n] = t.weights + n * t.panel_bytes;
    const std::uint8_t* asked = t.weights + t.weights_ahead;  // one pointer: sums cost the stream its speed
    const std::int8_t* a = t.values;
    const std::int32_t* sums = t.sums;
    const float* a_sums = t.whole64;
    const float* a_scales = t.scales;

    for (std::int64_t left = t.cols; left > 0; left -= kSpan, a_scales += M) {
        const int groups = static_cast<int>(left < kSpan ? left : kSpan) / kColumns;
        const int scales = (groups + kPerScale - 1) / kPerScale;
        const int header = (scales * 32 * (kAsym ? 2 : 1) + 63) / 64 * 64;
        const std::uint8_t* lines[N];
        f32x16 f[N][M];
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
            lines[n] = w[n] + header;
#pragma GCC unroll 12
            for (int m = 0; m < M; ++m) f[n][m] = zeros();
            if constexpr (!kStream)
                for (int i = 0; t.ask_begin == 0 && i < header; i += 64) prefetch(w[n] + t.weights_ahead + i);
        }
        if constexpr (kStream) {
            for (int i = 0; i < header; i += 64) prefetch(asked + i);
            asked += header;
        }
        for (int g = 0; g < groups; ++g) {
            if constexpr (kStream) {
#pragma GCC unroll 8
                for (int i = 0; i < kGroupBytes; i += 64) prefetch(asked + i);
                asked += kGroupBytes;
            } else {
#pragma GCC unroll 2
                for (int n = 0; n < N; ++n)
                    for (int i = t.ask_begin; i < t.ask_end; ++i) prefetch(lines[n] + t.weights_ahead + i * 64);
#pragma GCC unroll 6
                for (int i = 0; i < kBlocks * 32 * M; i += 64) prefetch(a + t.values_ahead + i);
            }
            i32x16 sum[N][M];
            dot_group<kShape.bits, kBlocks, kAsym && kShape.bits == 4, N, M>(lines, a, sums, sum);
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) {
                const f32x16 scale = load_half(w[n] + g / kPerScale * 32);
#pragma GCC unroll 12
                for (int m = 0; m < M; ++m) f[n][m] = fma(to_f32(sum[n][m]), scale, f[n][m]);
            }
            if constexpr (kAsym) {
                f32x16 min_w[N];
#pragma GCC unroll 2
                for (int n = 0; n < N; ++n) min_w[n] = load_half(w[n] + (scales + g / kPerScale) * 32);
#pragma GCC unroll 12
                for (int m = 0; m < M; ++m) {
                    const f32x16 a_sum = bcast(a_sums[m]);
#pragma GCC unroll 2
                    for (int n = 0; n < N; ++n) f[n][m] = fma(min_w[n], a_sum, f[n][m]);
                }
                a_sums += M;
            }
#pragma GCC unroll 2
            for (int n = 0; n < N; ++n) lines[n] += kGroupBytes;
            a += kBlocks * 32 * M;
            sums += M;
        }
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) {
            w[n] = lines[n];
#pragma GCC unroll 12
            for (int m = 0; m < M; ++m) {
                float* c = t.c + m * kPairRows + n * 16;
                store(c, fma(f[n][m], bcast(a_scales[m]), load(c)));
            }
        }
    }
}

template <int kIndex, int M>
void stream_panel(const MatmulTile& t) {
    multiply<kIndex, 1, M, true>(t);
}

template <int kIndex, int M>
void pair(const MatmulTile& t) {
    if constexpr (kPanels == 2) {
        multiply<kIndex, 2, M, false>(t);
    } else {
        MatmulTile panel = t;
        multiply<kIndex, 1, M, false>(panel);
        panel.weights += t.panel_bytes;
        panel.c += kLanes;
        multiply<kIndex, 1, M, false>(panel);
    }
}
