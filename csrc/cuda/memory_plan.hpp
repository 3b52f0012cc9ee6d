// SPDX-License-Identifier: Apache-2.0
// What a model takes of a GPU's memory, before any of it is asked for.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kv_cache.hpp"
#include "../model.hpp"
#include "context.hpp"

namespace cnl::cuda {

/// Calls matrix(Weight&) and vector(const float*&, floats) for every tensor of a model.
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

/// Bytes that a step of `rows` tokens works in, about: Model's buffers and the context's.
std::size_t scratch_bytes(const ModelConfig& config, std::int64_t rows);

struct MemoryPlan {
    std::size_t weights, scratch, kv, per_token, free;
    std::int64_t fitting_context;

    MemoryPlan(const Device& device, const Weights& weights, const ModelConfig& config, KvType type,
               std::int64_t context, std::int64_t sequences, std::int64_t rows);
    /// Throws std::runtime_error naming the context that would fit.
    void refuse_unless_fits(std::int64_t context, const Device& device) const;
};

}  // namespace cnl::cuda
