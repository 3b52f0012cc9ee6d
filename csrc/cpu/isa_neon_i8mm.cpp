// SPDX-License-Identifier: Apache-2.0
// Kernels for Armv8.2 with sdot and smmla (FEAT_DotProd, FEAT_I8MM). Compiled with their flags: see isa.hpp for what
// this file must not include.
#include "isa.hpp"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace cnl::cpu {
namespace {
#include "vec_neon.hpp"
// after the vectors
#include "dot_neon_i8mm.hpp"
// after the dot products
#include "kernels.inl"
}  // namespace

constinit const Kernels kNeonI8mmKernels = make_table("neon-i8mm");

}  // namespace cnl::cpu
#endif
