// SPDX-License-Identifier: Apache-2.0
// Between the cache's layout and the kernels, and between the rows of a step and their sequences.
#pragma once

#include <cstdint>
#include <span>
#include <utility>

#include "../kv_cache.hpp"
#include "../ops.hpp"
#include "isa.hpp"

namespace cnl {

inline cpu::KvShape kv_shape(const KvLayout& layout) {
    cpu::KvShape shape{};
    shape.head_dim = layout.head_dim;
    shape.padded_dim = layout.padded_dim();
    shape.int8 = layout.type == KvType::int8;
    shape.v_offset = static_cast<std::int64_t>(layout.v_offset());
    shape.k_scale_offset = static_cast<std::int64_t>(layout.k_scale_offset());
    shape.v_scale_offset = static_cast<std::int64_t>(layout.v_scale_offset());
    return shape;
}

/// The sequence of the n-th row of all sequences, and the row's number in it.
inline std::pair<const SequenceRows*, std::int64_t> find_row(std::span<const SequenceRows> sequences, std::int64_t n) {
    const SequenceRows* s = sequences.data();
    while (n >= s->count) n -= (s++)->count;
    return {s, n};
}

}  // namespace cnl
