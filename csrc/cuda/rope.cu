// SPDX-License-Identifier: Apache-2.0
// Rotary positions and the write into the cache, with the operations of csrc/cpu/kernels_float.inl.
#include "kernels.hpp"
#include "ptx.cuh"

namespace cnl::cuda {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ void rotate(float* x, const float* cos, const float* sin, int half) {
    for (int j = static_cast<int>(threadIdx.x); j < half; j += kThreads) {
        const float a = x[j], b = x[half + j], c = cos[j], s = sin[j];
        x[j] = fmaf(a, c, (0.0f - b) * s);
        x[half + j] = fmaf(b, c, a * s);
    }
}

/// Where element j of a position lies in K: 16 bytes of a position together, 64 positions side by side.
template <int kBytes>
__device__ __forceinline__ std::int64_t key_offset(int slot, int j) {
    constexpr int kEach = 16 / kBytes;
    return (static_cast<std::int64_t>(j / kEach) * KvLayout::kPage + slot) * 16 + j % kEach * kBytes;
}
template <int kBytes>
__device__ __forceinline__ std::int64_t value_offset(int slot, int j, int padded) {
    return (static_cast<std::int64_t>(slot) * padded + j) * kBytes;
}

/// A warp writes one vector as int8 with its scale.
template <typename Offset>
__device__ __forceinline__ void store_int8(const float* x, int d, int padded, std::uint8_t* to, std::uint16_t* scale,
                                           Offset offset) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    float largest = 0.0f, poison = 0.0f;
    for (int j = lane; j < d; j += kWarp) {
        const float a = fabsf(x[j]);
        largest = largest > a ? largest : a;
        poison = fmaf(x[j], 0.0f, poison);
    }
    for (int mask = 16; mask > 0; mask /= 2) {
        const float other = shuffle_xor(largest, mask);
        largest = largest > other ? largest : other;
        poison = poison + shuffle_xor(poison, mask);
    }
    const float rounded = half_to_float(float_to_half(largest / 127.0f));
    const float inverse = rounded > 0.0f ? 1.0f / rounded : 0.0f;
    if (lane == 0) *scale = float_to_half(rounded + poison);
    for (int j = lane; j < padded; j += kWarp) {
        float v = (j < d ? x[j] : 0.0f) * inverse;
        v = v < 127.0f ? v : 127.0f;
        v = v > -127.0f ? v : -127.0f;
        to[offset(j)] = static_cast<std::uint8_t>(__float2int_rn(v));
    }
}

/// A block: one row and kv head, with the query heads of its group.
__global__ void __launch_bounds__(kThreads)
    rope_kernel(StepRows step, float* q, float* k, const float* v, int heads, Cache cache) {
    wait_for_previous();
    const std::int64_t row = blockIdx.x;
    const int kv_head = static_cast<int>(blockIdx.y), d = cache.head_dim, half = d / 2, padded = cache.padded_dim;
    const Row& at = step.at(row);
    if (at.position < 0) return;
    const int group = heads / cache.kv_heads, warp = static_cast<int>(threadIdx.x) / kWarp;
    const float *cos = step.cos(row), *sin = cos + half;
    for (int h = 0; h < group; ++h) rotate(q + (row * heads + kv_head * group + h) * d, cos, sin, half);
    float* key = k + (row * cache.kv_heads + kv_head) * d;
    const float* value = v + (row * cache.kv_heads + kv_head) * d;
    rotate(key, cos, sin, half);
    __syncthreads();

    const int slot = at.position % KvLayout::kPage;
    const std::int64_t page = step.tables[at.table + at.position / KvLayout::kPage];
    std::uint8_t* slab = cache.base + page * cache.page_stride + kv_head * cache.slab_stride;
    if (cache.int8) {
        auto* scales = reinterpret_cast<std::uint16_t*>(slab + cache.k_scale_offset);
        if (warp == 0) store_int8(key, d, padded, slab, scales + slot, [&](int j) { return key_offset<1>(slot, j); });
        if (warp == 1)
            store_int8(value, d, padded, slab + cache.v_offset,
                       reinterpret_cast<std::uint16_t*>(slab + cache.v_scale_offset) + slot,
                       [&](int j) { return value_offset<1>(slot, j, padded); });
        return;
    }
    for (int j = static_cast<int>(threadIdx.x); j < padded; j += kThreads) {
        *reinterpret_cast<std::uint16_t*>(slab + key_offset<2>(slot, j)) = float_to_half(j < d ? key[j] : 0.0f);
        *reinterpret_cast<std::uint16_t*>(slab + cache.v_offset + value_offset<2>(slot, j, padded)) =
            float_to_half(j < d ? value[j] : 0.0f);
    }
}

}  // namespace

void rope_append(const Queue& queue, const StepRows& step, int rows, float* q, float* k, const float* v, int heads,
                 const Cache& cache) {
    launch(queue, "rope_append", rope_kernel,
           {dim3(static_cast<unsigned>(rows), static_cast<unsigned>(cache.kv_heads)), dim3(kThreads)}, step, q, k, v,
           heads, cache);
}

}  // namespace cnl::cuda
