// SPDX-License-Identifier: Apache-2.0
// Bindings of the packed layout and of the weight quantizer.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>

#include "bind_arrays.hpp"
#include "cpu/cpu_info.hpp"
#include "cpu/quantize.hpp"
#include "layout.hpp"
#include "threads.hpp"

namespace py = pybind11;

namespace {

using namespace cnl;
using namespace cnl::bind;

const layout::Scheme& scheme_of(const std::string& name) {
    if (const layout::Scheme* scheme = layout::find_scheme(name)) return *scheme;
    std::string known;
    for (const layout::Scheme& scheme : layout::kSchemes)
        known += (known.empty() ? "" : ", ") + std::string(scheme.name);
    throw std::invalid_argument("unknown weight scheme '" + name + "'; there are: " + known);
}

std::string size_text(std::int64_t rows, std::int64_t cols) {
    return std::to_string(rows) + " x " + std::to_string(cols);
}

/// Sizes whose packed form is certain to fit 63 bits.
void check_sizes(std::int64_t rows, std::int64_t cols) {
    constexpr std::int64_t kLargest = std::int64_t{1} << 30;
    require(rows >= 1 && cols >= 1 && rows <= kLargest && cols <= kLargest,
            "a matrix must have 1 to 2^30 rows and columns, not " + size_text(rows, cols));
}

void check_packed(const Bytes& packed, const layout::Scheme& scheme, std::int64_t rows, std::int64_t cols) {
    check_sizes(rows, cols);
    const std::int64_t expected = layout::packed_bytes(scheme, rows, cols);
    require(packed.size() == expected, "a " + std::string(scheme.name) + " matrix of " + size_text(rows, cols) +
                                           " has " + std::to_string(expected) + " bytes, not " +
                                           std::to_string(packed.size()));
}

/// Runs `job` on a pool of `threads` (0: the default), without the GIL.
void run_team(int threads, const std::function<void(Team&)>& job) {
    require(threads >= 0, "threads must be 0 (default) or more, not " + std::to_string(threads));
    const int count = threads == 0 ? cpu::default_threads() : threads;
    const py::gil_scoped_release released;
    ThreadPool pool(count);
    pool.run(job);
}

/// The size of a two-dimensional array.
struct Shape {
    std::int64_t rows, cols;
    Shape(const py::array& x, const char* name) {
        require(x.ndim() == 2, std::string(name) + " must have 2 dimensions, not " + std::to_string(x.ndim()));
        rows = x.shape(0);
        cols = x.shape(1);
        check_sizes(rows, cols);
    }
};

const float* checked_importance(const std::optional<Floats>& importance, std::int64_t cols) {
    if (!importance) return nullptr;
    require(importance->ndim() == 1 && importance->size() == cols,
            "importance must have one value for each of " + std::to_string(cols) + " columns");
    for (std::int64_t k = 0; k < cols; ++k) {
        const float value = importance->data()[k];
        if (!std::isfinite(value) || value < 0.0f)
            throw std::invalid_argument("importance is " + std::to_string(value) + " at column " + std::to_string(k) +
                                        "; only finite numbers of 0 or more weigh errors");
    }
    return importance->data();
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

py::array_t<std::uint8_t> new_panels(const layout::Scheme& scheme, std::int64_t rows, std::int64_t cols) {
    return py::array_t<std::uint8_t>(
        {layout::padded_rows(rows) / layout::kPanelRows, layout::panel_bytes(scheme, cols)});
}

py::tuple quantize(const Floats& weight, const std::string& name, int threads,
                   const std::optional<Floats>& importance) {
    const layout::Scheme& scheme = scheme_of(name);
    const Shape shape(weight, "weight");
    const float *source = weight.data(), *weights = checked_importance(importance, shape.cols);
    py::array_t<std::uint8_t> packed = new_panels(scheme, shape.rows, shape.cols);
    std::uint8_t* target = packed.mutable_data();
    QuantizeError error;
    run_team(threads, [&](Team& team) {
        const QuantizeError result = quantize_weights(team, source, shape.rows, shape.cols, scheme, weights, target);
        if (team.index() == 0) error = result;
    });
    return py::make_tuple(packed, error.squared_error, error.squares);
}

py::array_t<float> dequantize(const Bytes& packed, const std::string& name, std::int64_t rows, std::int64_t cols,
                              std::int64_t row_begin, std::int64_t row_end) {
    const layout::Scheme& scheme = scheme_of(name);
    check_packed(packed, scheme, rows, cols);
    if (row_end < 0) row_end = rows;
    require(row_begin >= 0 && row_begin <= row_end && row_end <= rows,
            "rows " + std::to_string(row_begin) + " to " + std::to_string(row_end) + " are not inside 0 to " +
                std::to_string(rows));
    py::array_t<float> out({row_end - row_begin, cols});
    float* target = out.mutable_data();
    const std::uint8_t* source = packed.data();
    const py::gil_scoped_release released;
    for (std::int64_t row = row_begin; row < row_end; ++row, target += cols)
        dequantize_row(scheme, source, cols, row, target);
    return out;
}

// ---- halves: pybind11 knows no float16 type

py::array new_halves(std::int64_t rows, std::int64_t cols) {
    py::array out(py::dtype("float16"), {rows, cols});
    std::memset(out.mutable_data(), 0, static_cast<std::size_t>(out.nbytes()));
    return out;
}
std::uint16_t* halves_of(py::array& x) { return static_cast<std::uint16_t*>(x.mutable_data()); }

/// A contiguous float16 [rows, groups], all finite.
py::array checked_halves(const py::array& given, const char* name, std::int64_t rows, std::int64_t groups) {
    require(given.ndim() == 2 && given.shape(0) == rows && given.shape(1) == groups && given.dtype().kind() == 'f' &&
                given.itemsize() == 2,
            std::string(name) + " must be float16 [" + size_text(rows, groups) + "], one for each group of a row");
    const py::array x = py::array::ensure(given, py::array::c_style);
    const auto* halves = static_cast<const std::uint16_t*>(x.data());
    for (std::int64_t i = 0; i < rows * groups; ++i)
        if ((halves[i] & 0x7c00) == 0x7c00)
            throw std::invalid_argument(std::string(name) + " are not finite at row " + std::to_string(i / groups) +
                                        ", group " + std::to_string(i % groups));
    return x;
}

py::tuple fit(const Floats& weight, const std::string& name, int threads, const std::optional<Floats>& importance) {
    const layout::Scheme& scheme = scheme_of(name);
    const Shape shape(weight, "weight");
    require(shape.cols % scheme.group == 0, "weight has " + std::to_string(shape.cols) +
                                                " columns, not a multiple of the group of " + name + ", " +
                                                std::to_string(scheme.group));
    const float *source = weight.data(), *weights = checked_importance(importance, shape.cols);
    const std::int64_t groups = shape.cols / scheme.group;
    py::array scales = new_halves(shape.rows, groups), mins = new_halves(shape.rows, groups);
    std::uint16_t *scale = halves_of(scales), *min = halves_of(mins);
    run_team(threads,
             [&](Team& team) { fit_groups(team, source, shape.rows, shape.cols, scheme, weights, scale, min); });
    return py::make_tuple(scales, mins);
}

void check_values(const std::uint8_t* q, const Shape& shape, const layout::Scheme& scheme) {
    const int low = scheme.bits == 8 ? 1 : 0, high = (1 << scheme.bits) - 1;
    for (std::int64_t i = 0; i < shape.rows * shape.cols; ++i)
        if (q[i] < low || q[i] > high)
            throw std::invalid_argument("q is " + std::to_string(q[i]) + " at row " + std::to_string(i / shape.cols) +
                                        ", column " + std::to_string(i % shape.cols) + ", outside " +
                                        std::to_string(low) + " to " + std::to_string(high) + " of " +
                                        std::string(scheme.name));
}

py::array_t<std::uint8_t> pack(const Bytes& q, const py::array& scales, const py::array& mins, const std::string& name,
                               int threads) {
    const layout::Scheme& scheme = scheme_of(name);
    const Shape shape(q, "q");
    const std::int64_t groups = layout::padded_cols(scheme, shape.cols) / scheme.group;
    py::array scale = checked_halves(scales, "scales", shape.rows, groups);
    py::array min = checked_halves(mins, "mins", shape.rows, groups);
    check_values(q.data(), shape, scheme);
    py::array_t<std::uint8_t> packed = new_panels(scheme, shape.rows, shape.cols);
    std::uint8_t* target = packed.mutable_data();
    const ConstQuantizedMatrix matrix{q.data(), static_cast<const std::uint16_t*>(scale.data()),
                                      static_cast<const std::uint16_t*>(min.data())};
    const auto is_zero = [](std::uint16_t half) { return (half & 0x7fff) == 0; };
    require(scheme.asymmetric || std::all_of(matrix.mins, matrix.mins + shape.rows * groups, is_zero),
            "mins must be zeros: " + name + " is symmetric and stores none");
    run_team(threads, [&](Team& team) { pack_matrix(team, matrix, shape.rows, shape.cols, scheme, target); });
    return packed;
}

py::tuple unpack(const Bytes& packed, const std::string& name, std::int64_t rows, std::int64_t cols, int threads) {
    const layout::Scheme& scheme = scheme_of(name);
    check_packed(packed, scheme, rows, cols);
    const std::int64_t groups = layout::padded_cols(scheme, cols) / scheme.group;
    py::array_t<std::uint8_t> q({rows, cols});
    py::array scales = new_halves(rows, groups), mins = new_halves(rows, groups);
    const QuantizedMatrix matrix{q.mutable_data(), halves_of(scales), halves_of(mins)};
    const std::uint8_t* source = packed.data();
    run_team(threads, [&](Team& team) { unpack_matrix(team, source, rows, cols, scheme, matrix); });
    return py::make_tuple(q, scales, mins);
}

}  // namespace

void bind_quantize(py::module_& module) {
    const auto scheme = py::arg("scheme");
    const auto threads = py::arg("threads") = 0;
    const auto importance = py::arg("importance") = py::none();
    module.def("schemes", &schemes);
    module.def("packed_bytes", &packed_bytes, scheme, py::arg("rows"), py::arg("cols"));
    module.def("padded_rows", &layout::padded_rows, py::arg("rows"));
    module.def("quantize", &quantize, py::arg("weight"), scheme, threads, importance);
    module.def("dequantize", &dequantize, py::arg("packed"), scheme, py::arg("rows"), py::arg("cols"),
               py::arg("row_begin") = 0, py::arg("row_end") = -1);
    module.def("fit_groups", &fit, py::arg("weight"), scheme, threads, importance);
    module.def("pack", &pack, py::arg("q"), py::arg("scales"), py::arg("mins"), scheme, threads);
    module.def("unpack", &unpack, py::arg("packed"), scheme, py::arg("rows"), py::arg("cols"), threads);
}
