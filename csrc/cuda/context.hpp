// SPDX-License-Identifier: Apache-2.0
// One engine's view of the device: a stream, the step under way, and captured steps.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "../ops.hpp"
#include "check.hpp"
#include "kernels.hpp"
#include "step.hpp"

namespace cnl::cuda {

class Context;
/// The context behind a thread pool of this back end.
Context& context_of(ThreadPool& pool);

/// What device 0 is. `problem` is one sentence when it cannot be used, else empty.
struct Device {
    std::string name, problem;
    int major = 0, minor = 0, processors = 0, driver = 0, runtime = 0;
    std::size_t free_bytes = 0, total_bytes = 0, shared_limit = 0;
};
Device find_device();
/// The same, as CudaError when there is a problem.
Device usable_device();

inline constexpr int kGraphRows = 32;  // captured steps have this many rows at most
inline constexpr int kLeastTop = 32;   // few widths, few graphs
inline constexpr int kMaxGraphs = 32;  // captured steps that are kept

struct Options {
    bool graphs = true;       // decode steps are captured once and replayed
    bool early_start = true;  // where the device can
    bool dp4a = false;        // products of one token by dp4a instead of mma
    bool wait_each = false;   // every launch is waited for
};
/// CNLLAMA_CUDA_OPTIONS: words out of no-graphs, no-early-start, dp4a, wait. Throws std::invalid_argument for others.
Options options_from_environment();

class Context {
 public:
    Context(const Device& device, const Options& options);
    ~Context();

    const Queue& queue() const { return queue_; }
    const Stream& stream() const { return stream_; }
    const Options& options() const { return options_; }

    /// Runs a forward pass on what `inputs` says; `forward` launches kernels through ops. Asynchronous.
    void run(const ops::StepInputs& inputs, const std::function<void()>& forward);

    // What the ops read while `forward` runs.
    const StepShape& shape() const { return shape_; }
    const StepRows& step() const { return upload_->device(); }
    /// Rows or outputs of the step for the number the model gives: a captured step may have more.
    int padded(std::int64_t count) const { return padded_ ? shape_.rows : static_cast<int>(count); }
    AttentionArgs attention_args(const KvCache& cache, int layer, int heads) const;
    const std::int32_t* chosen() const { return chosen_.get(); }

    /// Room for the sizes of a model; before the first run.
    void reserve(const KvLayout& layout, int heads, std::int64_t rows, std::int64_t pages, std::int64_t vocab);
    /// float [rows, vocab] of device memory, valid until more rows are asked for.
    float* logits(std::int64_t rows);
    std::size_t bytes() const;

    /// What a step chooses on the device, beside its logits.
    struct Pick {
        bool best = false;         // the most likely token of every output: chosen()
        bool from_device = false;  // the tokens of the step are those that the one before chose so
        int top = 0;               // the most likely ones, that many: top_ids(), top_values() [outputs, top]
    };
    Pick pick;
    /// Room for Pick::top of that many outputs, a power of two, kLeastTop .. kMaxTop; before the step.
    void reserve_top(std::int64_t rows, int width);
    const std::int32_t* top_ids() const { return top_ids_.get(); }
    const float* top_values() const { return top_values_.get(); }
    std::int64_t replays() const { return replays_; }
    std::int64_t graphs() const { return static_cast<std::int64_t>(graphs_.size()); }

    /// The context of the run that this thread is in.
    static Context& current();

 private:
    struct Graph;
    using Key = std::tuple<int, int, bool, int>;  // rows, chunks, best, top
    void forget_graphs();
    void forget_oldest_graph();
    void replay(const Key& key, const std::function<void()>& work);

    Options options_;
    Stream stream_;
    Queue queue_;
    std::unique_ptr<StepUpload> upload_;
    StepShape shape_;
    bool padded_ = false;
    KvLayout layout_;
    int heads_ = 0;
    std::int64_t max_rows_ = 0, vocab_ = 0;
    AttentionCut decode_cut_{}, prefill_cut_{};
    DeviceArray<float> partials_, logits_, best_values_, top_values_;
    DeviceArray<std::int32_t> best_ids_, chosen_, top_ids_;
    DeviceArray<std::uint64_t> top_scratch_;
    DeviceArray<std::uint32_t> arrivals_;
    std::map<Key, std::unique_ptr<Graph>> graphs_;  // at most kMaxGraphs
    std::int64_t uses_ = 0;                         // of graphs, counted: the age of each
    std::int64_t replays_ = 0;
};

}  // namespace cnl::cuda
