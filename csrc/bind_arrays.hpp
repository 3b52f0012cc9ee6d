// SPDX-License-Identifier: Apache-2.0
// What the bindings for tests share: arrays and their checks, and the choice of kernels.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/activations.hpp"
#include "cpu/cpu_info.hpp"

namespace cnl::bind {

using Floats = pybind11::array_t<float, pybind11::array::c_style | pybind11::array::forcecast>;
using Bytes = pybind11::array_t<std::uint8_t, pybind11::array::c_style>;
using Integers = pybind11::array_t<std::int32_t, pybind11::array::c_style | pybind11::array::forcecast>;

inline void require(bool ok, const std::string& message) {
    if (!ok) throw std::invalid_argument(message);
}

inline std::pair<std::int64_t, std::int64_t> matrix_shape(const Floats& x, const char* name) {
    require(x.ndim() == 2 && x.shape(0) > 0 && x.shape(1) > 0, std::string(name) + " must be a matrix with values");
    return {x.shape(0), x.shape(1)};
}

/// The instruction set of one call. These bindings keep the GIL, so no two calls are inside at once.
class IsaScope {
 public:
    explicit IsaScope(const std::string& name) : before_(cpu::kernels().name) {
        if (!name.empty()) cpu::use_isa(name);
    }
    ~IsaScope() { cpu::use_isa(before_); }
    IsaScope(const IsaScope&) = delete;
    IsaScope& operator=(const IsaScope&) = delete;

 private:
    std::string before_;
};

/// Activations back in rows: (int8 [m, cols], float [m, spans], int32 [m, ceil(cols / 32)] sums, [m, ceil(cols / 64)]).
pybind11::tuple activation_rows(const ActivationData& data);

}  // namespace cnl::bind
