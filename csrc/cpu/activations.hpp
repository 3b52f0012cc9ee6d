// SPDX-License-Identifier: Apache-2.0
// What ops::Activations holds: tokens in tiles, each tile in the order in which a matmul kernel reads it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

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

/// One copy of a step's activations.
struct ActivationData {
    ActivationData(std::int64_t tokens, std::int64_t columns)
        : max_tokens(tokens),
          values(tokens * padded(columns)),
          sums32(tokens * padded(columns) / 32),
          sums64(tokens * padded(columns) / 64),
          whole64(tokens * padded(columns) / 64),
          scales(tokens * spans(columns)) {}

    std::int64_t max_tokens;
    std::int64_t m = 0, cols = 0;
    AlignedArray<std::int8_t> values;   // tile at begin * padded:        [padded / 32][size][32]
    AlignedArray<std::int32_t> sums32;  // tile at begin * padded / 32:   [padded / 32][size]
    AlignedArray<std::int32_t> sums64;  // tile at begin * padded / 64:   [padded / 64][size]
    AlignedArray<float> whole64;        // as sums64
    AlignedArray<float> scales;         // tile at begin * spans:         [spans][size]

    static std::int64_t padded(std::int64_t columns) { return layout::round_up(columns, 64); }
    static std::int64_t spans(std::int64_t columns) { return layout::round_up(columns, cpu::kSpan) / cpu::kSpan; }
};

/// Up to this many tokens every thread quantizes a copy of its own: for a row of 4096 that takes a microsecond, less
/// than to share the work and wait for each other.
inline constexpr std::int64_t kOwnTokens = 2;

struct ops::Activations::Data {
    Data(std::int64_t tokens, std::int64_t columns, int threads) : shared(tokens, columns) {
        for (int i = 0; i < threads; ++i) own.push_back(std::make_unique<Own>(columns, &shared));
    }

    struct alignas(64) Own {
        Own(std::int64_t columns, const ActivationData* all) : data(kOwnTokens, columns), current(all) {}
        ActivationData data;
        const ActivationData* current;  // what this thread reads: its own copy or the shared one
    };

    ActivationData shared;
    std::vector<std::unique_ptr<Own>> own;

    bool has_own(const Team& team, std::int64_t m) const {
        return m <= kOwnTokens && static_cast<std::size_t>(team.size()) <= own.size();
    }
    const ActivationData& seen_by(const Team& team) const {
        const auto i = static_cast<std::size_t>(team.index());
        return i < own.size() ? *own[i]->current : shared;
    }
};

/// Where the spans of m tokens of `cols` columns go in one copy. Threads agree on the numbers without reading the copy,
/// whose sizes one of them is writing.
struct SpanWriter {
    ActivationData& data;
    std::int64_t m, cols, padded, spans;
    Tiles tiles;

    SpanWriter(ActivationData& target, std::int64_t tokens, std::int64_t columns)
        : data(target),
          m(tokens),
          cols(columns),
          padded(ActivationData::padded(columns)),
          spans(ActivationData::spans(columns)),
          tiles(tokens) {}

    /// The copy that all threads of the team read after their next barrier.
    static SpanWriter shared(Team& team, ops::Activations::Data& d, std::int64_t m, std::int64_t cols);

    /// Quantizes spans first .. last of `token`: y = x * factor * gamma, or x where gamma is null. x is [m, cols].
    void write(const float* x, const float* gamma, float factor, std::int64_t token, std::int64_t first,
               std::int64_t last) const;
};

}  // namespace cnl
