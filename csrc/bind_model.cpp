// SPDX-License-Identifier: Apache-2.0
#include "bind_model.hpp"

#include <cmath>
#include <cstring>
#include <utility>

namespace py = pybind11;

namespace cnl::bind {
namespace {

std::int64_t bounded(const py::dict& config, const char* key, std::int64_t low, std::int64_t high) {
    if (!config.contains(key)) throw py::value_error(std::string("config lacks ") + key);
    const auto value = config[key].cast<std::int64_t>();
    if (value < low || value > high)
        throw py::value_error(std::string(key) + " is " + std::to_string(value) + ", outside " + std::to_string(low) +
                              " .. " + std::to_string(high));
    return value;
}

double positive(const py::dict& config, const char* key, double fallback) {
    const double value = config.contains(key) && !config[key].is_none() ? config[key].cast<double>() : fallback;
    if (!std::isfinite(value) || value <= 0)
        throw py::value_error(std::string(key) + " is " + std::to_string(value) + ", expected a positive number");
    return value;
}

double optional(const py::dict& config, const char* key) {
    return config.contains(key) && !config[key].is_none() ? positive(config, key, 1.0) : 0.0;
}

RopeConfig read_rope(const py::dict& config, std::int64_t max_position) {
    RopeConfig rope;
    rope.theta = positive(config, "rope_theta", 10000.0);
    rope.original_max_position = max_position;
    if (!config.contains("rope_scaling") || config["rope_scaling"].is_none()) return rope;
    const auto scaling = config["rope_scaling"].cast<py::dict>();
    const char* key = scaling.contains("rope_type") ? "rope_type" : "type";
    const auto type = scaling.contains(key) ? scaling[key].cast<std::string>() : "missing";
    if (type == "default") return rope;
    rope.factor = positive(scaling, "factor", 1.0);
    if (rope.factor < 1) throw py::value_error("the factor of rope_scaling must be at least 1");
    if (scaling.contains("original_max_position_embeddings") && type != "dynamic")
        rope.original_max_position = bounded(scaling, "original_max_position_embeddings", 1, std::int64_t(1) << 40);
    if (type == "linear") {
        rope.type = RopeConfig::Type::linear;
    } else if (type == "dynamic") {
        rope.type = RopeConfig::Type::dynamic;
    } else if (type == "yarn") {
        rope.type = RopeConfig::Type::yarn;
        rope.beta_fast = positive(scaling, "beta_fast", 32.0);
        rope.beta_slow = positive(scaling, "beta_slow", 1.0);
        rope.attention_factor = optional(scaling, "attention_factor");
        rope.mscale = optional(scaling, "mscale");
        rope.mscale_all_dim = optional(scaling, "mscale_all_dim");
        if (scaling.contains("truncate") && !scaling["truncate"].is_none())
            rope.truncate = scaling["truncate"].cast<bool>();
        if (rope.theta <= 1) throw py::value_error("YaRN needs a rope_theta over 1");
    } else if (type == "llama3") {
        rope.type = RopeConfig::Type::llama3;
        rope.low_freq_factor = positive(scaling, "low_freq_factor", 1.0);
        rope.high_freq_factor = positive(scaling, "high_freq_factor", 4.0);
        if (rope.high_freq_factor <= rope.low_freq_factor)
            throw py::value_error("high_freq_factor of rope_scaling must be over low_freq_factor");
    } else {
        throw py::value_error("rope_scaling of type '" + type +
                              "' is not supported; expected default, linear, dynamic, yarn or llama3");
    }
    return rope;
}

LayerWeights read_layer(TensorTable& t, const ModelConfig& c, int layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const std::string attn = prefix + "self_attn.", mlp = prefix + "mlp.";
    LayerWeights w;
    w.input_layernorm = t.vector(prefix + "input_layernorm.weight", c.hidden_size);
    w.post_attention_layernorm = t.vector(prefix + "post_attention_layernorm.weight", c.hidden_size);
    w.q_proj = t.matrix(attn + "q_proj.weight", c.q_size(), c.hidden_size);
    w.k_proj = t.matrix(attn + "k_proj.weight", c.kv_size(), c.hidden_size);
    w.v_proj = t.matrix(attn + "v_proj.weight", c.kv_size(), c.hidden_size);
    w.o_proj = t.matrix(attn + "o_proj.weight", c.hidden_size, c.q_size());
    w.gate_proj = t.matrix(mlp + "gate_proj.weight", c.intermediate_size, c.hidden_size);
    w.up_proj = t.matrix(mlp + "up_proj.weight", c.intermediate_size, c.hidden_size);
    w.down_proj = t.matrix(mlp + "down_proj.weight", c.hidden_size, c.intermediate_size);
    w.q_bias = t.optional_vector(attn + "q_proj.bias", c.q_size());
    w.k_bias = t.optional_vector(attn + "k_proj.bias", c.kv_size());
    w.v_bias = t.optional_vector(attn + "v_proj.bias", c.kv_size());
    w.o_bias = t.optional_vector(attn + "o_proj.bias", c.hidden_size);
    w.gate_bias = t.optional_vector(mlp + "gate_proj.bias", c.intermediate_size);
    w.up_bias = t.optional_vector(mlp + "up_proj.bias", c.intermediate_size);
    w.down_bias = t.optional_vector(mlp + "down_proj.bias", c.hidden_size);
    return w;
}

}  // namespace

std::int64_t within(const char* name, std::int64_t value, std::int64_t low, std::int64_t high) {
    if (value < low || value > high)
        throw py::value_error(std::string(name) + " is " + std::to_string(value) + ", outside " + std::to_string(low) +
                              " .. " + std::to_string(high));
    return value;
}

ModelConfig read_config(const py::dict& config) {
    constexpr std::int64_t kMaxWidth = std::int64_t(1) << 20;
    ModelConfig c;
    c.hidden_size = bounded(config, "hidden_size", 1, kMaxWidth);
    c.intermediate_size = bounded(config, "intermediate_size", 1, 4 * kMaxWidth);
    c.vocab_size = bounded(config, "vocab_size", 1, std::int64_t(1) << 24);
    c.num_hidden_layers = static_cast<int>(bounded(config, "num_hidden_layers", 1, 4096));
    c.num_attention_heads = static_cast<int>(bounded(config, "num_attention_heads", 1, 8192));
    c.num_key_value_heads = static_cast<int>(bounded(config, "num_key_value_heads", 1, c.num_attention_heads));
    c.head_dim = static_cast<int>(bounded(config, "head_dim", 2, 1024));
    c.max_position_embeddings = bounded(config, "max_position_embeddings", 1, std::int64_t(1) << 31);
    c.rms_norm_eps = static_cast<float>(positive(config, "rms_norm_eps", 1e-6));
    if (c.head_dim % 2)
        throw py::value_error("head_dim is " + std::to_string(c.head_dim) + ", expected an even number");
    if (c.num_attention_heads % c.num_key_value_heads)
        throw py::value_error("num_attention_heads is " + std::to_string(c.num_attention_heads) +
                              ", not a multiple of num_key_value_heads, " + std::to_string(c.num_key_value_heads));
    c.rope = read_rope(config, c.max_position_embeddings);
    inverse_frequencies(c.rope, c.head_dim, c.max_position_embeddings);  // throws what it cannot do
    return c;
}

TensorTable::TensorTable(const py::dict& tensors) {
    for (const auto& [name, value] : tensors) {
        const auto entry = value.cast<py::tuple>();
        if (entry.size() != 4)
            throw py::value_error(name.cast<std::string>() + ": expected (bytes, scheme, rows, columns)");
        entries_[name.cast<std::string>()] = {entry[0].cast<Bytes>(), entry[1].cast<std::string>(),
                                              entry[2].cast<std::int64_t>(), entry[3].cast<std::int64_t>()};
    }
}

Weight TensorTable::matrix(const std::string& name, std::int64_t rows, std::int64_t cols) {
    const Entry& e = at(name, rows, cols);
    const layout::Scheme* scheme = layout::find_scheme(e.scheme);
    if (!scheme) throw py::value_error(name + ": unknown scheme '" + e.scheme + "'");
    expect_bytes(name, e, layout::packed_bytes(*scheme, rows, cols));
    return {scheme, rows, cols, aligned(e.data)};
}

const float* TensorTable::vector(const std::string& name, std::int64_t size) {
    const Entry& e = at(name, size, 1);
    if (e.scheme != "f32") throw py::value_error(name + ": has scheme '" + e.scheme + "', expected f32");
    expect_bytes(name, e, size * 4);
    return reinterpret_cast<const float*>(aligned(e.data));
}

const TensorTable::Entry& TensorTable::at(const std::string& name, std::int64_t rows, std::int64_t cols) const {
    const auto found = entries_.find(name);
    if (found == entries_.end()) throw py::value_error("tensor " + name + " is missing");
    const Entry& e = found->second;
    if (e.rows != rows || e.cols != cols)
        throw py::value_error(name + ": is " + std::to_string(e.rows) + " x " + std::to_string(e.cols) + ", expected " +
                              std::to_string(rows) + " x " + std::to_string(cols));
    return e;
}

void TensorTable::expect_bytes(const std::string& name, const Entry& e, std::int64_t bytes) {
    if (e.data.nbytes() < bytes)
        throw py::value_error(name + ": has " + std::to_string(e.data.nbytes()) + " bytes, expected " +
                              std::to_string(bytes));
}

// A mapped file is aligned as it lies; only arrays made by hand may need a copy.
const std::uint8_t* TensorTable::aligned(const Bytes& data) {
    bytes_ += static_cast<std::size_t>(data.nbytes());
    const std::uint8_t* source = data.data();
    if (reinterpret_cast<std::uintptr_t>(source) % layout::kLineBytes == 0) return source;
    const auto size = static_cast<std::size_t>(data.nbytes());
    auto* copy = static_cast<std::uint8_t*>(::operator new[](size, std::align_val_t{layout::kLineBytes}));
    copies_.emplace_back(copy);
    std::memcpy(copy, source, size);
    return copy;
}

StepBatch::StepBatch(const Batch& batch) {
    std::size_t count = 0;
    for (const auto& [sequence, ids, all_logits] : batch) {
        if (ids.ndim() != 1) throw py::value_error("token ids must be a one-dimensional array");
        count += static_cast<std::size_t>(ids.size());
    }
    ids_.reserve(count);  // the spans below point into it
    for (const auto& [sequence, ids, all_logits] : batch) {
        const std::int32_t* begin = ids_.data() + ids_.size();
        ids_.insert(ids_.end(), ids.data(), ids.data() + ids.size());
        entries_.push_back({sequence, {begin, static_cast<std::size_t>(ids.size())}, all_logits});
    }
}

Weights read_weights(TensorTable& t, const ModelConfig& c) {
    Weights w;
    w.embed_tokens = t.matrix("model.embed_tokens.weight", c.vocab_size, c.hidden_size);
    w.norm = t.vector("model.norm.weight", c.hidden_size);
    w.lm_head = t.has("lm_head.weight") ? t.matrix("lm_head.weight", c.vocab_size, c.hidden_size) : w.embed_tokens;
    for (int layer = 0; layer < c.num_hidden_layers; ++layer) w.layers.push_back(read_layer(t, c, layer));
    return w;
}

}  // namespace cnl::bind
