// SPDX-License-Identifier: Apache-2.0
#include "rope.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <stdexcept>

namespace cnl {

namespace {

using std::numbers::pi;

std::vector<double> plain(double theta, int head_dim) {
    std::vector<double> frequency(static_cast<std::size_t>(head_dim / 2));
    for (std::size_t j = 0; j < frequency.size(); ++j) frequency[j] = std::pow(theta, -2.0 * double(j) / head_dim);
    return frequency;
}

// The dimension whose wave turns `rotations` times within the original context (2309.00071, section 3.2).
double correction_dim(const RopeConfig& c, double rotations, int head_dim) {
    return head_dim * std::log(double(c.original_max_position) / (rotations * 2 * pi)) / (2 * std::log(c.theta));
}

void yarn(const RopeConfig& c, int head_dim, std::vector<double>& frequency) {
    double low = correction_dim(c, c.beta_fast, head_dim), high = correction_dim(c, c.beta_slow, head_dim);
    if (c.truncate) low = std::floor(low), high = std::ceil(high);
    low = std::max(low, 0.0), high = std::min(high, head_dim - 1.0);
    if (low == high) high += 0.001;
    for (std::size_t j = 0; j < frequency.size(); ++j) {
        const double interpolated = std::clamp((double(j) - low) / (high - low), 0.0, 1.0);
        frequency[j] = frequency[j] / c.factor * interpolated + frequency[j] * (1 - interpolated);
    }
}

void llama3(const RopeConfig& c, std::vector<double>& frequency) {
    const double context = double(c.original_max_position);
    for (double& f : frequency) {
        const double wavelength = 2 * pi / f;
        if (wavelength < context / c.high_freq_factor) continue;
        if (wavelength > context / c.low_freq_factor) {
            f /= c.factor;
            continue;
        }
        const double smooth = (context / wavelength - c.low_freq_factor) / (c.high_freq_factor - c.low_freq_factor);
        f = (1 - smooth) * f / c.factor + smooth * f;
    }
}

double mscale(double factor, double weight) { return factor <= 1 ? 1.0 : 0.1 * weight * std::log(factor) + 1.0; }

}  // namespace

std::vector<float> inverse_frequencies(const RopeConfig& c, int head_dim, std::int64_t length) {
    if (head_dim < 2 || head_dim % 2) throw std::invalid_argument("rotary embeddings need an even head_dim");
    double theta = c.theta;
    if (c.type == RopeConfig::Type::dynamic && length > c.original_max_position) {
        if (head_dim == 2) throw std::invalid_argument("dynamic RoPE scaling needs a head_dim over 2");
        const double stretch = c.factor * double(length) / double(c.original_max_position) - (c.factor - 1);
        theta *= std::pow(stretch, double(head_dim) / (head_dim - 2));
    }
    std::vector<double> frequency = plain(theta, head_dim);
    if (c.type == RopeConfig::Type::linear)
        for (double& f : frequency) f /= c.factor;
    if (c.type == RopeConfig::Type::yarn) yarn(c, head_dim, frequency);
    if (c.type == RopeConfig::Type::llama3) llama3(c, frequency);
    return {frequency.begin(), frequency.end()};
}

float rope_amplitude(const RopeConfig& c) {
    if (c.type != RopeConfig::Type::yarn) return 1.0f;
    if (c.attention_factor > 0) return static_cast<float>(c.attention_factor);
    if (c.mscale > 0 && c.mscale_all_dim > 0)
        return static_cast<float>(mscale(c.factor, c.mscale) / mscale(c.factor, c.mscale_all_dim));
    return static_cast<float>(mscale(c.factor, 1.0));
}

}  // namespace cnl
