// SPDX-License-Identifier: Apache-2.0
// Kernels in plain C++: any machine, and what the others are compared with.
#include "half.hpp"
#include "isa.hpp"

namespace cnl::cpu {
namespace {
#include "vec_scalar.hpp"
// after the vectors
#include "kernels.inl"
}  // namespace

constinit const Kernels kScalarKernels = make_table("scalar");

}  // namespace cnl::cpu
