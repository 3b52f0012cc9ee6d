// SPDX-License-Identifier: Apache-2.0
// A lane's part of a weight tile, and the multiplication of a tile by a block of 8 tokens.
//
// The order of float operations is the CPU's (csrc/cpu/kernels_matmul.inl), so the results have the same bits:
//
//   f = fma((float) sum (q - zero) a, scale_w, f)  [f = fma(min_w, sum a, f)]     for every group of a superblock
//   c = fma(f, scale_a, c)                                                        for every superblock
//
// The sum is exact. Accumulators start at the bits of 1.5 * 2^23 (minus zero * sum a): what mma adds as an integer is
// then the fraction of a float, and one subtraction replaces the conversion, of which the hardware does few.
#pragma once

#include "kernels.hpp"
#include "ptx.cuh"

namespace cnl::cuda {

inline constexpr std::int32_t kMagicBits = 0x4b400000;
inline constexpr float kMagic = 12582912.0f;

/// What a lane holds of a tile: its 16-byte pieces and the parameters of rows g and g + 8.
template <int kScheme>
struct TileRegisters {
    using S = SchemeOf<kScheme>;
    uint4 values[S::kLoads];
    uint2 params;

    __device__ __forceinline__ void load_if(bool wanted, const std::uint8_t* tile, const std::uint8_t* own_params) {
#pragma unroll
        for (int i = 0; i < S::kLoads; ++i) load_stream_if(wanted, tile + i * 512, values[i]);
        if constexpr (S::kParams == 2)
            load_stream_if(wanted, own_params, params);
        else
            load_stream_if(wanted, own_params, params.x);
    }
    /// Registers of A for columns 32 half .. 32 half + 31.
    __device__ __forceinline__ void fragment(int half, std::uint32_t (&a)[4]) const {
        if constexpr (S::kBits == 4) {
            const std::uint32_t w0 = half ? values[0].z : values[0].x, w1 = half ? values[0].w : values[0].y;
            a[0] = w0 & 0x0f0f0f0fu;
            a[1] = w0 >> 4 & 0x0f0f0f0fu;
            a[2] = w1 & 0x0f0f0f0fu;
            a[3] = w1 >> 4 & 0x0f0f0f0fu;
        } else {
            const uint4& v = values[half];
            a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
        }
    }
    /// The parameter `i` (of kParams) of row g (high 0) or g + 8 (high 1).
    __device__ __forceinline__ float param(int high, int i) const {
        const int index = high * S::kParams + i;
        const std::uint32_t word = index / 2 ? params.y : params.x;
        return half_to_float(static_cast<std::uint16_t>(index % 2 ? word >> 16 : word & 0xffffu));
    }
};

/// Where a lane reads a row tile, from some superblock on.
template <int kScheme>
struct TileStream {
    using S = SchemeOf<kScheme>;
    const std::uint8_t *values, *params;

    __device__ __forceinline__ TileStream(const Tiles& w, int row_tile, int tiles, int lane, int super) {
        const std::int64_t first = static_cast<std::int64_t>(row_tile) * tiles + super * kSpanTiles;
        values = w.data + first * S::kTileBytes + lane * 16;
        params = w.data + static_cast<std::int64_t>(w.pairs()) * 2 * tiles * S::kTileBytes + first * S::kParamBytes +
                 lane / 4 * (4 * S::kParams);
    }
    /// Tile `i`, counted from the present superblock's first.
    __device__ __forceinline__ void load_if(bool wanted, int i, TileRegisters<kScheme>& r) const {
        r.load_if(wanted, values + i * S::kTileBytes, params + i * S::kParamBytes);
    }
    __device__ __forceinline__ void advance(int supers) {
        values += supers * kSpanTiles * S::kTileBytes;
        params += supers * kSpanTiles * S::kParamBytes;
    }
};

/// Decoded once, used for every block of tokens.
template <int kScheme>
struct TileOperands {
    using S = SchemeOf<kScheme>;
    std::uint32_t a[2][4];
    float param[2][S::kParams];

    __device__ __forceinline__ explicit TileOperands(const TileRegisters<kScheme>& r) {
        r.fragment(0, a[0]);
        r.fragment(1, a[1]);
        for (int high = 0; high < 2; ++high)
            for (int i = 0; i < S::kParams; ++i) param[high][i] = r.param(high, i);
    }
    /// f[row g: tokens 2t, 2t + 1; row g + 8: the same] += tile * 8 tokens. x: the lane's 16 bytes of token g. sums:
    /// the [4][8] sums of the block's tile, at token 2t.
    __device__ __forceinline__ void multiply(const uint4& x, const std::int32_t* sums, float (&f)[4]) const {
        if constexpr (S::kGroup == 64) {
            std::int32_t c[4], first[4], both[4];
            start(sums + 2 * kTokenBlock, c);
            mma_u8s8(first, a[0], x.x, x.y, c);
            mma_u8s8(both, a[1], x.z, x.w, first);
            fold(both, param[0][0], param[1][0], f);
            if constexpr (S::kAsymmetric) {
                const float2 sum = *reinterpret_cast<const float2*>(sums + 3 * kTokenBlock);
                f[0] = fmaf(param[0][1], sum.x, f[0]);
                f[1] = fmaf(param[0][1], sum.y, f[1]);
                f[2] = fmaf(param[1][1], sum.x, f[2]);
                f[3] = fmaf(param[1][1], sum.y, f[3]);
            }
        } else {
            std::int32_t c[2][4], first[4], second[4];
            start(sums, c[0]);
            start(sums + kTokenBlock, c[1]);
            mma_u8s8(first, a[0], x.x, x.y, c[0]);
            mma_u8s8(second, a[1], x.z, x.w, c[1]);
            fold(first, param[0][0], param[1][0], f);
            fold(second, param[0][S::kParams - 1], param[1][S::kParams - 1], f);
        }
    }

 private:
    static __device__ __forceinline__ void start(const std::int32_t* sums, std::int32_t (&c)[4]) {
        int2 sum = make_int2(0, 0);
        if constexpr (S::kZero != 0) sum = *reinterpret_cast<const int2*>(sums);
        c[0] = c[2] = kMagicBits - S::kZero * sum.x;
        c[1] = c[3] = kMagicBits - S::kZero * sum.y;
    }
    static __device__ __forceinline__ void fold(const std::int32_t (&c)[4], float low, float high, float (&f)[4]) {
        f[0] = fmaf(as_float(c[0]) - kMagic, low, f[0]);
        f[1] = fmaf(as_float(c[1]) - kMagic, low, f[1]);
        f[2] = fmaf(as_float(c[2]) - kMagic, high, f[2]);
        f[3] = fmaf(as_float(c[3]) - kMagic, high, f[3]);
    }
};

/// The same for one token without tensor cores: f of rows g and g + 8, equal in the four lanes of a row.
template <int kScheme>
__device__ __forceinline__ void multiply_dp4a(const TileRegisters<kScheme>& r, const uint4& x, const std::int32_t* sums,
                                              float (&f)[4]) {
    using S = SchemeOf<kScheme>;
    const std::uint32_t words[4] = {x.x, x.y, x.z, x.w};
    std::int32_t dot[2][2];  // [half][row g, row g + 8]
    for (int half = 0; half < 2; ++half) {
        std::uint32_t a[4];
        r.fragment(half, a);
        for (int high = 0; high < 2; ++high)
            dot[half][high] = dot4(a[2 + high], words[2 * half + 1], dot4(a[high], words[2 * half], 0));
    }
    for (int high = 0; high < 2; ++high) {
        if constexpr (S::kGroup == 64) {
            std::int32_t sum = dot[0][high] + dot[1][high];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            const std::int32_t all = sums[2 * kTokenBlock];
            f[2 * high] = fmaf(static_cast<float>(sum - S::kZero * all), r.param(high, 0), f[2 * high]);
            if constexpr (S::kAsymmetric) f[2 * high] = fmaf(r.param(high, 1), static_cast<float>(all), f[2 * high]);
        } else {
            for (int half = 0; half < 2; ++half) {
                std::int32_t sum = dot[half][high];
                sum += shuffle_xor(sum, 1);
                sum += shuffle_xor(sum, 2);
                f[2 * high] = fmaf(static_cast<float>(sum - S::kZero * sums[half * kTokenBlock]), r.param(high, half),
                                   f[2 * high]);
            }
        }
    }
}

/// exp(x) with the operations of csrc/cpu/kernels_float.inl.
__device__ __forceinline__ float exp_f32(float x) {
    constexpr float kLowest = -87.33f;
    float y = kLowest > x ? kLowest : x;
    y = 88.37f < y ? 88.37f : y;
    const float n = y * 1.44269504f + kMagic - kMagic;
    float r = fmaf(n, -0.693145752f, y);
    r = fmaf(n, -1.42860677e-6f, r);
    float p = 1.98412698e-4f;
    p = fmaf(p, r, 1.38888889e-3f);
    p = fmaf(p, r, 8.33333333e-3f);
    p = fmaf(p, r, 4.16666667e-2f);
    p = fmaf(p, r, 1.66666667e-1f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    const int e = n >= -126.0f && n <= 127.0f ? static_cast<int>(n) : 0;
    return x < kLowest ? 0.0f : p * as_float((e + 127) << 23);
}

/// Writes one result. The branch is the same for all threads of a launch.
__device__ __forceinline__ void finish(const Product& p, Epilogue epilogue, int token, int row, float sum, float up) {
    float* out = p.out + static_cast<std::int64_t>(token) * p.stride + row;
    if (p.bias) sum = sum + p.bias[row];
    if (epilogue == Epilogue::add) {
        *out = *out + sum;
        return;
    }
    if (epilogue == Epilogue::swiglu) {
        if (p.up_bias) up = up + p.up_bias[row];
        sum = sum / (1.0f + exp_f32(0.0f - sum)) * up;
    }
    *out = sum;
}

}  // namespace cnl::cuda
