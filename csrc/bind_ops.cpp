// SPDX-License-Identifier: Apache-2.0
// Bindings of the layout, the weight quantizer and the choice of instruction set.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/cpu_info.hpp"
#include "cpu/quantize.hpp"
#include "kv_cache.hpp"
#include "layout.hpp"
#include "threads.hpp"

namespace py = pybind11;

void bind_kernels(py::module_& module);

namespace {

using namespace cnl;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<std::uint8_t, py::array::c_style>;

const layout::Scheme& scheme_of(const std::string& name) {
    if (const layout::Scheme* scheme = layout::find_scheme(name)) return *scheme;
    std::string known;
    for (const layout::Scheme& scheme : layout::kSchemes)
        known += (known.empty() ? "" : ", ") + std::string(scheme.name);
    throw std::invalid_argument("unknown weight scheme '" + name + "'; there are: " + known);
}

/// Sizes whose packed form is certain to fit 63 bits.
void check_sizes(std::int64_t rows, std::int64_t cols) {
    constexpr std::int64_t kLargest = std::int64_t{1} << 30;
    if (rows < 1 || cols < 1 || rows > kLargest || cols > kLargest)
        throw std::invalid_argument("a matrix must have 1 to 2^30 rows and columns, not " + std::to_string(rows) +
                                    " x " + std::to_string(cols));
}

int thread_count(int threads) {
    if (threads < 0) throw std::invalid_argument("threads must be 0 (default) or more, not " + std::to_string(threads));
    return threads == 0 ? cpu::default_threads() : threads;
}

py::dict schemes() {
    py::dict all;
    for (const layout::Scheme& scheme : layout::kSchemes) {
        py::dict entry;
        entry["bits"] = scheme.bits;
        entry["group"] = scheme.group;
        entry["asymmetric"] = scheme.asymmetric;
        entry["bits_per_weight"] = static_cast<double>(layout::superblock_bytes(scheme, layout::kSuperblock)) * 8 /
                                   static_cast<double>(layout::kSuperblock * layout::kPanelRows);
        all[py::str(std::string(scheme.name))] = entry;
    }
    return all;
}

std::int64_t packed_bytes(const std::string& scheme, std::int64_t rows, std::int64_t cols) {
    check_sizes(rows, cols);
    return layout::packed_bytes(scheme_of(scheme), rows, cols);
}

py::tuple quantize(const Floats& weight, const std::string& name, int threads) {
    if (weight.ndim() != 2)
        throw std::invalid_argument("weight must have 2 dimensions, not " + std::to_string(weight.ndim()));
    const layout::Scheme& scheme = scheme_of(name);
    const std::int64_t rows = weight.shape(0), cols = weight.shape(1);
    check_sizes(rows, cols);
    const std::int64_t panels = layout::padded_rows(rows) / layout::kPanelRows;
    py::array_t<std::uint8_t> packed({panels, layout::panel_bytes(scheme, cols)});
    const float* source = weight.data();
    std::uint8_t* target = packed.mutable_data();
    const int count = thread_count(threads);
    QuantizeError error;
    {
        const py::gil_scoped_release released;
        ThreadPool pool(count);
        pool.run([&](Team& team) {
            const QuantizeError result = quantize_weights(team, source, rows, cols, scheme, target);
            if (team.index() == 0) error = result;
        });
    }
    return py::make_tuple(packed, error.squared_error, error.squares);
}

py::array_t<float> dequantize(const Bytes& packed, const std::string& name, std::int64_t rows, std::int64_t cols,
                              std::int64_t row_begin, std::int64_t row_end) {
    const layout::Scheme& scheme = scheme_of(name);
    check_sizes(rows, cols);
    const std::int64_t expected = layout::packed_bytes(scheme, rows, cols);
    if (packed.size() != expected)
        throw std::invalid_argument("a " + name + " matrix of " + std::to_string(rows) + " x " + std::to_string(cols) +
                                    " has " + std::to_string(expected) + " bytes, not " +
                                    std::to_string(packed.size()));
    if (row_end < 0) row_end = rows;
    if (row_begin < 0 || row_begin > row_end || row_end > rows)
        throw std::invalid_argument("rows " + std::to_string(row_begin) + " to " + std::to_string(row_end) +
                                    " are not inside 0 to " + std::to_string(rows));
    py::array_t<float> out({row_end - row_begin, cols});
    float* target = out.mutable_data();
    const std::uint8_t* source = packed.data();
    const py::gil_scoped_release released;
    for (std::int64_t row = row_begin; row < row_end; ++row, target += cols)
        dequantize_row(scheme, source, cols, row, target);
    return out;
}

py::dict cpu_info() {
    const cpu::CpuInfo info = cpu::cpu_info();
    py::dict out;
    out["model"] = info.model;
    out["isa"] = std::string(cpu::kernels().name);
    out["isas"] = cpu::supported_isas();
    out["physical_cores"] = info.physical_cores;
    out["affinity"] = info.affinity;
    out["cgroup_quota"] = info.cgroup_quota ? py::object(py::float_(*info.cgroup_quota)) : py::none();
    out["default_threads"] = info.default_threads;
    return out;
}

/// CNLLAMA_ISA forces a table; a name this machine lacks ends the import with a sentence.
void choose_isa() {
    const char* forced = std::getenv("CNLLAMA_ISA");
    if (forced == nullptr || *forced == '\0') return;
    try {
        cpu::use_isa(forced);
    } catch (const std::invalid_argument& error) {
        throw py::import_error(std::string("CNLLAMA_ISA: ") + error.what());
    }
}

}  // namespace

void bind_ops(py::module_& module) {
    choose_isa();
    module.attr("PAGE_SIZE") = KvLayout::kPage;
    module.def("schemes", &schemes);
    module.def("packed_bytes", &packed_bytes, py::arg("scheme"), py::arg("rows"), py::arg("cols"));
    module.def("padded_rows", &layout::padded_rows, py::arg("rows"));
    module.def("quantize", &quantize, py::arg("weight"), py::arg("scheme"), py::arg("threads") = 0);
    module.def("dequantize", &dequantize, py::arg("packed"), py::arg("scheme"), py::arg("rows"), py::arg("cols"),
               py::arg("row_begin") = 0, py::arg("row_end") = -1);
    module.def("isa", [] { return std::string(cpu::kernels().name); });
    module.def("isas", &cpu::supported_isas);
    module.def("use_isa", [](const std::string& name) { cpu::use_isa(name); }, py::arg("name"));
    module.def("cpu_info", &cpu_info);
    bind_kernels(module);
}
