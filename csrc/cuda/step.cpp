// SPDX-License-Identifier: Apache-2.0
#include "step.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace cnl::cuda {

namespace {

constexpr std::size_t kSlots = 4;

std::int64_t chunks_of(std::int64_t last_position) { return last_position / kChunkKeys + 1; }
std::int64_t pages_of(std::int64_t positions) { return (positions + KvLayout::kPage - 1) / KvLayout::kPage; }

}  // namespace

StepUpload::StepUpload(std::int64_t rows, int half, std::int64_t table_entries)
    : rows_(rows),
      row_bytes_(layout::round_up(std::int64_t(sizeof(Row)) + 2 * half * std::int64_t(sizeof(float)), 32)),
      table_entries_(table_entries),
      half_(half),
      memory_(static_cast<std::size_t>(rows * row_bytes_ + table_entries * 4), "the records of a step") {
    for (std::size_t i = 0; i < kSlots; ++i) {
        Slot& slot = slots_.emplace_back();
        slot.memory = PinnedBytes(memory_.size(), "the records of a step");
    }
    device_.rows = memory_.get();
    device_.row_bytes = row_bytes_;
    device_.tables = reinterpret_cast<const std::int32_t*>(memory_.get() + rows * row_bytes_);
}

StepShape StepUpload::shape_of(const ops::StepInputs& in) const {
    StepShape shape;
    shape.rows = static_cast<int>(in.tokens.size());
    shape.outputs = static_cast<int>(in.output_rows.size());
    shape.single = in.tokens.size() == in.sequences.size() && in.output_rows.size() == in.tokens.size();
    for (const SequenceRows& s : in.sequences) {
        if (s.count > kDecodeRows) continue;
        for (std::int64_t i = 0; i < s.count; ++i) {
            const std::int64_t chunks = chunks_of(s.start + i);
            shape.chunks = std::max(shape.chunks, static_cast<int>(chunks));
            shape.tasks += chunks;
        }
    }
    return shape;
}

StepShape StepUpload::send(const ops::StepInputs& in, const Settings& settings, const Stream& stream) {
    StepShape shape = shape_of(in);
    const int padded = std::max(settings.padded_rows, shape.rows);
    if (padded > rows_) throw std::logic_error("a step has more rows than there is room for");
    Slot& slot = slots_[next_++ % kSlots];
    if (slot.used) slot.sent.wait();
    std::byte* rows = slot.memory.get();
    const auto row = [&](std::int64_t i) -> Row& { return *reinterpret_cast<Row*>(rows + i * row_bytes_); };
    std::memset(rows, 0, static_cast<std::size_t>(padded * row_bytes_));

    for (int i = 0; i < padded; ++i) row(i).position = -1;
    for (int i = 0; i < shape.rows; ++i) {
        row(i).token = settings.from_device ? -1 : in.tokens[static_cast<std::size_t>(i)];
        auto* frequencies = reinterpret_cast<float*>(&row(i) + 1);
        std::copy_n(in.cos + std::int64_t(i) * half_, half_, frequencies);
        std::copy_n(in.sin + std::int64_t(i) * half_, half_, frequencies + half_);
    }
    for (int i = 0; i < shape.outputs; ++i) row(i).output = in.output_rows[static_cast<std::size_t>(i)];

    auto* tables = reinterpret_cast<std::int32_t*>(slot.memory.get() + rows_ * row_bytes_);
    std::int64_t entries = 0, tasks = 0;
    int tile = 0;
    const auto add_tile = [&](std::int64_t first, std::int64_t count) {
        row(tile).tile_row = static_cast<std::int32_t>(first);
        row(tile).tile_count = static_cast<std::int32_t>(count);
        row(tile++).tile_task = static_cast<std::int32_t>(tasks);
    };
    for (const SequenceRows& s : in.sequences) {
        const std::int64_t pages = pages_of(s.start + s.count);
        if (entries + pages > table_entries_) throw std::logic_error("a step has more pages than there is room for");
        std::copy_n(s.pages, pages, tables + entries);
        for (std::int64_t i = 0; i < s.count; ++i) {
            row(s.row + i).position = static_cast<std::int32_t>(s.start + i);
            row(s.row + i).table = static_cast<std::int32_t>(entries);
        }
        entries += pages;
        for (std::int64_t i = 0; s.count <= kDecodeRows && i < s.count; ++i) {
            add_tile(s.row + i, 1);
            tasks += chunks_of(s.start + i);
        }
    }
    for (int i = shape.rows; i < padded; ++i) {  // empty rows, of a step in which every row is a tile
        row(i).output = i;
        add_tile(i, 1);
    }
    shape.decode_tiles = tile;
    for (const SequenceRows& s : in.sequences)
        for (std::int64_t i = 0; s.count > kDecodeRows && i < s.count; i += settings.tile_tokens)
            add_tile(s.row + i, std::min<std::int64_t>(settings.tile_tokens, s.count - i));
    shape.prefill_tiles = tile - shape.decode_tiles;
    if (padded > shape.rows) shape.rows = shape.outputs = padded;

    // Recorded whatever fails: the slot may not be written again while a copy out of it is under way.
    struct Sent {
        Slot& slot;
        const Stream& stream;
        ~Sent() { slot.used = cudaEventRecord(slot.sent.get(), stream.get()) == cudaSuccess || slot.used; }
    } const sent{slot, stream};
    check(cudaMemcpyAsync(memory_.get(), rows, static_cast<std::size_t>(padded * row_bytes_), cudaMemcpyHostToDevice,
                          stream.get()),
          "sending a step");
    check(cudaMemcpyAsync(memory_.get() + rows_ * row_bytes_, tables, static_cast<std::size_t>(entries * 4),
                          cudaMemcpyHostToDevice, stream.get()),
          "sending page tables");
    return shape;
}

}  // namespace cnl::cuda
