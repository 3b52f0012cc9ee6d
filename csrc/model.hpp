// SPDX-License-Identifier: Apache-2.0
// LLaMA: configuration, weights and the forward pass. Nothing here knows which back end runs the ops.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kv_cache.hpp"
#include "ops.hpp"
#include "rope.hpp"
#include "threads.hpp"

namespace cnl {

struct ModelConfig {
    std::int64_t hidden_size = 0, intermediate_size = 0, vocab_size = 0;
    int num_hidden_layers = 0, num_attention_heads = 0, num_key_value_heads = 0, head_dim = 0;
    std::int64_t max_position_embeddings = 0;
    float rms_norm_eps = 0;
    RopeConfig rope;

    std::int64_t q_size() const { return std::int64_t(num_attention_heads) * head_dim; }
    std::int64_t kv_size() const { return std::int64_t(num_key_value_heads) * head_dim; }
};

/// The names are Hugging Face's. Biases and lm_head (tied embeddings) may be absent: null.
struct LayerWeights {
    const float* input_layernorm = nullptr;           // [hidden]
    const float* post_attention_layernorm = nullptr;  // [hidden]
    Weight q_proj, k_proj, v_proj, o_proj;            // [q_size, hidden] [kv_size, hidden] x2 [hidden, q_size]
    Weight gate_proj, up_proj, down_proj;             // [intermediate, hidden] x2 [hidden, intermediate]
    const float *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr, *o_bias = nullptr;
    const float *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;
};

struct Weights {
    Weight embed_tokens;          // [vocab, hidden]
    const float* norm = nullptr;  // [hidden]
    Weight lm_head;               // [vocab, hidden]; the embedding itself when tied
    std::vector<LayerWeights> layers;
};

/// One entry of a step: tokens of one sequence that follow what its cache holds.
struct StepEntry {
    int sequence = 0;
    std::span<const std::int32_t> tokens;
    bool all_logits = false;
};

class Model {
 public:
    /// The tensors that `weights` points to must outlive the model and have the sizes of `config`. The cache has room
    /// for max_sequences of `context` positions each.
    Model(const ModelConfig& config, Weights weights, int threads, std::int64_t max_step_tokens, KvType kv_type,
          std::int64_t context, std::int64_t max_sequences);
    ~Model();

    const ModelConfig& config() const { return config_; }
    KvCache& cache() { return cache_; }
    ThreadPool& threads() { return pool_; }
    std::int64_t max_step_tokens() const { return max_step_tokens_; }
    std::size_t scratch_bytes() const;

    /// Opens a sequence whose dynamic-NTK frequencies are those of `rope_length` positions.
    int open(std::int64_t rope_length);
    void close(int sequence);

    /// Rows of logits that a step returns.
    static std::int64_t output_rows(std::span<const StepEntry> batch);

    /// Throws std::invalid_argument with a sentence for a step that cannot run: an unknown or repeated sequence, an
    /// empty entry, an id outside the vocabulary, too many tokens.
    void check(std::span<const StepEntry> batch) const;

    /// Runs one step and appends to the cache. logits float [output_rows(batch), vocab_size], in the memory of the back
    /// end. Throws what check() does, and std::length_error for a full cache, which is unchanged then.
    void step(std::span<const StepEntry> batch, float* logits);

 private:
    struct Buffers;
    void reserve(std::span<const StepEntry> batch);
    void forward(Team& team, float* logits);

    ModelConfig config_;
    Weights weights_;
    ThreadPool pool_;
    KvCache cache_;
    std::int64_t max_step_tokens_;
    std::vector<std::vector<float>> inv_freq_;  // of each open sequence: [head_dim / 2]
    std::unique_ptr<Buffers> buffers_;
};

}  // namespace cnl
