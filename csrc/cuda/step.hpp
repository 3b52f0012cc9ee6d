// SPDX-License-Identifier: Apache-2.0
// What the host tells the device about a step: one record a row, and the page tables.
#pragma once

#include <cstdint>
#include <deque>
#include <span>

#include "../ops.hpp"
#include "check.hpp"
#include "kernels.hpp"

namespace cnl::cuda {

/// How a step is cut, for the host: the numbers that launches depend on.
struct StepShape {
    int rows = 0, outputs = 0;  // with the padding of a captured step
    int decode_tiles = 0, prefill_tiles = 0;
    int chunks = 0;          // most chunks of keys of a decode tile
    std::int64_t tasks = 0;  // chunks of all decode tiles
    bool single = false;     // every sequence has one row, and every row its logits
};

/// Records of a step in pinned memory, and where they go. Several may be under way at once.
class StepUpload {
 public:
    /// Room for `rows` rows of `half` cosines and sines and for `table_entries` pages of all sequences of a step.
    StepUpload(std::int64_t rows, int half, std::int64_t table_entries);

    /// Rows that a sequence may have at most to be taken row by row, every chunk of keys in a block of its own.
    static constexpr std::int64_t kDecodeRows = 8;

    struct Settings {
        int tile_tokens = 1;       // of prefill
        int padded_rows = 0;       // at least as many rows as there are; the rest are empty ones
        bool from_device = false;  // tokens are those that the device chose last
    };
    StepShape shape_of(const ops::StepInputs& inputs) const;
    /// Writes the records and asks for the copy on `stream`.
    StepShape send(const ops::StepInputs& inputs, const Settings& settings, const Stream& stream);

    const StepRows& device() const { return device_; }

 private:
    struct Slot {
        PinnedBytes memory;
        Event sent;
        bool used = false;
    };
    std::int64_t rows_, row_bytes_, table_entries_;
    int half_;
    DeviceArray<std::byte> memory_;
    std::deque<Slot> slots_;
    std::size_t next_ = 0;
    StepRows device_;
};

}  // namespace cnl::cuda
