// SPDX-License-Identifier: Apache-2.0
// What the bindings for tests share: arrays to the device and back.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "context.hpp"

namespace cnl::cuda {

namespace py = pybind11;

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<std::uint8_t, py::array::c_style>;
using Integers = py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>;

inline void require(bool ok, const std::string& message) {
    if (!ok) throw std::invalid_argument(message);
}

template <typename T>
DeviceArray<T> sent(const T* from, std::size_t count) {
    DeviceArray<T> array(count, "a test");
    copy_to_device(array.get(), from, array.bytes(), "a test's input");
    return array;
}
inline DeviceArray<float> sent(const Floats& x) { return sent(x.data(), static_cast<std::size_t>(x.size())); }

template <typename T>
DeviceArray<T> poisoned(std::size_t count) {
    DeviceArray<T> array(count, "a test");
    fill_device_memory(array.get(), 0xff, array.bytes(), "a test's output");
    return array;
}

template <typename T>
py::array_t<T> fetched(const Context& context, const DeviceArray<T>& from, std::vector<py::ssize_t> shape) {
    py::array_t<T> out(std::move(shape));
    context.stream().wait();
    check(cudaMemcpy(out.mutable_data(), from.get(), static_cast<std::size_t>(out.nbytes()), cudaMemcpyDeviceToHost),
          "a test's result");
    return out;
}

/// A context of its own for every call: nothing that one test does reaches the next.
struct Bench {
    Context context{usable_device(), options_from_environment()};
};

inline std::pair<std::int64_t, std::int64_t> shape_of(const Floats& x) {
    require(x.ndim() == 2 && x.shape(0) > 0 && x.shape(1) > 0, "x must be a matrix with values");
    return {x.shape(0), x.shape(1)};
}

/// Sends a step that has nothing but what is given.
inline StepShape send(StepUpload& upload, const Context& context, const std::vector<std::int32_t>& tokens,
                      const std::vector<std::int32_t>& outputs, const std::vector<SequenceRows>& sequences,
                      const float* cos, const float* sin, int tile_tokens = 1) {
    StepUpload::Settings settings;
    settings.tile_tokens = tile_tokens;
    return upload.send({tokens, outputs, sequences, cos, sin}, settings, context.stream());
}

}  // namespace cnl::cuda
