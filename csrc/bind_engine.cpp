// SPDX-License-Identifier: Apache-2.0
// Engine: Python's view of Model. What comes from a file was checked by bind_model before the
// model is built.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bind_model.hpp"
#include "cpu/bandwidth.hpp"
#include "cpu/cpu_info.hpp"
#include "cpu/own_pages.hpp"
#include "engine_lock.hpp"
#include "map_guard.hpp"
#include "model.hpp"

namespace py = pybind11;
using namespace cnl;
using bind::within;

namespace {

/// Every method may be called from any thread: one is in the engine at a time, the others wait.
class Engine {
 public:
    Engine(const py::dict& config, const py::dict& tensors, int threads, std::int64_t context,
           std::int64_t max_sequences, std::int64_t max_step_tokens, const std::string& kv_type)
        : tensors_(tensors), context_(within("context", context, 1, std::int64_t(1) << 24)), kv_type_(kv_type) {
        within("max_sequences", max_sequences, 1, 4096);
        within("max_step_tokens", max_step_tokens, 1, 65536);
        within("threads", threads, 0, 1024);
        if (kv_type != "fp16" && kv_type != "int8")
            throw py::value_error("kv_type is '" + kv_type + "', expected fp16 or int8");
        for (const auto& [name, entry] : tensors) watch(entry.cast<py::tuple>()[0].cast<bind::Bytes>());
        if (maps_.size() != 1) mapped_ = {};  // what lies between two maps is nobody's
        const ModelConfig c = bind::read_config(config);
        Weights weights = bind::read_weights(tensors_, c);
        model_ =
            std::make_unique<Model>(c, std::move(weights), threads ? threads : cpu::default_threads(), max_step_tokens,
                                    kv_type == "fp16" ? KvType::fp16 : KvType::int8, context_, max_sequences);
    }

    int open(std::int64_t rope_length) {
        within("rope_length", rope_length, 0, std::int64_t(1) << 31);
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
        bind::alone(lock_, [&] { model_->check(entries); });  // before the logits are allocated
        py::array_t<float> logits({Model::output_rows(entries), model_->config().vocab_size});
        float* out = logits.mutable_data();
        {
            py::gil_scoped_release release;
            const std::scoped_lock held(lock_);
            try {
                model_->step(entries, out);
                refuse_damaged();
            } catch (const std::length_error& full) {
                throw std::runtime_error(full.what());  // pybind11 would make a ValueError of it
            }
        }
        return logits;
    }

    std::size_t own_weights(std::int64_t bytes) {
        within("bytes", bytes, 0, std::int64_t(1) << 62);
        const py::gil_scoped_release release;
        const std::scoped_lock held(lock_);
        const auto [begin, end] = mapped_;
        if (!own_) own_ = std::make_unique<cpu::OwnPages>(begin, static_cast<std::size_t>(end - begin));
        if (bytes > 0 && !own_->advance(model_->threads(), static_cast<std::size_t>(bytes)))
            throw std::runtime_error("the system gives no memory for a copy of the weights");
        return own_->left();
    }

    double read_bandwidth() {
        const py::gil_scoped_release release;
        const std::scoped_lock held(lock_);
        const auto [begin, end] = mapped_;
        if (begin == end) throw std::runtime_error("the weights do not lie in one file's map");
        return double(end - begin) / cpu::read_once(model_->threads(), begin, end - begin);
    }

    py::dict memory() {
        py::dict sizes;
        const KvLayout& kv = model_->cache().layout();
        sizes["weights"] = tensors_.bytes();
        sizes["kv_reserved"] = kv.page_bytes() * static_cast<std::size_t>(model_->cache().pages_total());
        sizes["kv_per_token"] = kv.page_bytes() / KvLayout::kPage;
        sizes["scratch"] = model_->scratch_bytes();
        return sizes;
    }

    std::int64_t vocab_size() const { return model_->config().vocab_size; }
    std::int64_t context() const { return context_; }
    int threads() const { return model_->threads().size(); }
    std::int64_t max_step_tokens() const { return model_->max_step_tokens(); }
    const std::string& kv_type() const { return kv_type_; }
    std::int64_t barriers() const { return model_->threads().barriers(); }

 private:
    void watch(const bind::Bytes& weights) {
        const std::uint8_t *begin = weights.data(), *end = begin + weights.nbytes();
        const std::atomic<bool>* flag = map_guard::flag_of(begin);
        if (!flag) return;
        if (std::find(maps_.begin(), maps_.end(), flag) == maps_.end()) maps_.push_back(flag);
        if (!mapped_.first) mapped_ = {begin, end};
        mapped_ = {std::min(mapped_.first, begin), std::max(mapped_.second, end)};
    }
    void refuse_damaged() const {
        for (const std::atomic<bool>* flag : maps_)
            if (flag->load(std::memory_order_acquire))
                throw std::runtime_error("the file with the weights was cut off while it was in use");
    }

    EngineLock lock_{false};
    std::vector<const std::atomic<bool>*> maps_;                    // of the maps that the weights lie in
    std::pair<const std::uint8_t*, const std::uint8_t*> mapped_{};  // from the first to the last weight in the one map
    bind::TensorTable tensors_;
    std::int64_t context_;
    std::string kv_type_;
    std::unique_ptr<Model> model_;
    std::unique_ptr<cpu::OwnPages> own_;
};

}  // namespace

void bind_engine(py::module_& module) {
    py::class_<Engine>(module, "Engine")
        .def(py::init<const py::dict&, const py::dict&, int, std::int64_t, std::int64_t, std::int64_t,
                      const std::string&>(),
             py::arg("config"), py::arg("tensors"), py::kw_only(), py::arg("threads") = 0, py::arg("context") = 2048,
             py::arg("max_sequences") = 1, py::arg("max_step_tokens") = 256, py::arg("kv_type") = "fp16")
        .def("open", &Engine::open, py::arg("rope_length") = 0)
        .def("close", &Engine::close, py::arg("sequence"))
        .def("length", &Engine::length, py::arg("sequence"))
        .def("trim", &Engine::trim, py::arg("sequence"), py::arg("length"))
        .def("step", &Engine::step, py::arg("batch"))
        .def("own_weights", &Engine::own_weights, py::arg("bytes"))
        .def("read_bandwidth", &Engine::read_bandwidth)
        .def("memory", &Engine::memory)
        .def("barriers", &Engine::barriers)
        .def_property_readonly("vocab_size", &Engine::vocab_size)
        .def_property_readonly("context", &Engine::context)
        .def_property_readonly("threads", &Engine::threads)
        .def_property_readonly("max_step_tokens", &Engine::max_step_tokens)
        .def_property_readonly("kv_type", &Engine::kv_type);
    module.def(
        "read_bandwidth",
        [](int threads, std::int64_t mebibytes, int rounds) {
            within("threads", threads, 0, 1024);
            within("mebibytes", mebibytes, 1, 65536);
            within("rounds", rounds, 1, 1000);
            py::gil_scoped_release release;
            return cpu::read_bandwidth(threads ? threads : cpu::default_threads(), mebibytes << 20, rounds);
        },
        py::arg("threads") = 0, py::arg("mebibytes") = 256, py::arg("rounds") = 5);
}
