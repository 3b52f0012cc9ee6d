// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "../threads.hpp"

namespace cnl::cpu {

/// Bytes per second that `threads` threads read from main memory, each one ascending stream with the loads of the
/// matmul kernels: the limit that decoding is held against. Reads a buffer of `bytes`, in large pages where the system
/// gives them, `rounds` times and returns the median round. Throws std::bad_alloc.
double read_bandwidth(int threads, std::int64_t bytes, int rounds);

/// Seconds that one such reading of [data, data + bytes) takes.
double read_once(ThreadPool& pool, const std::uint8_t* data, std::int64_t bytes);

}  // namespace cnl::cpu
