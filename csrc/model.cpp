// SPDX-License-Identifier: Apache-2.0
#include "model.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "memory.hpp"

namespace cnl {

using ops::Activations;
using ops::Projection;

// Everything a step writes, taken once. m <= M = max_step_tokens, outputs <= M.
struct Model::Buffers {
    Buffers(const ModelConfig& c, std::int64_t M, int threads)
        : x(M * c.hidden_size),
          q(M * c.q_size()),
          k(M * c.kv_size()),
          v(M * c.kv_size()),
          attention(M * c.q_size()),
          h(M * c.intermediate_size),
          cos(M * c.head_dim / 2),
          sin(M * c.head_dim / 2),
          last(M * c.hidden_size),
          normed(M, c.hidden_size, threads),
          attended(M, c.q_size()),
          gated(M, c.intermediate_size) {}

    Array<float> x;                       // [m, hidden]         the residual stream
    Array<float> q, k, v;                 // [m, q_size] [m, kv_size] x2
    Array<float> attention;               // [m, q_size]
    Array<float> h;                       // [m, intermediate]
    std::vector<float> cos, sin;          // [m, head_dim / 2]   the host's
    Array<float> last;                    // [outputs, hidden]
    Activations normed, attended, gated;  // int8: hidden, q_size and intermediate columns
    std::vector<std::int32_t> tokens;     // [m]
    std::vector<std::int32_t> output_rows;
    std::vector<SequenceRows> sequences;

    std::size_t bytes() const {
        const std::size_t floats = x.size() + q.size() + k.size() + v.size() + attention.size() + h.size() +
                                   cos.size() + sin.size() + last.size();
        return floats * sizeof(float) + x.size() + attention.size() + h.size();  // int8 copies, without their scales
    }
};

namespace {

KvLayout kv_layout(const ModelConfig& c, KvType type) {
    return {type, c.num_hidden_layers, c.num_key_value_heads, c.head_dim};
}

}  // namespace

Model::Model(const ModelConfig& config, Weights weights, int threads, std::int64_t max_step_tokens, KvType kv_type,
             std::int64_t context, std::int64_t max_sequences)
    : config_(config),
      weights_(std::move(weights)),
      pool_(threads),
      cache_(kv_layout(config, kv_type), (context + KvLayout::kPage - 1) / KvLayout::kPage * max_sequences),
      max_step_tokens_(max_step_tokens),
      buffers_(std::make_unique<Buffers>(config, max_step_tokens, threads)) {}

Model::~Model() = default;

std::size_t Model::scratch_bytes() const { return buffers_->bytes(); }

int Model::open(std::int64_t rope_length) {
    std::vector<float> frequencies = inverse_frequencies(config_.rope, config_.head_dim, rope_length);
    const auto sequence = static_cast<std::size_t>(cache_.open());
    if (inv_freq_.size() <= sequence) inv_freq_.resize(sequence + 1);
    inv_freq_[sequence] = std::move(frequencies);
    return static_cast<int>(sequence);
}

void Model::close(int sequence) { cache_.close(sequence); }

std::int64_t Model::output_rows(std::span<const StepEntry> batch) {
    std::int64_t rows = 0;
    for (const StepEntry& entry : batch) rows += entry.all_logits ? std::int64_t(entry.tokens.size()) : 1;
    return rows;
}

void Model::step(std::span<const StepEntry> batch, float* logits) {
    Buffers& b = *buffers_;
    b.tokens.clear();
    b.output_rows.clear();
    b.sequences.clear();
    check(batch);
    reserve(batch);
    const float amplitude = rope_amplitude(config_.rope);
    const int half = config_.head_dim / 2;
    for (const StepEntry& entry : batch) {
        const auto row = std::int64_t(b.tokens.size()), count = std::int64_t(entry.tokens.size());
        const std::int64_t start = cache_.length(entry.sequence) - count;
        const std::vector<float>& inv_freq = inv_freq_[static_cast<std::size_t>(entry.sequence)];
        for (std::int64_t i = 0; i < count; ++i) {
            b.tokens.push_back(entry.tokens[static_cast<std::size_t>(i)]);
            if (entry.all_logits || i == count - 1) b.output_rows.push_back(std::int32_t(row + i));
            for (int j = 0; j < half; ++j) {
                const double angle = double(start + i) * inv_freq[static_cast<std::size_t>(j)];
                const auto at = static_cast<std::size_t>((row + i) * half + j);
                b.cos[at] = amplitude * static_cast<float>(std::cos(angle));
                b.sin[at] = amplitude * static_cast<float>(std::sin(angle));
            }
        }
        b.sequences.push_back({row, count, start, cache_.page_table(entry.sequence)});
    }
    const ops::StepInputs inputs{b.tokens, b.output_rows, b.sequences, b.cos.data(), b.sin.data()};
    ops::run_step(pool_, inputs, [&](Team& team) { forward(team, logits); });
}

void Model::check(std::span<const StepEntry> batch) const {
    std::int64_t tokens = 0;
    for (const StepEntry& entry : batch) {
        cache_.length(entry.sequence);  // throws for an unknown one
        if (entry.tokens.empty())
            throw std::invalid_argument("sequence " + std::to_string(entry.sequence) + " comes with no tokens");
        for (const StepEntry& other : batch)
            if (&other != &entry && other.sequence == entry.sequence)
                throw std::invalid_argument("sequence " + std::to_string(entry.sequence) + " occurs twice in one step");
        for (const std::int32_t token : entry.tokens)
            if (token < 0 || token >= config_.vocab_size)
                throw std::invalid_argument("token id " + std::to_string(token) + " is outside the vocabulary of " +
                                            std::to_string(config_.vocab_size));
        tokens += std::int64_t(entry.tokens.size());
    }
    if (tokens == 0) throw std::invalid_argument("a step needs at least one token");
    if (tokens > max_step_tokens_)
        throw std::invalid_argument("a step of " + std::to_string(tokens) + " tokens is over the limit of " +
                                    std::to_string(max_step_tokens_));
}

// Room for every entry, or for none: a step that fails leaves the cache as it was.
void Model::reserve(std::span<const StepEntry> batch) {
    std::size_t done = 0;
    try {
        for (; done < batch.size(); ++done)
            cache_.extend(batch[done].sequence, std::int64_t(batch[done].tokens.size()));
    } catch (...) {
        while (done-- > 0) {
            const StepEntry& entry = batch[done];
            cache_.trim(entry.sequence, cache_.length(entry.sequence) - std::int64_t(entry.tokens.size()));
        }
        throw;
    }
}

// The transformer. Runs on every thread of the team; each op shares its work out and ends with all threads together.
void Model::forward(Team& team, float* logits) {
    Buffers& b = *buffers_;
    const ModelConfig& c = config_;
    const auto m = std::int64_t(b.tokens.size());
    const auto outputs = std::int64_t(b.output_rows.size());
    float* x = b.x.data();
    const ops::NewKeys fresh{b.k.data(), b.v.data(), b.cos.data(), b.sin.data()};

    ops::embed(team, weights_.embed_tokens, b.tokens.data(), m, x);
    for (int layer = 0; layer < c.num_hidden_layers; ++layer) {
        const LayerWeights& w = weights_.layers[static_cast<std::size_t>(layer)];

        ops::rms_norm(team, x, w.input_layernorm, c.rms_norm_eps, m, c.hidden_size, b.normed);
        const Projection qkv[] = {{&w.q_proj, w.q_bias, b.q.data(), c.q_size()},
                                  {&w.k_proj, w.k_bias, b.k.data(), c.kv_size()},
                                  {&w.v_proj, w.v_bias, b.v.data(), c.kv_size()}};
        ops::matmul(team, b.normed, qkv);
        ops::attention(team, b.q.data(), c.num_attention_heads, &fresh, b.sequences, cache_, layer, b.attention.data(),
                       &b.attended);
        ops::matmul_add(team, b.attended, w.o_proj, w.o_bias, x);

        ops::rms_norm(team, x, w.post_attention_layernorm, c.rms_norm_eps, m, c.hidden_size, b.normed);
        ops::matmul_swiglu(team, b.normed, w.gate_proj, w.gate_bias, w.up_proj, w.up_bias, b.h.data(), &b.gated);
        ops::matmul_add(team, b.gated, w.down_proj, w.down_bias, x);
    }
    ops::gather_rows(team, x, b.output_rows.data(), outputs, c.hidden_size, b.last.data());
    ops::rms_norm(team, b.last.data(), weights_.norm, c.rms_norm_eps, outputs, c.hidden_size, b.normed);
    const Projection head[] = {{&weights_.lm_head, nullptr, logits, c.vocab_size}};
    ops::matmul(team, b.normed, head);
}

}  // namespace cnl
