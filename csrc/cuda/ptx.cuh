// SPDX-License-Identifier: Apache-2.0
// The instructions that C++ has no words for, one short function each. The host emulation of the tests provides the
// same names (tests/cuda/emulator).
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CNL_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

namespace cnl::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

/// 16 bytes that are read once: past the first cache. Only for weights, which no kernel writes.
__device__ __forceinline__ uint4 load_stream(const void* p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p));
    return v;
}
/// The same into `v` if `wanted`; else v stays. A predicate in the instruction: no branch, no copy.
__device__ __forceinline__ void load_stream_if(bool wanted, const void* p, uint4& v) {
    asm("{.reg .pred q; setp.ne.s32 q, %5, 0; @q ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
        : "l"(p), "r"(static_cast<int>(wanted)));
}
/// The same for 8 and 4 bytes that several lanes share.
__device__ __forceinline__ void load_stream_if(bool wanted, const void* p, uint2& v) {
    asm("{.reg .pred q; setp.ne.s32 q, %3, 0; @q ld.global.nc.v2.u32 {%0, %1}, [%2];}"
        : "+r"(v.x), "+r"(v.y)
        : "l"(p), "r"(static_cast<int>(wanted)));
}
__device__ __forceinline__ void load_stream_if(bool wanted, const void* p, std::uint32_t& v) {
    asm("{.reg .pred q; setp.ne.s32 q, %2, 0; @q ld.global.nc.u32 %0, [%1];}"
        : "+r"(v)
        : "l"(p), "r"(static_cast<int>(wanted)));
}

/// d = A B + c for A u8 [16, 32], B s8 [32, 8], exact.
__device__ __forceinline__ void mma_u8s8(std::int32_t (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                         std::uint32_t b1, const std::int32_t (&c)[4]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else
    // Turing has the quarter of it: rows g or g + 8, the first or the last 16 columns.
    std::int32_t half[4];
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
        : "=r"(half[0]), "=r"(half[1])
        : "r"(a[0]), "r"(b0), "r"(c[0]), "r"(c[1]));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
        : "=r"(half[2]), "=r"(half[3])
        : "r"(a[1]), "r"(b0), "r"(c[2]), "r"(c[3]));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
        : "=r"(d[0]), "=r"(d[1])
        : "r"(a[2]), "r"(b1), "r"(half[0]), "r"(half[1]));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%4, %5};"
        : "=r"(d[2]), "=r"(d[3])
        : "r"(a[3]), "r"(b1), "r"(half[2]), "r"(half[3]));
#endif
}

/// sum + four products of u8 and s8.
__device__ __forceinline__ std::int32_t dot4(std::uint32_t a, std::uint32_t b, std::int32_t sum) {
    std::int32_t d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(sum));
    return d;
}

__device__ __forceinline__ std::uint32_t permute_bytes(std::uint32_t x, std::uint32_t order) {
    return __byte_perm(x, 0, order);
}
__device__ __forceinline__ float as_float(std::int32_t bits) { return __int_as_float(bits); }
__device__ __forceinline__ std::int32_t as_int(float x) { return __float_as_int(x); }
__device__ __forceinline__ float half_to_float(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ std::uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }

__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(kAllLanes, x, mask); }
__device__ __forceinline__ std::int32_t shuffle_xor(std::int32_t x, int mask) {
    return __shfl_xor_sync(kAllLanes, x, mask);
}

/// What the warp's lanes wrote to shared memory before is readable to all of them.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
/// Counts an arrival; the number before it. What this block wrote to global memory is visible to whoever counts later.
__device__ __forceinline__ std::uint32_t arrive(std::uint32_t* counter) {
    __threadfence();
    const std::uint32_t before = atomicAdd(counter, 1u);
    __threadfence();
    return before;
}
/// Reads what another block of this launch wrote and announced with arrive().
__device__ __forceinline__ float load_published(const float* p) { return __ldcg(p); }

/// Copies 16 bytes to shared memory behind the program's back; done when wait_copies says so.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/// All but the last `kLeft` committed groups of this thread have arrived.
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

/// The kernels before this one have ended and what they wrote is visible. Every kernel calls it before it reads what
/// another one wrote and before it writes anything; every thread does, so that the end of a kernel implies the end of
/// those before it. It also lets the next kernel start up to its own wait.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace cnl::cuda

#else
#include "ptx_emulated.hpp"
#endif
