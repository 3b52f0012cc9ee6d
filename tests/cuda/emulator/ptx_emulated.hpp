// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/cuda/ptx.cuh on the CPU. Fragment maps are those of the PTX manual, written from it and not
// from tile.hpp, so that the two check each other.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>
#include <cstring>

#include "../../../csrc/cpu/half.hpp"

#define CNL_SHARED_MEMORY(name) unsigned char* name = ::emulator::shared_memory()

namespace emulator {

constexpr int kLanes = 32;
/// Gives every lane what all lanes of its warp brought: [32] of `bytes` <= 64 bytes, until the warp's next exchange.
const unsigned char* exchange(const void* own, std::size_t bytes);
int lane();
void queue_copy(void* to, const void* from);
void commit();
void wait(int left);

}  // namespace emulator

namespace cnl::cuda {

inline uint4 load_stream(const void* p) { return *static_cast<const uint4*>(p); }
template <typename T>
void load_stream_if(bool wanted, const void* p, T& v) {
    if (wanted) v = *static_cast<const T*>(p);
}
inline float as_float(std::int32_t bits) { return std::bit_cast<float>(bits); }
inline std::int32_t as_int(float x) { return std::bit_cast<std::int32_t>(x); }
inline float half_to_float(std::uint16_t bits) { return cpu::half_to_float(bits); }
inline std::uint16_t float_to_half(float x) { return cpu::float_to_half(x); }

template <typename T>
T value_of(const unsigned char* all, int lane) {
    T value;
    std::memcpy(&value, all + static_cast<std::size_t>(lane) * 64, sizeof value);
    return value;
}

struct Operands {
    std::uint32_t a[4], b[2];
};

/// m16n8k32: row r of A lies in lanes 4 (r % 8) + .., registers r / 8 (columns 0-15) and 2 + r / 8 (16-31); column n of
/// B in lanes 4 n + .., registers 0 and 1 in the same way; C: rows g, g + 8, columns 2t, 2t + 1.
inline void mma_u8s8(std::int32_t (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                     const std::int32_t (&c)[4]) {
    const Operands own{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const unsigned char* all = emulator::exchange(&own, sizeof own);
    const int g = emulator::lane() / 4, t = emulator::lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, col = 2 * t + i % 2;
        std::uint32_t sum = static_cast<std::uint32_t>(c[i]);
        for (int k = 0; k < 32; ++k) {
            const auto from_a = value_of<Operands>(all, 4 * (row % 8) + k % 16 / 4);
            const auto from_b = value_of<Operands>(all, 4 * col + k % 16 / 4);
            const int q = static_cast<int>(from_a.a[row / 8 + k / 16 * 2] >> 8 * (k % 4) & 255u);
            const int x = static_cast<std::int8_t>(from_b.b[k / 16] >> 8 * (k % 4) & 255u);
            sum += static_cast<std::uint32_t>(q * x);
        }
        d[i] = static_cast<std::int32_t>(sum);
    }
}

inline std::int32_t dot4(std::uint32_t a, std::uint32_t b, std::int32_t sum) {
    for (int i = 0; i < 4; ++i)
        sum += static_cast<int>(a >> 8 * i & 255u) * static_cast<std::int8_t>(b >> 8 * i & 255u);
    return sum;
}
inline std::uint32_t permute_bytes(std::uint32_t x, std::uint32_t order) {
    std::uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= (x >> 8 * (order >> 4 * i & 3u) & 255u) << 8 * i;
    return out;
}
template <typename T>
T shuffle_xor(T x, int mask) {
    return value_of<T>(emulator::exchange(&x, sizeof x), emulator::lane() ^ mask);
}
inline void sync_warp() {
    const char nothing = 0;
    emulator::exchange(&nothing, 1);
}
inline std::uint32_t arrive(std::uint32_t* counter) { return (*counter)++; }
inline float load_published(const float* p) { return *p; }
inline void copy_async(void* shared, const void* global) { emulator::queue_copy(shared, global); }
inline void commit_copies() { emulator::commit(); }
template <int kLeft>
void wait_copies() {
    emulator::wait(kLeft);
}
inline void wait_for_previous() {}

}  // namespace cnl::cuda
