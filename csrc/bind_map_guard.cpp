// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>

#include "map_guard.hpp"

namespace py = pybind11;

namespace {

/// A watched map, itself a buffer: arrays made of it keep the watch, and the map under it, alive.
class MapGuard {
 public:
    explicit MapGuard(const py::buffer& map)
        : buffer_(map.request()),
          begin_(buffer_.ptr),
          size_(buffer_.size * buffer_.itemsize),
          watch_(begin_, bytes()) {}
    MapGuard(std::uintptr_t address, py::ssize_t size)
        : begin_(reinterpret_cast<void*>(address)), size_(size), watch_(begin_, bytes()) {}

    py::buffer_info buffer() const {
        return {begin_, 1, py::format_descriptor<std::uint8_t>::format(), 1, {size_}, {1}, true};
    }
    bool damaged() const { return watch_.damaged(); }

 private:
    std::size_t bytes() const { return static_cast<std::size_t>(size_); }

    py::buffer_info buffer_;  // holds the map open
    void* begin_;
    py::ssize_t size_;
    cnl::map_guard::Watch watch_;  // the first to go
};

}  // namespace

void bind_map_guard(py::module_& module) {
    py::class_<MapGuard>(module, "MapGuard", py::buffer_protocol())
        .def(py::init<const py::buffer&>(), py::arg("map"))
        .def_buffer(&MapGuard::buffer)
        .def_property_readonly("damaged", &MapGuard::damaged);
    module.def(
        "guard_memory",
        [](std::uintptr_t address, py::ssize_t size) { return std::make_unique<MapGuard>(address, size); },
        py::arg("address"), py::arg("size"));
}
