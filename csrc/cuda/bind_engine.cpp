// SPDX-License-Identifier: Apache-2.0
// Engine on the GPU: the interface of _core.Engine, and decoding that never leaves the device.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../bind_model.hpp"
#include "../model.hpp"
#include "context.hpp"
#include "upload.hpp"

namespace py = pybind11;

namespace cnl::cuda {
namespace {

using Ids = py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>;

constexpr std::size_t kReserve = std::size_t(256) << 20;  // what the driver and fragmentation may take
constexpr std::int64_t kRowAlign = 32;                    // captured steps are padded up to this many rows

/// Calls use(place of a Weight or of a float pointer, number of floats) for every tensor of a model.
template <typename Matrix, typename Vector>
void for_tensors(Weights& w, const ModelConfig& c, Matrix&& matrix, Vector&& vector) {
    matrix(w.embed_tokens);
    matrix(w.lm_head);
    vector(w.norm, c.hidden_size);
    for (LayerWeights& l : w.layers) {
        for (Weight* m : {&l.q_proj, &l.k_proj, &l.v_proj, &l.o_proj, &l.gate_proj, &l.up_proj, &l.down_proj})
            matrix(*m);
        vector(l.input_layernorm, c.hidden_size);
        vector(l.post_attention_layernorm, c.hidden_size);
        vector(l.q_bias, c.q_size());
        vector(l.k_bias, c.kv_size());
        vector(l.v_bias, c.kv_size());
        vector(l.o_bias, c.hidden_size);
        vector(l.gate_bias, c.intermediate_size);
        vector(l.up_bias, c.intermediate_size);
        vector(l.down_bias, c.hidden_size);
    }
}

std::size_t weight_bytes(Weights w, const ModelConfig& c) {
    std::size_t bytes = 0;
    const bool tied = w.lm_head.data == w.embed_tokens.data;
    for_tensors(
        w, c, [&](const Weight& m) { bytes += DeviceWeights::device_bytes(m); },
        [&](const float* v, std::int64_t size) { bytes += v ? DeviceWeights::device_bytes(size) : 0; });
    return tied ? bytes - DeviceWeights::device_bytes(w.lm_head) : bytes;
}

/// What a step works in, about: Model's buffers and the context's.
std::size_t scratch_bytes(const ModelConfig& c, std::int64_t rows) {
    const auto act = [](std::int64_t cols) { return cols + cols / kTileCols * kSumKinds * 4 + cols / kSpan * 4; };
    const std::int64_t a_row = 4 * (2 * c.hidden_size + 2 * c.q_size() + 2 * c.kv_size() + c.intermediate_size) +
                               act(c.hidden_size) + act(c.q_size()) + act(c.intermediate_size);
    return static_cast<std::size_t>(layout::round_up(rows, kTokenAlign) * a_row + kRowAlign * c.vocab_size * 4);
}

struct MemoryPlan {
    std::size_t weights, scratch, kv, per_token, free;
    std::int64_t fitting_context;

    MemoryPlan(const Device& device, const Weights& w, const ModelConfig& c, KvType type, std::int64_t context,
               std::int64_t sequences, std::int64_t rows)
        : weights(weight_bytes(w, c)), scratch(scratch_bytes(c, rows)), free(device.free_bytes) {
        const KvLayout kv_layout{type, c.num_hidden_layers, c.num_key_value_heads, c.head_dim};
        const auto pages = [&](std::int64_t n) { return (n + KvLayout::kPage - 1) / KvLayout::kPage * sequences; };
        per_token = kv_layout.page_bytes() / KvLayout::kPage;
        kv = kv_layout.page_bytes() * static_cast<std::size_t>(pages(context));
        const std::size_t fixed = weights + scratch + kReserve;
        const std::size_t left = free > fixed ? free - fixed : 0;
        fitting_context =
            static_cast<std::int64_t>(left / (kv_layout.page_bytes() * static_cast<std::size_t>(sequences))) *
            KvLayout::kPage;
    }
    /// Throws std::runtime_error naming the context that would fit.
    void refuse_unless_fits(std::int64_t context, const Device& device) const {
        const std::size_t need = weights + scratch + kv + kReserve;
        if (need <= free) return;
        std::string text = "a context of " + std::to_string(context) + " needs " + gibibytes(need) +
                           " of GPU memory and " + gibibytes(free) + " of " + gibibytes(device.total_bytes) +
                           " are free on " + device.name + ": ";
        if (fitting_context >= KvLayout::kPage)
            text +=
                "a context of " + std::to_string(fitting_context) + " fits, --ctx " + std::to_string(fitting_context);
        else
            text += "the weights alone take " + gibibytes(weights) + ", no context fits; use the CPU or a larger GPU";
        throw std::runtime_error(text);
    }
};

class Engine {
 public:
    Engine(const py::dict& config, const py::dict& tensors, int threads, std::int64_t context,
           std::int64_t max_sequences, std::int64_t max_step_tokens, const std::string& kv_type)
        : context_length_(bind::within("context", context, 1, std::int64_t(1) << 24)),
          max_step_tokens_(bind::within("max_step_tokens", max_step_tokens, 1, 65536)),
          kv_type_(kv_type),
          device_(usable_device()) {
        bind::within("max_sequences", max_sequences, 1, 4096);
        bind::within("threads", threads, 0, 1024);
        if (kv_type != "fp16" && kv_type != "int8")
            throw py::value_error("kv_type is '" + kv_type + "', expected fp16 or int8");
        const KvType type = kv_type == "fp16" ? KvType::fp16 : KvType::int8;
        const ModelConfig c = bind::read_config(config);
        bind::TensorTable table(tensors);
        Weights weights = bind::read_weights(table, c);
        for (std::size_t i = 0; i < weights.layers.size(); ++i)
            if (weights.layers[i].gate_proj.scheme != weights.layers[i].up_proj.scheme)
                throw py::value_error("layer " + std::to_string(i) +
                                      ": gate_proj and up_proj have different schemes; "
                                      "convert the model again with one for both");
        const std::int64_t rows = layout::round_up(max_step_tokens, kRowAlign);
        const MemoryPlan plan(device_, weights, c, type, context, max_sequences, rows);
        plan.refuse_unless_fits(context, device_);
        per_token_ = plan.per_token;
        py::gil_scoped_release release;
        upload(weights, c, plan.weights);
        model_ = std::make_unique<Model>(c, std::move(weights), 1, rows, type, context, max_sequences);
        device_context().reserve(model_->cache().layout(), c.num_attention_heads, rows, model_->cache().pages_total(),
                                 c.vocab_size);
    }

    int open(std::int64_t rope_length) {
        return model_->open(bind::within("rope_length", rope_length, 0, std::int64_t(1) << 31));
    }
    void close(int sequence) { model_->close(sequence); }
    std::int64_t length(int sequence) { return model_->cache().length(sequence); }
    void trim(int sequence, std::int64_t length) { model_->cache().trim(sequence, length); }

    py::array_t<float> step(const std::vector<std::tuple<int, Ids, bool>>& batch) {
        std::vector<StepEntry> entries;
        for (const auto& [sequence, ids, all_logits] : batch) {
            if (ids.ndim() != 1) throw py::value_error("token ids must be a one-dimensional array");
            entries.push_back({sequence, {ids.data(), static_cast<std::size_t>(ids.size())}, all_logits});
        }
        model_->check(entries);
        check_limit(entries);
        const std::int64_t rows = Model::output_rows(entries), vocab = model_->config().vocab_size;
        py::array_t<float> logits({rows, vocab});
        float* out = logits.mutable_data();
        const auto bytes = static_cast<std::size_t>(rows * vocab) * sizeof(float);
        {
            py::gil_scoped_release release;
            guarded(entries, [&] {
                Context& context = device_context();
                float* on_device = context.logits(rows);
                context.choose = context.from_device = false;
                model_->step(entries, on_device);
                fetch(out, on_device, bytes);
            });
        }
        return logits;
    }

    /// Greedy tokens [count, sequences], each step's chosen on the device from the one before.
    py::array_t<std::int32_t> generate(const std::vector<int>& sequences, const Ids& first, std::int64_t count) {
        if (first.ndim() != 1 || static_cast<std::size_t>(first.size()) != sequences.size())
            throw py::value_error("there must be one token for every sequence");
        bind::within("count", count, 1, std::int64_t(1) << 20);
        std::vector<StepEntry> entries;
        for (std::size_t i = 0; i < sequences.size(); ++i)
            entries.push_back({sequences[i], {first.data() + i, 1}, false});
        model_->check(entries);
        check_limit(entries);
        const auto n = static_cast<std::int64_t>(sequences.size());
        py::array_t<std::int32_t> chosen({count, n});
        std::int32_t* out = chosen.mutable_data();
        const PinnedBytes ring(static_cast<std::size_t>(count * n) * 4, "the chosen tokens");
        auto* tokens = reinterpret_cast<std::int32_t*>(ring.get());
        {
            py::gil_scoped_release release;
            guarded(entries, [&] {
                Context& context = device_context();
                float* logits = context.logits(n);
                for (std::int64_t i = 0; i < count; ++i) {
                    context.choose = true;
                    context.from_device = i > 0;
                    model_->step(entries, logits);
                    check(cudaMemcpyAsync(tokens + i * n, context.chosen(), static_cast<std::size_t>(n) * 4,
                                          cudaMemcpyDeviceToHost, context.stream().get()),
                          "reading the chosen tokens");
                }
                context.stream().wait();
                if (std::any_of(tokens, tokens + count * n, [](std::int32_t id) { return id < 0; }))
                    throw std::runtime_error("the logits of a step are not numbers");
                std::memcpy(out, tokens, static_cast<std::size_t>(count * n) * 4);
            });
        }
        return chosen;
    }

    py::dict memory() {
        py::dict sizes;
        const KvLayout& kv = model_->cache().layout();
        sizes["weights"] = weights_->bytes();
        sizes["kv_reserved"] = kv.page_bytes() * static_cast<std::size_t>(model_->cache().pages_total());
        sizes["kv_per_token"] = per_token_;
        sizes["scratch"] = scratch_bytes(model_->config(), model_->max_step_tokens()) + device_context().bytes();
        return sizes;
    }

    std::int64_t vocab_size() const { return model_->config().vocab_size; }
    std::int64_t context() const { return context_length_; }
    int threads() const { return 1; }
    std::int64_t max_step_tokens() const { return max_step_tokens_; }
    const std::string& kv_type() const { return kv_type_; }
    const std::string& device() const { return device_.name; }
    std::int64_t replays() { return device_context().replays(); }

 private:
    Context& device_context() { return context_of(model_->threads()); }

    void upload(Weights& weights, const ModelConfig& c, std::size_t bytes) {
        const Context loader(device_, options_from_environment());
        weights_ = std::make_unique<DeviceWeights>(loader, bytes);
        for_tensors(
            weights, c, [&](Weight& m) { m = weights_->upload(m); },
            [&](const float*& v, std::int64_t size) { v = weights_->upload(v, size); });
        weights_->finish();
    }

    /// The model has room for more rows than were asked for.
    void check_limit(const std::vector<StepEntry>& entries) const {
        std::int64_t tokens = 0;
        for (const StepEntry& entry : entries) tokens += static_cast<std::int64_t>(entry.tokens.size());
        if (tokens > max_step_tokens_)
            throw py::value_error("a step of " + std::to_string(tokens) + " tokens is over the limit of " +
                                  std::to_string(max_step_tokens_));
    }

    /// Runs `work`; when it fails the cache is as it was before.
    template <typename Work>
    void guarded(const std::vector<StepEntry>& entries, Work&& work) {
        std::vector<std::int64_t> lengths;
        for (const StepEntry& entry : entries) lengths.push_back(model_->cache().length(entry.sequence));
        const auto undo = [&] {
            for (std::size_t i = 0; i < entries.size(); ++i) model_->cache().trim(entries[i].sequence, lengths[i]);
        };
        try {
            work();
        } catch (const std::length_error& full) {
            undo();
            throw std::runtime_error(full.what());  // pybind11 would make a ValueError of it
        } catch (...) {
            undo();
            throw;
        }
    }

    void fetch(float* out, const float* on_device, std::size_t bytes) {
        constexpr std::size_t kPinned = std::size_t(8) << 20;
        const Stream& stream = device_context().stream();
        if (bytes > kPinned) {
            check(cudaMemcpyAsync(out, on_device, bytes, cudaMemcpyDeviceToHost, stream.get()), "reading the logits");
            stream.wait();
            return;
        }
        if (landing_.size() < bytes) landing_ = PinnedBytes(kPinned, "the logits");
        check(cudaMemcpyAsync(landing_.get(), on_device, bytes, cudaMemcpyDeviceToHost, stream.get()),
              "reading the logits");
        stream.wait();
        std::memcpy(out, landing_.get(), bytes);
    }

    std::int64_t context_length_, max_step_tokens_;
    std::string kv_type_;
    Device device_;
    std::size_t per_token_ = 0;
    std::unique_ptr<DeviceWeights> weights_;
    std::unique_ptr<Model> model_;
    PinnedBytes landing_;
};

py::dict describe() {
    const Device d = find_device();
    py::dict result;
    result["problem"] = d.problem;
    result["name"] = d.name;
    result["compute_capability"] = std::to_string(d.major) + "." + std::to_string(d.minor);
    result["processors"] = d.processors;
    result["driver"] = d.driver;
    result["runtime"] = d.runtime;
    result["free_bytes"] = d.free_bytes;
    result["total_bytes"] = d.total_bytes;
    return result;
}

}  // namespace
}  // namespace cnl::cuda

void bind_cuda_engine(py::module_& module) {
    using cnl::cuda::Engine;
    module.attr("PAGE_SIZE") = static_cast<int>(cnl::KvLayout::kPage);
    module.def("device", &cnl::cuda::describe);
    py::class_<Engine>(module, "Engine", py::module_local())
        .def(py::init<const py::dict&, const py::dict&, int, std::int64_t, std::int64_t, std::int64_t,
                      const std::string&>(),
             py::arg("config"), py::arg("tensors"), py::kw_only(), py::arg("threads") = 0, py::arg("context") = 2048,
             py::arg("max_sequences") = 1, py::arg("max_step_tokens") = 2048, py::arg("kv_type") = "fp16")
        .def("open", &Engine::open, py::arg("rope_length") = 0)
        .def("close", &Engine::close, py::arg("sequence"))
        .def("length", &Engine::length, py::arg("sequence"))
        .def("trim", &Engine::trim, py::arg("sequence"), py::arg("length"))
        .def("step", &Engine::step, py::arg("batch"))
        .def("generate", &Engine::generate, py::arg("sequences"), py::arg("first"), py::arg("count"))
        .def("memory", &Engine::memory)
        .def("replays", &Engine::replays)
        .def_property_readonly("vocab_size", &Engine::vocab_size)
        .def_property_readonly("context", &Engine::context)
        .def_property_readonly("threads", &Engine::threads)
        .def_property_readonly("max_step_tokens", &Engine::max_step_tokens)
        .def_property_readonly("kv_type", &Engine::kv_type)
        .def_property_readonly("device", &Engine::device);
}
