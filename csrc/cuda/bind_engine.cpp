// SPDX-License-Identifier: Apache-2.0
// Engine on the GPU: the interface of _core.Engine, and decoding that never leaves the device.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "../bind_model.hpp"
#include "../engine_lock.hpp"
#include "../model.hpp"
#include "context.hpp"
#include "memory_plan.hpp"
#include "upload.hpp"

namespace py = pybind11;

namespace cnl::cuda {
namespace {

constexpr std::int64_t kMaxStepTokens = 65504;  // grids have 65,535 rows at most, and a step is rounded up to 32

/// Refuses weights that no kernel reads.
void require_kernels(const py::dict& tensors) {
    for (const auto& [name, entry] : tensors) {
        const auto scheme = entry.cast<py::tuple>()[1].cast<std::string>();
        if (scheme != "f32" && scheme_number(scheme) < 0)
            throw py::value_error(name.cast<std::string>() + " is stored as " + scheme +
                                  ", and the GPU has kernels for " + scheme_list() +
                                  " only: convert the model with one of these, or leave --device cuda out");
    }
}

/// Every method may be called from any thread: one is in the engine at a time, the others wait.
class Engine {
 public:
    Engine(const py::dict& config, const py::dict& tensors, int threads, std::int64_t context,
           std::int64_t max_sequences, std::int64_t max_step_tokens, const std::string& kv_type)
        : context_length_(bind::within("context", context, 1, std::int64_t(1) << 24)),
          max_step_tokens_(bind::within("max_step_tokens", max_step_tokens, 1, kMaxStepTokens)),
          kv_type_(kv_type),
          device_(usable_device()) {
        bind::within("max_sequences", max_sequences, 1, 4096);
        bind::within("threads", threads, 0, 1024);
        if (kv_type != "fp16" && kv_type != "int8")
            throw py::value_error("kv_type is '" + kv_type + "', expected fp16 or int8");
        const KvType type = kv_type == "fp16" ? KvType::fp16 : KvType::int8;
        const ModelConfig c = bind::read_config(config);
        require_kernels(tensors);
        bind::TensorTable table(tensors);
        Weights weights = bind::read_weights(table, c);
        for (std::size_t i = 0; i < weights.layers.size(); ++i)
            if (weights.layers[i].gate_proj.scheme != weights.layers[i].up_proj.scheme)
                throw py::value_error("layer " + std::to_string(i) +
                                      ": gate_proj and up_proj have different schemes; "
                                      "convert the model again with one for both");
        const std::int64_t rows = layout::round_up(max_step_tokens, kGraphRows);
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
        bind::within("rope_length", rope_length, 0, std::int64_t(1) << 31);
        return bind::alone(lock_, [&] { return model_->open(rope_length); });
    }
    void close(int sequence) {
        bind::alone(lock_, [&] { model_->close(sequence); });
    }
    std::int64_t length(int sequence) {
        return bind::alone(lock_, [&] { return model_->cache().length(sequence); });
    }
    void trim(int sequence, std::int64_t length) {
        bind::alone(lock_, [&] { model_->cache().trim(sequence, length); });
    }

    py::array_t<float> step(const bind::Batch& batch) {
        const bind::StepBatch given(batch);
        const std::vector<StepEntry>& entries = given.entries();
        check_step(entries);
        const std::int64_t rows = Model::output_rows(entries), vocab = model_->config().vocab_size;
        py::array_t<float> logits({rows, vocab});
        float* out = logits.mutable_data();
        const auto bytes = static_cast<std::size_t>(rows * vocab) * sizeof(float);
        {
            py::gil_scoped_release release;
            const std::scoped_lock held(lock_);
            guarded(entries, [&] {
                Context& context = device_context();
                float* on_device = context.logits(rows);
                context.pick = {};
                model_->step(entries, on_device);
                fetch(out, on_device, bytes);
            });
        }
        return logits;
    }

    /// (ids, logits) [rows, k] of the k largest, chosen on the device.
    py::tuple step_top(const bind::Batch& batch, std::int64_t k) {
        bind::within("k", k, 1, max_top());
        const bind::StepBatch given(batch);
        const std::vector<StepEntry>& entries = given.entries();
        check_step(entries);
        const std::int64_t rows = Model::output_rows(entries);
        const int width = std::max(kLeastTop, static_cast<int>(std::bit_ceil(static_cast<unsigned>(k))));
        py::array_t<std::int32_t> ids({rows, k});
        py::array_t<float> values({rows, k});
        std::int32_t* to_ids = ids.mutable_data();
        float* to_values = values.mutable_data();
        {
            py::gil_scoped_release release;
            const std::scoped_lock held(lock_);
            guarded(entries, [&] {
                Context& context = device_context();
                float* on_device = context.logits(rows);
                context.reserve_top(rows, width);
                context.pick = {};
                context.pick.top = width;
                model_->step(entries, on_device);
                fetch_columns(to_ids, context.top_ids(), rows, k, width);
                fetch_columns(to_values, context.top_values(), rows, k, width);
            });
        }
        return py::make_tuple(ids, values);
    }

    /// Greedy tokens [count, sequences], each step's chosen on the device from the one before.
    py::array_t<std::int32_t> generate(const std::vector<int>& sequences, const bind::Ids& first, std::int64_t count) {
        if (first.ndim() != 1 || static_cast<std::size_t>(first.size()) != sequences.size())
            throw py::value_error("there must be one token for every sequence");
        bind::within("count", count, 1, std::int64_t(1) << 20);
        const std::vector<std::int32_t> ids(first.data(), first.data() + first.size());
        std::vector<StepEntry> entries;
        for (std::size_t i = 0; i < sequences.size(); ++i) entries.push_back({sequences[i], {&ids[i], 1}, false});
        check_step(entries);
        const auto n = static_cast<std::int64_t>(sequences.size());
        py::array_t<std::int32_t> chosen({count, n});
        std::int32_t* out = chosen.mutable_data();
        const PinnedBytes ring(static_cast<std::size_t>(count * n) * 4, "the chosen tokens");
        auto* tokens = reinterpret_cast<std::int32_t*>(ring.get());
        {
            py::gil_scoped_release release;
            const std::scoped_lock held(lock_);
            guarded(entries, [&] {
                Context& context = device_context();
                float* logits = context.logits(n);
                for (std::int64_t i = 0; i < count; ++i) {
                    context.pick = {.best = true, .from_device = i > 0};
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
        const std::size_t own = bind::alone(lock_, [&] { return device_context().bytes(); });
        sizes["weights"] = weights_->bytes();
        sizes["kv_reserved"] = kv.page_bytes() * static_cast<std::size_t>(model_->cache().pages_total());
        sizes["kv_per_token"] = per_token_;
        sizes["scratch"] = scratch_bytes(model_->config(), model_->max_step_tokens()) + own;
        return sizes;
    }

    std::int64_t vocab_size() const { return model_->config().vocab_size; }
    std::int64_t context() const { return context_length_; }
    int threads() const { return 1; }
    std::int64_t max_step_tokens() const { return max_step_tokens_; }
    std::int64_t max_top() const { return std::min<std::int64_t>(vocab_size(), kMaxTop); }
    const std::string& kv_type() const { return kv_type_; }
    const std::string& device() const { return device_.name; }
    std::int64_t replays() {
        return bind::alone(lock_, [&] { return device_context().replays(); });
    }
    std::int64_t graphs() {
        return bind::alone(lock_, [&] { return device_context().graphs(); });
    }

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

    /// Throws for a step that cannot run; the model itself has room for more rows than were asked for.
    void check_step(const std::vector<StepEntry>& entries) {
        bind::alone(lock_, [&] { model_->check(entries); });
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
            // What was asked for may still be under way: copies to memory that the caller frees now.
            static_cast<void>(cudaStreamSynchronize(device_context().stream().get()));
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

    void fetch(void* out, const void* on_device, std::size_t bytes) {
        constexpr std::size_t kPinned = std::size_t(8) << 20;
        const Stream& stream = device_context().stream();
        if (bytes > kPinned) {
            check(cudaMemcpyAsync(out, on_device, bytes, cudaMemcpyDeviceToHost, stream.get()), "reading the result");
            stream.wait();
            return;
        }
        if (landing_.size() < bytes) landing_ = PinnedBytes(kPinned, "the logits");
        check(cudaMemcpyAsync(landing_.get(), on_device, bytes, cudaMemcpyDeviceToHost, stream.get()),
              "reading the result");
        stream.wait();
        std::memcpy(out, landing_.get(), bytes);
    }

    /// The first `k` of `width` columns.
    template <typename T>
    void fetch_columns(T* out, const T* on_device, std::int64_t rows, std::int64_t k, int width) {
        std::vector<T> all(static_cast<std::size_t>(rows * width));
        fetch(all.data(), on_device, all.size() * sizeof(T));
        for (std::int64_t i = 0; i < rows; ++i) std::copy_n(all.data() + i * width, k, out + i * k);
    }

    EngineLock lock_{true};
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
    module.attr("SCHEMES") =
        py::tuple(py::cast(std::vector<std::string>(cnl::cuda::kSchemeNames.begin(), cnl::cuda::kSchemeNames.end())));
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
        .def("step_top", &Engine::step_top, py::arg("batch"), py::arg("k"))
        .def("generate", &Engine::generate, py::arg("sequences"), py::arg("first"), py::arg("count"))
        .def("memory", &Engine::memory)
        .def("replays", &Engine::replays)
        .def("graphs", &Engine::graphs)
        .def_property_readonly("vocab_size", &Engine::vocab_size)
        .def_property_readonly("context", &Engine::context)
        .def_property_readonly("threads", &Engine::threads)
        .def_property_readonly("max_step_tokens", &Engine::max_step_tokens)
        .def_property_readonly("max_top", &Engine::max_top)
        .def_property_readonly("kv_type", &Engine::kv_type)
        .def_property_readonly("device", &Engine::device);
}
