// SPDX-License-Identifier: Apache-2.0
// Kernels for Armv8.2 with sdot (FEAT_DotProd). Compiled with its flags: see isa.hpp for what this file must not
// include.
#include "isa.hpp"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace cnl::cpu {
namespace {
#include "vec_neon.hpp"
// after the vectors
#include "dot_neon.hpp"
// after the dot products
#include "kernels.inl"
}  // namespace

constinit const Kernels kNeonDotprodKernels = make_table("neon-dotprod");

}  // namespace cnl::cpu
#endif
