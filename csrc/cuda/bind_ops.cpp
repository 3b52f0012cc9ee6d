// SPDX-License-Identifier: Apache-2.0
// _cuda.ops: every kernel on NumPy arrays, with the names and results of _core.ops, for the tests. Outputs and scratch
// memory are filled with NaN first.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <bit>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind_arrays.hpp"

namespace cnl::cuda {
namespace {

using PackedMatrix = std::tuple<Bytes, std::string, std::int64_t, std::optional<Floats>>;

struct DeviceAct {
    DeviceArray<std::int8_t> values;
    DeviceArray<std::int32_t> sums;
    DeviceArray<float> scales;
    DeviceAct(std::int64_t tokens, std::int64_t cols) {
        const auto blocks = static_cast<std::size_t>(token_blocks(tokens)),
                   tiles = static_cast<std::size_t>(col_tiles(cols));
        values = poisoned<std::int8_t>(blocks * tiles * kTokenBlock * kTileCols);
        sums = poisoned<std::int32_t>(blocks * tiles * kSumKinds * kTokenBlock);
        scales = poisoned<float>(blocks * static_cast<std::size_t>(spans(cols)) * kTokenBlock);
    }
    Act act() const { return {values.get(), sums.get(), scales.get()}; }
};

const layout::Scheme& scheme_of(const std::string& name) {
    const layout::Scheme* scheme = layout::find_scheme(name);
    require(scheme && scheme_number(name) >= 0, "there are no kernels for weight scheme '" + name + "'");
    return *scheme;
}

/// Matrices with their biases on the device.
struct DeviceMatrices {
    std::vector<DeviceArray<std::uint8_t>> tiles;
    std::vector<DeviceArray<float>> biases;
    std::vector<Tiles> matrices;

    void add(const Context& context, const PackedMatrix& m, std::int64_t cols) {
        const auto& [packed, name, rows, bias] = m;
        const layout::Scheme& scheme = scheme_of(name);
        require(rows > 0 && packed.size() == layout::packed_bytes(scheme, rows, cols),
                "the packed bytes have a wrong size");
        const auto panels = sent(packed.data(), static_cast<std::size_t>(packed.size()));
        tiles.push_back(poisoned<std::uint8_t>(static_cast<std::size_t>(tiled_bytes(scheme, rows, cols))));
        repack(context.queue(), scheme, panels.get(), rows, cols, 0, layout::padded_rows(rows) / 32,
               tiles.back().get());
        context.stream().wait();
        require(!bias || bias->size() == rows, "bias must have a value for every row");
        biases.push_back(bias ? sent(*bias) : DeviceArray<float>());
        matrices.push_back({scheme_number(name), static_cast<int>(rows), static_cast<int>(cols), tiles.back().get()});
    }
};

/// Pieces in the same order of pairs as an upload, so that both ways of cutting are seen.
Bytes tiled(const Bytes& packed, const std::string& name, std::int64_t rows, std::int64_t cols, std::int64_t pairs) {
    const Bench bench;
    const layout::Scheme& scheme = scheme_of(name);
    require(packed.size() == layout::packed_bytes(scheme, rows, cols) && pairs > 0, "sizes do not match");
    const auto panels = sent(packed.data(), static_cast<std::size_t>(packed.size()));
    const auto out = poisoned<std::uint8_t>(static_cast<std::size_t>(tiled_bytes(scheme, rows, cols)));
    const std::int64_t all = layout::padded_rows(rows) / 32, pair_bytes = 2 * layout::panel_bytes(scheme, cols);
    for (std::int64_t begin = 0; begin < all; begin += pairs)
        repack(bench.context.queue(), scheme, panels.get() + begin * pair_bytes, rows, cols, begin,
               std::min(all, begin + pairs), out.get());
    return fetched(bench.context, out, {static_cast<py::ssize_t>(out.size())});
}

/// As _core.ops.quantize_activations: values [m, padded], scales [m, spans], sums of 32 and of 64 columns.
py::tuple quantize_activations(const Floats& x, const std::optional<Floats>& gamma, float eps) {
    const Bench bench;
    const auto [m, cols] = shape_of(x);
    require(!gamma || gamma->size() == cols, "gamma must have a value for every column");
    const auto input = sent(x);
    const auto weights = gamma ? sent(*gamma) : DeviceArray<float>();
    const DeviceAct out(m, cols);
    norm_quantize(bench.context.queue(), input.get(), weights.get(), eps, static_cast<int>(m), static_cast<int>(cols),
                  out.act());
    const std::int64_t tiles = col_tiles(cols), shown = (cols + kTileCols - 1) / kTileCols, span_count = spans(cols);
    const std::int64_t padded = shown * kTileCols;
    const auto v = fetched(bench.context, out.values, {static_cast<py::ssize_t>(out.values.size())});
    const auto s = fetched(bench.context, out.sums, {static_cast<py::ssize_t>(out.sums.size())});
    const auto f = fetched(bench.context, out.scales, {static_cast<py::ssize_t>(out.scales.size())});
    py::array_t<std::int8_t> values({m, padded});
    py::array_t<float> scales({m, span_count});
    py::array_t<std::int32_t> sums32({m, 2 * shown}), sums64({m, shown});
    for (std::int64_t i = 0; i < m; ++i) {
        const std::int64_t block = i / kTokenBlock, slot = i % kTokenBlock;
        for (std::int64_t k = 0; k < padded; ++k)
            values.mutable_at(i, k) = v.data()[((block * tiles + k / kTileCols) * kTokenBlock + slot) * kTileCols +
                                               place_in_token(static_cast<int>(k % kTileCols))];
        for (std::int64_t t = 0; t < shown; ++t) {
            const std::int32_t* sum = s.data() + (block * tiles + t) * kSumKinds * kTokenBlock + slot;
            sums32.mutable_at(i, 2 * t) = sum[0];
            sums32.mutable_at(i, 2 * t + 1) = sum[kTokenBlock];
            sums64.mutable_at(i, t) = sum[2 * kTokenBlock];
        }
        for (std::int64_t j = 0; j < span_count; ++j)
            scales.mutable_at(i, j) = f.data()[(block * span_count + j) * kTokenBlock + slot];
    }
    return py::make_tuple(values, scales, sums32, sums64);
}

void run_kernel(const Context& context, const MatmulArgs& args, Epilogue epilogue, const std::string& kernel) {
    require(kernel == "auto" || (kernel == "dp4a" && args.tokens == 1), "kernel must be auto, or dp4a for one token");
    if (kernel == "dp4a")
        matmul_dp4a(context.queue(), args, epilogue);
    else
        matmul(context.queue(), args, epilogue);
}

/// Quantizes x and sets the sizes.
MatmulArgs begin_matmul(const Context& context, const DeviceArray<float>& x, const DeviceAct& act, std::int64_t m,
                        std::int64_t cols) {
    norm_quantize(context.queue(), x.get(), nullptr, 0.0f, static_cast<int>(m), static_cast<int>(cols), act.act());
    MatmulArgs args;
    args.act = act.act();
    args.tokens = static_cast<int>(m);
    args.cols = static_cast<int>(cols);
    return args;
}

py::list matmul_op(const Floats& x, const std::vector<PackedMatrix>& matrices, const std::string& kernel) {
    const Bench bench;
    const auto [m, cols] = shape_of(x);
    require(!matrices.empty() && matrices.size() <= MatmulArgs::kMaxProducts, "between one and four matrices");
    DeviceMatrices weights;
    std::vector<DeviceArray<float>> outputs;
    const auto input = sent(x);
    const DeviceAct act(m, cols);
    MatmulArgs args = begin_matmul(bench.context, input, act, m, cols);
    for (const PackedMatrix& matrix : matrices) {
        require(std::get<1>(matrix) == std::get<1>(matrices[0]), "one scheme a launch");
        weights.add(bench.context, matrix, cols);
        outputs.push_back(poisoned<float>(static_cast<std::size_t>(m * std::get<2>(matrix))));
        args.products[args.count++] = {weights.matrices.back(),     {},
                                       weights.biases.back().get(), nullptr,
                                       outputs.back().get(),        std::get<2>(matrix)};
    }
    run_kernel(bench.context, args, Epilogue::store, kernel);
    py::list result;
    for (std::size_t i = 0; i < outputs.size(); ++i)
        result.append(fetched(bench.context, outputs[i], {m, std::get<2>(matrices[i])}));
    return result;
}

py::array_t<float> matmul_add_op(const Floats& x, const PackedMatrix& matrix, const Floats& residual,
                                 const std::string& kernel) {
    const Bench bench;
    const auto [m, cols] = shape_of(x);
    const std::int64_t rows = std::get<2>(matrix);
    require(residual.size() == m * rows, "residual must be [m, rows]");
    DeviceMatrices weights;
    weights.add(bench.context, matrix, cols);
    const auto input = sent(x);
    const auto out = sent(residual);
    const DeviceAct act(m, cols);
    MatmulArgs args = begin_matmul(bench.context, input, act, m, cols);
    args.products[args.count++] = {weights.matrices[0], {}, weights.biases[0].get(), nullptr, out.get(), rows};
    run_kernel(bench.context, args, Epilogue::add, kernel);
    return fetched(bench.context, out, {m, rows});
}

py::array_t<float> matmul_swiglu_op(const Floats& x, const PackedMatrix& gate, const PackedMatrix& up,
                                    const std::string& kernel) {
    const Bench bench;
    const auto [m, cols] = shape_of(x);
    const std::int64_t rows = std::get<2>(gate);
    require(rows == std::get<2>(up) && std::get<1>(gate) == std::get<1>(up), "gate and up must be alike");
    DeviceMatrices weights;
    weights.add(bench.context, gate, cols);
    weights.add(bench.context, up, cols);
    const auto input = sent(x);
    const auto out = poisoned<float>(static_cast<std::size_t>(m * rows));
    const DeviceAct act(m, cols);
    MatmulArgs args = begin_matmul(bench.context, input, act, m, cols);
    args.products[args.count++] = {weights.matrices[0],     weights.matrices[1], weights.biases[0].get(),
                                   weights.biases[1].get(), out.get(),           rows};
    run_kernel(bench.context, args, Epilogue::swiglu, kernel);
    return fetched(bench.context, out, {m, rows});
}

py::array_t<float> embed_op(const Bytes& packed, const std::string& scheme, std::int64_t rows, std::int64_t cols,
                            const Integers& tokens) {
    const Bench bench;
    require(tokens.size() > 0, "tokens must not be empty");
    DeviceMatrices table;
    table.add(bench.context, {packed, scheme, rows, std::nullopt}, cols);
    const std::vector<std::int32_t> ids(tokens.data(), tokens.data() + tokens.size());
    StepUpload upload(tokens.size(), 1, 1);
    const std::vector<float> none(ids.size());
    send(upload, bench.context, ids, {}, {}, none.data(), none.data());
    const auto out = poisoned<float>(ids.size() * static_cast<std::size_t>(cols));
    embed(bench.context.queue(), table.matrices[0], upload.device(), nullptr, static_cast<int>(ids.size()), out.get());
    return fetched(bench.context, out, {tokens.size(), cols});
}

py::array_t<float> gather_op(const Floats& x, const Integers& rows) {
    const Bench bench;
    const auto [m, cols] = shape_of(x);
    const std::vector<std::int32_t> outputs(rows.data(), rows.data() + rows.size());
    const std::int64_t count = std::max<std::int64_t>(m, rows.size());
    const std::vector<std::int32_t> tokens(static_cast<std::size_t>(count));
    const std::vector<float> none(tokens.size());
    StepUpload upload(count, 1, 1);
    send(upload, bench.context, tokens, outputs, {}, none.data(), none.data());
    const auto input = sent(x);
    const auto out = poisoned<float>(outputs.size() * static_cast<std::size_t>(cols));
    gather_rows(bench.context.queue(), input.get(), upload.device(), static_cast<int>(outputs.size()),
                static_cast<int>(cols), out.get());
    return fetched(bench.context, out, {rows.size(), cols});
}

py::array_t<std::int32_t> argmax_op(const Floats& logits) {
    const Bench bench;
    const auto [rows, vocab] = shape_of(logits);
    const auto input = sent(logits);
    const auto chosen = poisoned<std::int32_t>(static_cast<std::size_t>(rows));
    const auto values = poisoned<float>(static_cast<std::size_t>(rows * kArgmaxParts));
    const auto ids = poisoned<std::int32_t>(static_cast<std::size_t>(rows * kArgmaxParts));
    argmax(bench.context.queue(), input.get(), static_cast<int>(rows), static_cast<int>(vocab), chosen.get(),
           values.get(), ids.get());
    return fetched(bench.context, chosen, {rows});
}

py::tuple top_op(const Floats& logits, int k) {
    const Bench bench;
    const auto [rows, vocab] = shape_of(logits);
    require(k >= 1 && k <= kMaxTop, "k must be from 1 to " + std::to_string(kMaxTop));
    const int width = std::max(32, static_cast<int>(std::bit_ceil(static_cast<unsigned>(k))));
    const auto input = sent(logits);
    const auto count = static_cast<std::size_t>(rows * width);
    const auto ids = poisoned<std::int32_t>(count);
    const auto values = poisoned<float>(count);
    const auto scratch = poisoned<std::uint64_t>(static_cast<std::size_t>(top_keys(rows, vocab, width)));
    top_logits(bench.context.queue(), input.get(), static_cast<int>(rows), static_cast<int>(vocab), width, ids.get(),
               values.get(), scratch.get());
    return py::make_tuple(fetched(bench.context, ids, {rows, width}), fetched(bench.context, values, {rows, width}));
}

}  // namespace
}  // namespace cnl::cuda

void bind_cuda_attention(pybind11::module_& module);

void bind_cuda_ops(pybind11::module_& module) {
    using namespace cnl::cuda;
    pybind11::module_ ops = module.def_submodule("ops", "Every kernel on NumPy arrays, for the tests.");
    ops.def("tiled", &tiled, py::arg("packed"), py::arg("scheme"), py::arg("rows"), py::arg("cols"),
            py::arg("pairs") = 1 << 30);
    ops.def("quantize_activations", &quantize_activations, py::arg("x"), py::arg("gamma") = py::none(),
            py::arg("eps") = 1e-6f);
    ops.def("matmul", &matmul_op, py::arg("x"), py::arg("matrices"), py::arg("kernel") = "auto");
    ops.def("matmul_add", &matmul_add_op, py::arg("x"), py::arg("matrix"), py::arg("residual"),
            py::arg("kernel") = "auto");
    ops.def("matmul_swiglu", &matmul_swiglu_op, py::arg("x"), py::arg("gate"), py::arg("up"),
            py::arg("kernel") = "auto");
    ops.def("embed", &embed_op, py::arg("packed"), py::arg("scheme"), py::arg("rows"), py::arg("cols"),
            py::arg("tokens"));
    ops.def("gather_rows", &gather_op, py::arg("x"), py::arg("rows"));
    bind_cuda_attention(ops);
    ops.def("argmax", &argmax_op, py::arg("logits"));
    ops.def("top", &top_op, py::arg("logits"), py::arg("k"));
}
