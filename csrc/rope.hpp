// SPDX-License-Identifier: Apache-2.0
// Rotary position embeddings: the inverse frequencies of each scaling rule, as Hugging Face's configurations name them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cnl {

struct RopeConfig {
    enum class Type { none, linear, dynamic, yarn, llama3 };
    Type type = Type::none;
    double theta = 10000.0;
    double factor = 1.0;
    std::int64_t original_max_position = 0;  // of the unscaled model
    // llama3
    double low_freq_factor = 1.0, high_freq_factor = 4.0;
    // yarn
    double beta_fast = 32.0, beta_slow = 1.0;
    double attention_factor = 0.0;  // 0: 0.1 ln(factor) + 1
    double mscale = 0.0, mscale_all_dim = 0.0;
    bool truncate = true;
};

/// [head_dim / 2] inverse frequencies. `length` is the planned length of the sequence (dynamic only).
/// Sources: linear, Chen et al. 2306.15595; dynamic NTK, as in transformers; YaRN, Peng et al. 2309.00071, section 3;
/// llama3, as published with Llama 3.1.
std::vector<float> inverse_frequencies(const RopeConfig& config, int head_dim, std::int64_t length);

/// What cos and sin are multiplied with: YaRN's attention factor, 1 otherwise.
float rope_amplitude(const RopeConfig& config);

}  // namespace cnl
