// SPDX-License-Identifier: Apache-2.0
// _cuda.bench: what bench/gpu times. Seconds are medians the caller takes; every call returns one figure a round.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../kv_cache.hpp"
#include "context.hpp"
#include "upload.hpp"

namespace py = pybind11;

namespace cnl::cuda {
namespace {

/// Seconds between two points of a stream.
class Timer {
 public:
    explicit Timer(const Stream& stream) : stream_(stream) { begin_.record(stream); }
    double stop() {
        end_.record(stream_);
        end_.wait();
        float milliseconds = 0;
        check(cudaEventElapsedTime(&milliseconds, begin_.get(), end_.get()), "reading a clock");
        return milliseconds * 1e-3;
    }

 private:
    const Stream& stream_;
    Event begin_{cudaEventDefault}, end_{cudaEventDefault};
};

/// `work` captured once, replayed `rounds` times: seconds of each.
std::vector<double> time_replays(const Context& context, int rounds, const std::function<void()>& work) {
    work();  // what a first launch does behind the scenes must not be captured
    context.stream().wait();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    check(cudaStreamBeginCapture(context.stream().get(), cudaStreamCaptureModeThreadLocal), "capturing");
    work();
    check(cudaStreamEndCapture(context.stream().get(), &graph), "capturing");
    check(cudaGraphInstantiate(&exec, graph, 0), "preparing a graph");
    static_cast<void>(cudaGraphDestroy(graph));
    std::vector<double> seconds;
    for (int i = 0; i <= rounds; ++i) {
        Timer timer(context.stream());
        check(cudaGraphLaunch(exec, context.stream().get()), "running a graph");
        const double time = timer.stop();
        if (i > 0) seconds.push_back(time);
    }
    static_cast<void>(cudaGraphExecDestroy(exec));
    return seconds;
}

void within(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
    if (value < low || value > high)
        throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", outside " +
                                    std::to_string(low) + " .. " + std::to_string(high));
}

Options with_early_start(bool early) {
    Options options = options_from_environment();
    options.early_start = early;
    return options;
}

std::vector<double> read_seconds(std::int64_t mebibytes, int rounds) {
    within("mebibytes", mebibytes, 1, 1 << 20);
    within("rounds", rounds, 1, 1000);
    const Context context(usable_device(), options_from_environment());
    const DeviceArray<std::uint8_t> memory(static_cast<std::size_t>(mebibytes) << 20, "the benchmark");
    const DeviceArray<std::uint32_t> sink(1, "the benchmark");
    fill_device_memory(memory.get(), 1, memory.bytes(), "the benchmark");
    return time_replays(context, rounds,
                        [&] { read_memory(context.queue(), memory.get(), mebibytes << 20, sink.get()); });
}

std::vector<double> copy_seconds(std::int64_t mebibytes, int rounds) {
    within("mebibytes", mebibytes, 1, 1 << 20);
    within("rounds", rounds, 1, 1000);
    const Context context(usable_device(), options_from_environment());
    const auto bytes = static_cast<std::size_t>(mebibytes) << 20;
    const DeviceArray<std::uint8_t> from(bytes, "the benchmark"), to(bytes, "the benchmark");
    fill_device_memory(from.get(), 1, bytes, "the benchmark");
    return time_replays(context, rounds, [&] {
        check(cudaMemcpyAsync(to.get(), from.get(), bytes, cudaMemcpyDeviceToDevice, context.stream().get()),
              "copying");
    });
}

/// mode: "plain", "graph" or "early": a graph whose kernels may start while the one before ends.
std::vector<double> launch_seconds(const std::string& mode, int launches, int rounds) {
    within("launches", launches, 1, 100000);
    within("rounds", rounds, 1, 1000);
    if (mode != "plain" && mode != "graph" && mode != "early")
        throw std::invalid_argument("mode is '" + mode + "', expected plain, graph or early");
    const Context context(usable_device(), with_early_start(mode == "early"));
    const auto work = [&] {
        for (int i = 0; i < launches; ++i) nothing(context.queue());
    };
    if (mode != "plain") return time_replays(context, rounds, work);
    work();
    std::vector<double> seconds;
    for (int i = 0; i < rounds; ++i) {
        Timer timer(context.stream());
        work();
        seconds.push_back(timer.stop());
    }
    return seconds;
}

/// One product, rotated over `copies` of the weights. epilogue: store, add or swiglu (rows of gate and as many of up).
/// The seconds are of all copies together.
std::vector<double> matmul_seconds(const std::string& scheme_name, std::int64_t rows, std::int64_t cols, int tokens,
                                   const std::string& epilogue, const std::string& kernel, int copies, int rounds) {
    const layout::Scheme* scheme = layout::find_scheme(scheme_name);
    if (!scheme || scheme_number(scheme_name) < 0)
        throw std::invalid_argument("there are no kernels for weight scheme '" + scheme_name + "'");
    within("rows", rows, 1, 1 << 20);
    within("cols", cols, 1, 1 << 20);
    within("tokens", tokens, 1, 65536);
    within("copies", copies, 1, 4096);
    within("rounds", rounds, 1, 1000);
    if (kernel != "auto" && !(kernel == "dp4a" && tokens == 1))
        throw std::invalid_argument("kernel must be auto, or dp4a for one token");
    const Epilogue how = epilogue == "swiglu" ? Epilogue::swiglu : epilogue == "add" ? Epilogue::add : Epilogue::store;
    const Context context(usable_device(), options_from_environment());
    const int matrices = how == Epilogue::swiglu ? 2 : 1;
    const auto each = DeviceWeights::device_bytes(Weight{scheme, rows, cols, nullptr});
    // 0x11: nibbles of 1, and fp16 parameters of 6e-4.
    const DeviceArray<std::uint8_t> weights(each * static_cast<std::size_t>(copies * matrices), "the benchmark");
    fill_device_memory(weights.get(), 0x11, weights.bytes(), "the benchmark");
    const auto blocks = static_cast<std::size_t>(token_blocks(tokens)),
               tiles = static_cast<std::size_t>(col_tiles(cols));
    const DeviceArray<std::int8_t> values(blocks * tiles * kTokenBlock * kTileCols, "the benchmark");
    const DeviceArray<std::int32_t> sums(blocks * tiles * kSumKinds * kTokenBlock, "the benchmark");
    const DeviceArray<float> scales(blocks * static_cast<std::size_t>(spans(cols)) * kTokenBlock, "the benchmark");
    const DeviceArray<float> x(static_cast<std::size_t>(tokens * cols), "the benchmark");
    const DeviceArray<float> out(static_cast<std::size_t>(tokens) * static_cast<std::size_t>(rows), "the benchmark");
    fill_device_memory(x.get(), 0x3c, x.bytes(), "the benchmark");
    fill_device_memory(out.get(), 0, out.bytes(), "the benchmark");
    MatmulArgs args;
    args.act = {values.get(), sums.get(), scales.get()};
    args.tokens = tokens;
    args.cols = static_cast<int>(cols);
    args.count = 1;
    norm_quantize(context.queue(), x.get(), nullptr, 0.0f, tokens, args.cols, args.act);
    const auto tiles_at = [&](int index) {
        return Tiles{scheme_number(scheme_name), static_cast<int>(rows), static_cast<int>(cols),
                     weights.get() + static_cast<std::size_t>(index) * each};
    };
    return time_replays(context, rounds, [&] {
        for (int i = 0; i < copies; ++i) {
            args.products[0] = {
                tiles_at(matrices * i), tiles_at(matrices * i + matrices - 1), nullptr, nullptr, out.get(), rows};
            if (kernel == "dp4a")
                matmul_dp4a(context.queue(), args, how);
            else
                matmul(context.queue(), args, how);
        }
    });
}

/// Attention of one layer, rotated over `layers` of a cache: `rows` sequences of `context` positions and one query
/// each, or with prefill one sequence of `context` positions that are all queries.
std::vector<double> attention_seconds(int heads, int kv_heads, int head_dim, std::int64_t positions, int rows,
                                      const std::string& kv_type, bool prefill, int layers, int rounds) {
    within("heads", heads, 1, 1024);
    within("kv_heads", kv_heads, 1, heads);
    within("head_dim", head_dim, 2, 1024);
    within("positions", positions, 1, 1 << 20);
    within("rows", rows, 1, 1024);
    within("layers", layers, 1, 256);
    within("rounds", rounds, 1, 1000);
    const Context context(usable_device(), options_from_environment());
    const KvLayout layout{kv_type == "int8" ? KvType::int8 : KvType::fp16, layers, kv_heads, head_dim};
    const std::int64_t pages = (positions + KvLayout::kPage - 1) / KvLayout::kPage, sequences = prefill ? 1 : rows;
    const std::int64_t count = prefill ? positions : rows;
    const DeviceArray<std::uint8_t> memory(layout.page_bytes() * static_cast<std::size_t>(pages * sequences),
                                           "the benchmark");
    fill_device_memory(memory.get(), 0x11, memory.bytes(), "the benchmark");
    std::vector<std::int32_t> table(static_cast<std::size_t>(pages * sequences)),
        tokens(static_cast<std::size_t>(count));
    for (std::size_t i = 0; i < table.size(); ++i) table[i] = static_cast<std::int32_t>(i);
    std::vector<SequenceRows> step;
    for (std::int64_t i = 0; i < sequences; ++i)
        step.push_back({i, prefill ? positions : 1, prefill ? 0 : positions - 1, table.data() + i * pages});
    const std::vector<float> frequencies(static_cast<std::size_t>(count * head_dim / 2), 1.0f);
    const AttentionCut decode =
        attention_cut(context.queue(), heads / kv_heads, layout.padded_dim(), kv_type == "int8", true);
    StepUpload::Settings settings;
    settings.tile_tokens =
        attention_cut(context.queue(), heads / kv_heads, layout.padded_dim(), kv_type == "int8", false).tile_tokens;
    StepUpload upload(count, head_dim / 2, pages * sequences);
    const StepShape shape =
        upload.send({tokens, {}, step, frequencies.data(), frequencies.data()}, settings, context.stream());
    const auto floats = static_cast<std::size_t>(count * heads * head_dim);
    const DeviceArray<float> q(floats, "the benchmark"), out(floats, "the benchmark");
    fill_device_memory(q.get(), 0, q.bytes(), "the benchmark");
    const DeviceArray<float> partials(
        static_cast<std::size_t>(partial_floats(decode, shape.tasks, kv_heads, layout.padded_dim()) + 1),
        "the benchmark");
    const DeviceArray<std::uint32_t> arrivals(static_cast<std::size_t>(count * heads), "the benchmark");
    fill_device_memory(arrivals.get(), 0, arrivals.bytes(), "the benchmark");
    AttentionArgs args;
    args.step = upload.device();
    args.q = q.get();
    args.out = out.get();
    args.heads = heads;
    args.chunks = shape.chunks;
    args.partials = partials.get();
    args.arrivals = arrivals.get();
    args.cache = {memory.get(),
                  static_cast<std::int64_t>(layout.page_bytes()),
                  static_cast<std::int64_t>(layout.slab_bytes()),
                  kv_heads,
                  head_dim,
                  layout.padded_dim(),
                  kv_type == "int8",
                  static_cast<std::int64_t>(layout.v_offset()),
                  static_cast<std::int64_t>(layout.k_scale_offset()),
                  static_cast<std::int64_t>(layout.v_scale_offset())};
    return time_replays(context, rounds, [&] {
        for (int layer = 0; layer < layers; ++layer) {
            AttentionArgs own = args;
            own.cache.base = memory.get() + static_cast<std::size_t>(layer * kv_heads) * layout.slab_bytes();
            own.tiles = shape.decode_tiles;
            if (own.tiles) attention_decode(context.queue(), own);
            own.first_tile = shape.decode_tiles;
            own.tiles = shape.prefill_tiles;
            if (own.tiles) attention_prefill(context.queue(), own);
        }
    });
}

}  // namespace
}  // namespace cnl::cuda

void bind_cuda_bench(py::module_& module) {
    using namespace cnl::cuda;
    py::module_ bench = module.def_submodule("bench", "What bench/gpu times: seconds of every round.");
    const auto rounds = py::arg("rounds") = 10;
    bench.def("read", &read_seconds, py::arg("mebibytes") = 4096, rounds);
    bench.def("copy", &copy_seconds, py::arg("mebibytes") = 4096, rounds);
    bench.def("launches", &launch_seconds, py::arg("mode"), py::arg("launches") = 1000, rounds);
    bench.def("matmul", &matmul_seconds, py::arg("scheme"), py::arg("rows"), py::arg("cols"), py::arg("tokens"),
              py::arg("epilogue") = "store", py::arg("kernel") = "auto", py::arg("copies") = 8, rounds);
    bench.def("attention", &attention_seconds, py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"),
              py::arg("positions"), py::arg("rows") = 1, py::arg("kv_type") = "fp16", py::arg("prefill") = false,
              py::arg("layers") = 32, rounds);
}
