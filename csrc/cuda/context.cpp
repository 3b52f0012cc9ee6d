// SPDX-License-Identifier: Apache-2.0
#include "context.hpp"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

namespace cnl::cuda {

namespace {

thread_local Context* t_current = nullptr;

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

int attribute(cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, 0), "asking what the GPU can do");
    return value;
}

template <typename T>
DeviceArray<T> zeroed(std::size_t count, const char* what) {
    DeviceArray<T> array(count, what);
    fill_device_memory(array.get(), 0, array.bytes(), what);
    return array;
}

}  // namespace

Device find_device() {
    Device device;
    int count = 0;
    static_cast<void>(cudaRuntimeGetVersion(&device.runtime));
    static_cast<void>(cudaDriverGetVersion(&device.driver));
    const cudaError_t error = cudaGetDeviceCount(&count);
    static_cast<void>(cudaGetLastError());
    if (device.driver == 0) {
        device.problem = "there is no NVIDIA driver on this machine: install one, or leave --device cuda out";
    } else if (error == cudaErrorInsufficientDriver) {
        device.problem = "the NVIDIA driver is too old: it is of CUDA " + version(device.driver) +
                         " and this build needs CUDA " + version(device.runtime) + "; install a newer driver";
    } else if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
        device.problem =
            "there is no NVIDIA GPU that this process may use: check CUDA_VISIBLE_DEVICES, or leave --device "
            "cuda out";
    } else if (error != cudaSuccess) {
        device.problem = std::string("the NVIDIA driver answers ") + cudaGetErrorName(error) + " (" +
                         cudaGetErrorString(error) + ")";
    }
    if (!device.problem.empty()) return device;
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, 0), "asking what the GPU is");
    device.name = properties.name;
    device.major = properties.major;
    device.minor = properties.minor;
    device.processors = properties.multiProcessorCount;
    device.shared_limit = static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    if (device.major * 10 + device.minor < 75) {
        device.problem = device.name + " is of compute capability " + std::to_string(device.major) + "." +
                         std::to_string(device.minor) + ", and 7.5 (Turing) or later is needed";
        return device;
    }
    check(cudaMemGetInfo(&device.free_bytes, &device.total_bytes), "asking how much GPU memory is free");
    return device;
}

Device usable_device() {
    Device device = find_device();
    if (!device.problem.empty()) throw CudaError(device.problem, cudaErrorNoDevice, false);
    return device;
}

Options options_from_environment() {
    Options options;
    const char* text = std::getenv("CNLLAMA_CUDA_OPTIONS");
    std::istringstream words(text ? text : "");
    for (std::string word; words >> word;) {
        if (word == "no-graphs")
            options.graphs = false;
        else if (word == "no-early-start")
            options.early_start = false;
        else if (word == "dp4a")
            options.dp4a = true;
        else if (word == "wait")
            options.wait_each = true;
        else
            throw std::invalid_argument("CNLLAMA_CUDA_OPTIONS has '" + word +
                                        "', expected no-graphs, no-early-start, dp4a or wait");
    }
    if (options.wait_each) options.graphs = false;  // a capture cannot be waited for
    return options;
}

/// A step that was seen once runs as it is; from the second time on it is captured and replayed. So everything that a
/// first launch does behind the scenes is done before a capture, and a step that never comes back costs no capture.
struct Context::Graph {
    cudaGraphExec_t exec = nullptr;
    std::int64_t used = 0;
    ~Graph() {
        if (exec) static_cast<void>(cudaGraphExecDestroy(exec));
    }
};

Context::Context(const Device& device, const Options& options) : options_(options) {
    queue_.stream = stream_.get();
    queue_.processors = device.processors;
    queue_.shared_limit = device.shared_limit;
    queue_.early_start = options.early_start && device.major >= 9 && waits_for_previous();
    queue_.wait_each = options.wait_each;
}

Context::~Context() { static_cast<void>(cudaStreamSynchronize(stream_.get())); }

Context& Context::current() {
    if (!t_current) throw std::logic_error("an op was called outside of a run");
    return *t_current;
}

void Context::reserve(const KvLayout& layout, int heads, std::int64_t rows, std::int64_t pages, std::int64_t vocab) {
    layout_ = layout;
    heads_ = heads;
    max_rows_ = rows;
    vocab_ = vocab;
    const int group = heads / layout.kv_heads;
    const bool int8 = layout.type == KvType::int8;
    decode_cut_ = attention_cut(queue_, group, layout.padded_dim(), int8, true);
    prefill_cut_ = attention_cut(queue_, group, layout.padded_dim(), int8, false);
    upload_ = std::make_unique<StepUpload>(rows, layout.head_dim / 2, pages + rows);
    const auto n = static_cast<std::size_t>(rows);
    arrivals_ = zeroed<std::uint32_t>(n * static_cast<std::size_t>(heads), "counters of attention");
    chosen_ = zeroed<std::int32_t>(n, "chosen tokens");
    best_values_ = zeroed<float>(n * kArgmaxParts, "the choice of tokens");
    best_ids_ = zeroed<std::int32_t>(n * kArgmaxParts, "the choice of tokens");
}

float* Context::logits(std::int64_t rows) {
    rows = std::max<std::int64_t>(rows, kGraphRows);
    if (logits_.size() < static_cast<std::size_t>(rows * vocab_)) {
        forget_graphs();
        logits_ = {};
        logits_ = zeroed<float>(static_cast<std::size_t>(rows * vocab_), "the logits of a step");
    }
    return logits_.get();
}

void Context::reserve_top(std::int64_t rows, int width) {
    rows = std::max<std::int64_t>(rows, kGraphRows);
    const auto keys = static_cast<std::size_t>(top_keys(rows, vocab_, width)),
               count = static_cast<std::size_t>(rows * width);
    if (top_scratch_.size() >= keys && top_ids_.size() >= count && top_values_.size() >= count) return;
    forget_graphs();
    top_scratch_ = {};
    top_ids_ = {};
    top_values_ = {};
    top_scratch_ = DeviceArray<std::uint64_t>(keys, "the choice of tokens");
    top_ids_ = DeviceArray<std::int32_t>(count, "the choice of tokens");
    top_values_ = DeviceArray<float>(count, "the choice of tokens");
}

std::size_t Context::bytes() const {
    return partials_.bytes() + logits_.bytes() + best_values_.bytes() + best_ids_.bytes() + chosen_.bytes() +
           arrivals_.bytes() + top_scratch_.bytes() + top_ids_.bytes() + top_values_.bytes();
}

void Context::forget_graphs() {
    if (graphs_.empty()) return;
    stream_.wait();
    graphs_.clear();
}

void Context::forget_oldest_graph() {
    if (graphs_.size() <= static_cast<std::size_t>(kMaxGraphs)) return;
    const auto older = [](const auto& a, const auto& b) { return a.second->used < b.second->used; };
    stream_.wait();  // it may be running
    graphs_.erase(std::min_element(graphs_.begin(), graphs_.end(), older));
}

AttentionArgs Context::attention_args(const KvCache& cache, int layer, int heads) const {
    const KvLayout& layout = cache.layout();
    AttentionArgs a;
    a.step = step();
    a.cache.base = cache.slab(0, layer, 0);
    a.cache.page_stride = static_cast<std::int64_t>(layout.page_bytes());
    a.cache.slab_stride = static_cast<std::int64_t>(layout.slab_bytes());
    a.cache.kv_heads = layout.kv_heads;
    a.cache.head_dim = layout.head_dim;
    a.cache.padded_dim = layout.padded_dim();
    a.cache.int8 = layout.type == KvType::int8;
    a.cache.v_offset = static_cast<std::int64_t>(layout.v_offset());
    a.cache.k_scale_offset = static_cast<std::int64_t>(layout.k_scale_offset());
    a.cache.v_scale_offset = static_cast<std::int64_t>(layout.v_scale_offset());
    a.heads = heads;
    a.chunks = shape_.chunks;
    a.partials = partials_.get();
    a.arrivals = arrivals_.get();
    return a;
}

void Context::run(const ops::StepInputs& inputs, const std::function<void()>& forward) {
    shape_ = upload_->shape_of(inputs);
    padded_ = options_.graphs && shape_.single && shape_.rows <= kGraphRows &&
              std::bit_ceil(static_cast<unsigned>(shape_.rows)) <= static_cast<unsigned>(max_rows_);
    StepUpload::Settings settings;
    settings.tile_tokens = prefill_cut_.tile_tokens;
    settings.from_device = pick.from_device;
    if (padded_) settings.padded_rows = static_cast<int>(std::bit_ceil(static_cast<unsigned>(shape_.rows)));

    const auto floats =
        static_cast<std::size_t>(partial_floats(decode_cut_, shape_.tasks, layout_.kv_heads, layout_.padded_dim()));
    if (floats > partials_.size()) {
        forget_graphs();
        stream_.wait();
        partials_ = {};
        partials_ = DeviceArray<float>(std::bit_ceil(floats), "partial results of attention");
    }
    shape_ = upload_->send(inputs, settings, stream_);
    if (padded_) shape_.chunks = static_cast<int>(std::bit_ceil(static_cast<unsigned>(shape_.chunks)));

    struct Scope {
        explicit Scope(Context* context) { t_current = context; }
        ~Scope() { t_current = nullptr; }
    } const scope(this);
    const auto work = [&] {
        forward();
        if (pick.best)
            argmax(queue_, logits_.get(), shape_.outputs, static_cast<int>(vocab_), chosen_.get(), best_values_.get(),
                   best_ids_.get());
        if (pick.top)
            top_logits(queue_, logits_.get(), shape_.outputs, static_cast<int>(vocab_), pick.top, top_ids_.get(),
                       top_values_.get(), top_scratch_.get());
    };
    if (padded_)
        replay({shape_.rows, shape_.chunks, pick.best, pick.top}, work);
    else
        work();
}

void Context::replay(const Key& key, const std::function<void()>& work) {
    const auto [found, is_new] = graphs_.try_emplace(key);
    if (is_new) {
        found->second = std::make_unique<Graph>();
        found->second->used = ++uses_;
        forget_oldest_graph();
        work();
        return;
    }
    found->second->used = ++uses_;
    cudaGraphExec_t& exec = found->second->exec;
    if (!exec) {
        cudaGraph_t graph = nullptr;
        check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), "capturing a step");
        try {
            work();
        } catch (...) {
            static_cast<void>(cudaStreamEndCapture(stream_.get(), &graph));
            if (graph) static_cast<void>(cudaGraphDestroy(graph));
            static_cast<void>(cudaGetLastError());
            throw;
        }
        check(cudaStreamEndCapture(stream_.get(), &graph), "capturing a step");
        const cudaError_t error = cudaGraphInstantiate(&exec, graph, 0);
        static_cast<void>(cudaGraphDestroy(graph));
        if (error != cudaSuccess) exec = nullptr;
        check(error, "preparing a captured step");
    }
    check(cudaGraphLaunch(exec, stream_.get()), "running a captured step");
    ++replays_;
}

}  // namespace cnl::cuda
