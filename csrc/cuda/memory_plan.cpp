// SPDX-License-Identifier: Apache-2.0
#include "memory_plan.hpp"

#include <stdexcept>
#include <string>

#include "upload.hpp"

namespace cnl::cuda {

namespace {

constexpr std::size_t kReserve = std::size_t(256) << 20;  // what the driver and fragmentation may take

std::size_t weight_bytes(Weights w, const ModelConfig& c) {
    std::size_t bytes = 0;
    const bool tied = w.lm_head.data == w.embed_tokens.data;
    for_tensors(
        w, c, [&](const Weight& m) { bytes += DeviceWeights::device_bytes(m); },
        [&](const float* v, std::int64_t size) { bytes += v ? DeviceWeights::device_bytes(size) : 0; });
    return tied ? bytes - DeviceWeights::device_bytes(w.lm_head) : bytes;
}

}  // namespace

std::size_t scratch_bytes(const ModelConfig& c, std::int64_t rows) {
    const auto act = [](std::int64_t cols) { return cols + cols / kTileCols * kSumKinds * 4 + cols / kSpan * 4; };
    const std::int64_t a_row = 4 * (2 * c.hidden_size + 2 * c.q_size() + 2 * c.kv_size() + c.intermediate_size) +
                               act(c.hidden_size) + act(c.q_size()) + act(c.intermediate_size);
    return static_cast<std::size_t>(layout::round_up(rows, kTokenAlign) * a_row + kGraphRows * c.vocab_size * 4);
}

MemoryPlan::MemoryPlan(const Device& device, const Weights& w, const ModelConfig& c, KvType type, std::int64_t context,
                       std::int64_t sequences, std::int64_t rows)
    : weights(weight_bytes(w, c)), scratch(scratch_bytes(c, rows)), free(device.free_bytes) {
    const KvLayout kv_layout{type, c.num_hidden_layers, c.num_key_value_heads, c.head_dim};
    const auto pages = [&](std::int64_t n) { return (n + KvLayout::kPage - 1) / KvLayout::kPage * sequences; };
    per_token = kv_layout.page_bytes() / KvLayout::kPage;
    kv = kv_layout.page_bytes() * static_cast<std::size_t>(pages(context));
    const std::size_t fixed = weights + scratch + kReserve;
    const std::size_t left = free > fixed ? free - fixed : 0;
    fitting_context = static_cast<std::int64_t>(left / (kv_layout.page_bytes() * static_cast<std::size_t>(sequences))) *
                      KvLayout::kPage;
}

void MemoryPlan::refuse_unless_fits(std::int64_t context, const Device& device) const {
    const std::size_t need = weights + scratch + kv + kReserve;
    if (need <= free) return;
    std::string text = "a context of " + std::to_string(context) + " needs " + gibibytes(need) + " of GPU memory and " +
                       gibibytes(free) + " of " + gibibytes(device.total_bytes) + " are free on " + device.name + ": ";
    if (fitting_context >= KvLayout::kPage)
        text += "a context of " + std::to_string(fitting_context) + " fits, --ctx " + std::to_string(fitting_context);
    else
        text += "the weights alone take " + gibibytes(weights) + ", no context fits; use the CPU or a larger GPU";
    throw std::runtime_error(text);
}

}  // namespace cnl::cuda
