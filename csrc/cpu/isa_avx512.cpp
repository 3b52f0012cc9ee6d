// SPDX-License-Identifier: Apache-2.0
// Kernels for AVX-512 (F, BW, VL, DQ) with VNNI. Compiled with their flags: see isa.hpp for what this file must not
// include.
#include "isa.hpp"

#if defined(__x86_64__)
// GCC 12 warns about its own header: the undefined vectors that unmasked intrinsics pass.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

namespace cnl::cpu {
namespace {
#include "vec_avx512.hpp"
// after the vectors
#include "kernels.inl"
}  // namespace

constinit const Kernels kAvx512Kernels = make_table("avx512");

}  // namespace cnl::cpu
#endif
