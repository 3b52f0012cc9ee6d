// SPDX-License-Identifier: Apache-2.0
// A LLaMA of random weights: prefill in two pieces, then three single tokens, on the whole engine.
#include "check.hpp"
#include "model.hpp"

namespace cnl::test {
namespace {

constexpr std::int64_t kHidden = 96, kIntermediate = 272, kVocab = 101;

ModelConfig config() {
    ModelConfig c;
    c.hidden_size = kHidden;
    c.intermediate_size = kIntermediate;
    c.vocab_size = kVocab;
    c.num_hidden_layers = 2;
    c.num_attention_heads = 6;
    c.num_key_value_heads = 2;
    c.head_dim = 16;
    c.max_position_embeddings = 512;
    c.rms_norm_eps = 1e-5f;
    return c;
}

/// The tensors of a model, kept where Weights can point to.
struct Tensors {
    explicit Tensors(Random& random) : random_(random) {
        const layout::Scheme *four = &layout::kSchemes[1], *eight = &layout::kSchemes[3];
        weights.embed_tokens = matrix(*eight, kVocab, kHidden);
        weights.lm_head = matrix(*eight, kVocab, kHidden);
        weights.norm = vector();
        for (int layer = 0; layer < config().num_hidden_layers; ++layer) {
            LayerWeights w;
            w.input_layernorm = vector();
            w.post_attention_layernorm = vector();
            w.q_proj = matrix(*four, config().q_size(), kHidden);
            w.k_proj = matrix(*four, config().kv_size(), kHidden);
            w.v_proj = matrix(*four, config().kv_size(), kHidden);
            w.o_proj = matrix(*four, kHidden, config().q_size());
            w.gate_proj = matrix(*four, kIntermediate, kHidden);
            w.up_proj = matrix(*four, kIntermediate, kHidden);
            w.down_proj = matrix(*four, kHidden, kIntermediate);
            weights.layers.push_back(w);
        }
    }
    Weights weights;

 private:
    Weight matrix(const layout::Scheme& scheme, std::int64_t rows, std::int64_t cols) {
        matrices_.push_back(std::make_unique<Matrix>(scheme, rows, cols));
        Matrix& m = *matrices_.back();
        for (std::int64_t row = 0; row < rows; ++row)
            for (std::int64_t col = 0; col < cols; ++col) {
                const bool four = scheme.bits == 4;
                if (col % scheme.group == 0) m.set_scale(row, col, four ? 0x2000 : 0x1000, four ? 0xa780 : 0);
                m.set_value(row, col, four ? random_.below(16) : 1 + random_.below(255));
            }
        return m.weight;
    }
    const float* vector() {
        vectors_.push_back(random_.uniforms(kHidden));
        for (float& x : vectors_.back()) x += 1.0f;
        return vectors_.back().data();
    }
    Random& random_;
    std::vector<std::unique_ptr<Matrix>> matrices_;
    std::vector<std::vector<float>> vectors_;
};

}  // namespace

void model_case() {
    Random random(81);
    const Tensors tensors(random);
    std::vector<std::int32_t> tokens(43);
    for (std::int32_t& token : tokens) token = random.below(kVocab);
    for (const KvType type : {KvType::fp16, KvType::int8})
        check(std::string("model ") + (type == KvType::int8 ? "int8" : "fp16"), [&](ThreadPool& pool, Output& out) {
            Model model(config(), tensors.weights, pool.size(), 64, type, 128, 1);
            const int sequence = model.open(128);
            std::size_t done = 0;
            for (const std::size_t count : {17u, 23u, 1u, 1u, 1u}) {
                const StepEntry batch[] = {{sequence, std::span(tokens).subspan(done, count), true}};
                std::vector<float> logits(count * kVocab);
                model.step(batch, logits.data());
                out.floats(logits);
                done += count;
            }
        });
}

}  // namespace cnl::test
