// SPDX-License-Identifier: Apache-2.0
// _core.ops: every op on NumPy arrays, for the tests and the benchmark. Not part of the run time's interface.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bind_arrays.hpp"
#include "cpu/cpu_info.hpp"
#include "cpu/half.hpp"
#include "ops.hpp"

namespace py = pybind11;

namespace {

using namespace cnl;
using namespace cnl::bind;

/// (packed, scheme, rows, bias or None); the columns come from x.
using PackedMatrix = std::tuple<Bytes, std::string, std::int64_t, std::optional<Floats>>;

const float* vector_of(const std::optional<Floats>& x, std::int64_t size, const char* name) {
    if (!x) return nullptr;
    require(x->size() == size, std::string(name) + " must have " + std::to_string(size) + " values");
    return x->data();
}

/// A copy on a 64-byte boundary, as files have it.
struct AlignedWeight {
    AlignedArray<std::uint8_t> data;
    Weight weight;
    AlignedWeight(const Bytes& packed, const std::string& name, std::int64_t rows, std::int64_t cols)
        : data(packed.size()) {
        const layout::Scheme* scheme = layout::find_scheme(name);
        require(scheme != nullptr, "unknown weight scheme '" + name + "'");
        require(rows > 0 && cols > 0 && packed.size() == layout::packed_bytes(*scheme, rows, cols),
                "the packed bytes do not have the size of the matrix");
        std::memcpy(data.get(), packed.data(), static_cast<std::size_t>(packed.size()));
        weight = {scheme, rows, cols, data.get()};
    }
};

std::vector<std::unique_ptr<AlignedWeight>> align_all(const std::vector<PackedMatrix>& matrices, std::int64_t cols) {
    std::vector<std::unique_ptr<AlignedWeight>> all;
    for (const auto& [packed, scheme, rows, bias] : matrices)
        all.push_back(std::make_unique<AlignedWeight>(packed, scheme, rows, cols));
    return all;
}

py::tuple quantize_activations(const Floats& x, const std::optional<Floats>& gamma, float eps, const std::string& isa,
                               int threads) {
    const auto [m, cols] = matrix_shape(x, "x");
    const float* weights = vector_of(gamma, cols, "gamma");
    const IsaScope scope(isa);
    ops::Activations out(m, cols, threads);
    ThreadPool(threads).run([&, rows = m, columns = cols](Team& team) {
        if (weights)
            ops::rms_norm(team, x.data(), weights, eps, rows, columns, out);
        else
            ops::quantize(team, x.data(), rows, columns, out);
    });
    return activation_rows(out.data().own.empty() ? out.data().shared : *out.data().own[0]->current);
}

py::list matmul(const Floats& x, const std::vector<PackedMatrix>& matrices, const std::string& isa, int threads) {
    const auto [m, cols] = matrix_shape(x, "x");
    const IsaScope scope(isa);
    const auto weights = align_all(matrices, cols);
    std::vector<py::array_t<float>> outputs;
    std::vector<ops::Projection> projections;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const Weight& w = weights[i]->weight;
        outputs.emplace_back(std::vector<py::ssize_t>{m, w.rows});
        projections.push_back(
            {&w, vector_of(std::get<3>(matrices[i]), w.rows, "bias"), outputs.back().mutable_data(), w.rows});
    }
    ops::Activations a(m, cols, threads);
    ThreadPool(threads).run([&, rows = m, columns = cols](Team& team) {
        ops::quantize(team, x.data(), rows, columns, a);
        ops::matmul(team, a, projections);
    });
    py::list result;
    for (const auto& output : outputs) result.append(output);
    return result;
}

py::array_t<float> matmul_add(const Floats& x, const PackedMatrix& matrix, const Floats& residual,
                              const std::string& isa, int threads) {
    const auto [m, cols] = matrix_shape(x, "x");
    const IsaScope scope(isa);
    const auto weights = align_all({matrix}, cols);
    const Weight& w = weights[0]->weight;
    require(residual.ndim() == 2 && residual.shape(0) == m && residual.shape(1) == w.rows,
            "residual must be [m, rows]");
    py::array_t<float> out({m, w.rows});
    std::memcpy(out.mutable_data(), residual.data(), static_cast<std::size_t>(out.nbytes()));
    const float* bias = vector_of(std::get<3>(matrix), w.rows, "bias");
    float* target = out.mutable_data();
    ops::Activations a(m, cols, threads);
    ThreadPool(threads).run([&, rows = m, columns = cols](Team& team) {
        ops::quantize(team, x.data(), rows, columns, a);
        ops::matmul_add(team, a, w, bias, target);
    });
    return out;
}

/// (h, quantize(h) as quantize_activations returns it)
py::tuple matmul_swiglu_quantized(const Floats& x, const PackedMatrix& gate, const PackedMatrix& up,
                                  const std::string& isa, int threads) {
    const auto [m, cols] = matrix_shape(x, "x");
    const IsaScope scope(isa);
    const auto weights = align_all({gate, up}, cols);
    const Weight &g = weights[0]->weight, &u = weights[1]->weight;
    require(g.rows == u.rows, "gate and up must have the same rows");
    py::array_t<float> out({m, g.rows});
    const float* gate_bias = vector_of(std::get<3>(gate), g.rows, "gate bias");
    const float* up_bias = vector_of(std::get<3>(up), g.rows, "up bias");
    float* target = out.mutable_data();
    ops::Activations a(m, cols, threads), quantized(m, g.rows);
    ThreadPool(threads).run([&, rows = m, columns = cols](Team& team) {
        ops::quantize(team, x.data(), rows, columns, a);
        ops::matmul_swiglu(team, a, g, gate_bias, u, up_bias, target, &quantized);
    });
    return py::make_tuple(out, activation_rows(quantized.data().shared));
}

py::object matmul_swiglu(const Floats& x, const PackedMatrix& gate, const PackedMatrix& up, const std::string& isa,
                         int threads) {
    return matmul_swiglu_quantized(x, gate, up, isa, threads)[0];
}

py::array_t<float> embed(const Bytes& packed, const std::string& scheme, std::int64_t rows, std::int64_t cols,
                         const Integers& tokens, int threads) {
    const AlignedWeight table(packed, scheme, rows, cols);
    for (py::ssize_t i = 0; i < tokens.size(); ++i)
        require(tokens.data()[i] >= 0 && tokens.data()[i] < rows, "a token is outside the table");
    require(tokens.size() > 0, "tokens must not be empty");
    const std::int64_t m = tokens.size();
    py::array_t<float> out({m, cols});
    float* target = out.mutable_data();
    ThreadPool(threads).run([&](Team& team) { ops::embed(team, table.weight, tokens.data(), m, target); });
    return out;
}

py::array_t<float> gather_rows(const Floats& x, const Integers& rows, int threads) {
    const auto [m, cols] = matrix_shape(x, "x");
    for (py::ssize_t i = 0; i < rows.size(); ++i)
        require(rows.data()[i] >= 0 && rows.data()[i] < m, "a row is outside x");
    const std::int64_t count = rows.size();
    py::array_t<float> out(std::vector<py::ssize_t>{count, cols});
    float* target = out.mutable_data();
    ThreadPool(threads).run(
        [&, columns = cols](Team& team) { ops::gather_rows(team, x.data(), rows.data(), count, columns, target); });
    return out;
}

template <typename Kernel>
py::array_t<float> elementwise(const Floats& x, Kernel kernel) {
    const std::int64_t n = x.size(), padded = layout::round_up(n, 16);
    std::vector<float> in(static_cast<std::size_t>(padded)), out(static_cast<std::size_t>(padded));
    std::copy_n(x.data(), n, in.data());
    kernel(in.data(), out.data(), padded);
    py::array_t<float> result(n);
    std::copy_n(out.data(), n, result.mutable_data());
    return result;
}

}  // namespace

py::tuple cnl::bind::activation_rows(const ActivationData& d) {
    const std::int64_t padded = d.padded(d.cols), spans = d.spans(d.cols);
    py::array_t<std::int8_t> values({d.m, padded});
    py::array_t<float> scales({d.m, spans});
    py::array_t<std::int32_t> sums32({d.m, padded / 32}), sums64({d.m, padded / 64});
    const Tiles tiles(d.m);
    const auto whole = cpu::kernels().whole_sum;
    for (std::int64_t i = 0; i < d.m; ++i) {
        const std::int64_t tile = tiles.of(i), begin = tiles.begin(tile), size = tiles.size(tile), slot = i - begin;
        for (std::int64_t k = 0; k < padded; ++k)
            values.mutable_at(i, k) = d.values.get()[begin * padded + (k / 32 * size + slot) * 32 + k % 32];
        for (std::int64_t s = 0; s < spans; ++s)
            scales.mutable_at(i, s) = d.scales.get()[begin * spans + s * size + slot];
        for (std::int64_t g = 0; g < padded / 32; ++g)
            sums32.mutable_at(i, g) = whole(d.sums32.get()[begin * padded / 32 + g * size + slot]);
        for (std::int64_t g = 0; g < padded / 64; ++g)
            sums64.mutable_at(i, g) = whole(d.sums64.get()[begin * padded / 64 + g * size + slot]);
    }
    return py::make_tuple(values, scales, sums32, sums64);
}

void bind_attention(py::module_& module);
void bind_bench(py::module_& module);

void bind_kernels(py::module_& core) {
    py::module_ module = core.def_submodule("ops", "Every op on NumPy arrays, for tests and benchmarks.");
    const auto isa = py::arg("isa") = "";
    const auto threads = py::arg("threads") = 1;
    module.def("quantize_activations", &quantize_activations, py::arg("x"), py::arg("gamma") = py::none(),
               py::arg("eps") = 0.0f, isa, threads);
    module.def("matmul", &matmul, py::arg("x"), py::arg("matrices"), isa, threads);
    module.def("matmul_add", &matmul_add, py::arg("x"), py::arg("matrix"), py::arg("residual"), isa, threads);
    module.def("matmul_swiglu", &matmul_swiglu, py::arg("x"), py::arg("gate"), py::arg("up"), isa, threads);
    module.def("matmul_swiglu_quantized", &matmul_swiglu_quantized, py::arg("x"), py::arg("gate"), py::arg("up"), isa,
               threads);
    module.def("embed", &embed, py::arg("packed"), py::arg("scheme"), py::arg("rows"), py::arg("cols"),
               py::arg("tokens"), threads);
    module.def("gather_rows", &gather_rows, py::arg("x"), py::arg("rows"), threads);
    module.def(
        "exp",
        [](const Floats& x, const std::string& name) {
            const IsaScope scope(name);
            return elementwise(x, [](const float* in, float* out, std::int64_t n) { cpu::kernels().exp(in, out, n); });
        },
        py::arg("x"), isa);
    module.def(
        "silu",
        [](const Floats& x, const std::string& name) {
            const IsaScope scope(name);
            return elementwise(x, [](const float* in, float* out, std::int64_t n) {
                const std::vector<float> ones(static_cast<std::size_t>(n), 1.0f);
                cpu::kernels().swiglu(in, ones.data(), out, n);
            });
        },
        py::arg("x"), isa);
    module.def("cgroup_quota", &cpu::cgroup_quota, py::arg("root"));
    module.def("half_to_float", [](int half) { return cpu::half_to_float(static_cast<std::uint16_t>(half)); });
    module.def("float_to_half", [](float value) { return cpu::float_to_half(value); });
    bind_attention(module);
    bind_bench(module);
}
