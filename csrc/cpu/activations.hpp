// SPDX-License-Identifier: Apache-2.0
// What ops::Activations holds: tokens in tiles, each tile in the order in which a matmul kernel reads it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <stdexcept>

#include "../ops.hpp"
#include "isa.hpp"

namespace cnl {

/// `count` elements aligned to 64 bytes.
template <typename T>
class AlignedArray {
 public:
    explicit AlignedArray(std::int64_t count)
        : data_(static_cast<T*>(::operator new(static_cast<std::size_t>(count) * sizeof(T), std::align_val_t{64}))) {}
    ~AlignedArray() { ::operator delete(data_, std::align_val_t{64}); }
    AlignedArray(const AlignedArray&) = delete;
    AlignedArray& operator=(const AlignedArray&) = delete;
    T* get() const { return data_; }

 private:
    T* data_;
};

/// Up to 12 tokens are one tile, more are split into ceil(m / 6) tiles whose sizes differ by at most one.
struct Tiles {
    std::int64_t m, count;
    explicit Tiles(std::int64_t tokens)
        : m(tokens), count(tokens <= cpu::kStreamTokens ? 1 : (tokens + cpu::kTileTokens - 1) / cpu::kTileTokens) {}
    std::int64_t begin(std::int64_t tile) const { return tile * (m / count) + std::min(tile, m % count); }
    std::int64_t size(std::int64_t tile) const { return m / count + (tile < m % count ? 1 : 0); }
    std::int64_t of(std::int64_t token) const {
        const std::int64_t larger = m % count, size_small = m / count;
        const std::int64_t split = larger * (size_small + 1);
        return token < split ? token / (size_small + 1) : larger + (token - split) / size_small;
    }
};

struct ops::Activations::Data {
    Data(std::int64_t tokens, std::int64_t columns)
        : max_tokens(tokens),
          max_cols(columns),
          values(tokens * padded(columns)),
          sums32(tokens * padded(columns) / 32),
          sums64(tokens * padded(columns) / 64),
          scales(tokens * spans(columns)) {}

    std::int64_t max_tokens, max_cols;
    std::int64_t m = 0, cols = 0;
    AlignedArray<std::int8_t> values;   // tile at begin * padded:        [padded / 32][size][32]
    AlignedArray<std::int32_t> sums32;  // tile at begin * padded / 32:   [padded / 32][size]
    AlignedArray<std::int32_t> sums64;  // tile at begin * padded / 64:   [padded / 64][size]
    AlignedArray<float> scales;         // tile at begin * spans:         [spans][size]

    static std::int64_t padded(std::int64_t columns) { return layout::round_up(columns, 64); }
    static std::int64_t spans(std::int64_t columns) { return layout::round_up(columns, cpu::kSpan) / cpu::kSpan; }
};

}  // namespace cnl
