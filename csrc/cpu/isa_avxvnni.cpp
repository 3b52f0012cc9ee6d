// SPDX-License-Identifier: Apache-2.0
// Kernels for AVX2, FMA and F16C with AVX-VNNI. Compiled with their flags: see isa.hpp for what this file must not
// include.
#include "isa.hpp"

#if defined(__x86_64__) && defined(__AVXVNNI__)
#include <immintrin.h>

namespace cnl::cpu {
namespace {
#include "vec_avx2.hpp"
// after the vectors
#include "kernels.inl"
}  // namespace

constinit const Kernels kAvxVnniKernels = make_table("avxvnni");

}  // namespace cnl::cpu
#endif
