// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace cnl::cpu {

/// Bytes per second that `threads` threads read from main memory, each one ascending stream: the limit that decoding is
/// held against. Reads a buffer of `bytes` `rounds` times and returns the median round. Throws std::bad_alloc.
double read_bandwidth(int threads, std::int64_t bytes, int rounds);

}  // namespace cnl::cpu
