// SPDX-License-Identifier: Apache-2.0
// Integers to packed matrices and back: no choices, only places (layout.hpp).
#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.hpp"
#include "quantize.hpp"

namespace cnl {
namespace {

using layout::kBlock, layout::kLineBytes, layout::kPanelRows, layout::kSuperblock;

/// The 32 values of one row of a block. `block` points at the row's bytes of the first line.
void unpack_lane(const layout::Scheme& scheme, const std::uint8_t* block, std::uint8_t* q) {
    const int low = scheme.low_bits(), high = scheme.high_bits();
    const std::uint8_t* second = block + low * kLineBytes;
    for (int quad = 0; quad < 8; ++quad, q += 4) {
        const std::uint8_t* line = block + layout::plane_line(low, quad) * kLineBytes;
        const int shift = layout::plane_shift(low, quad), mask = (1 << low) - 1;
        for (int i = 0; i < 4; ++i) q[i] = static_cast<std::uint8_t>(line[i] >> shift & mask);
        if (high == 0) continue;
        const std::uint8_t* high_line = second + layout::plane_line(high, quad) * kLineBytes;
        const int high_shift = layout::plane_shift(high, quad), high_mask = (1 << high) - 1;
        for (int i = 0; i < 4; ++i) q[i] |= static_cast<std::uint8_t>((high_line[i] >> high_shift & high_mask) << low);
    }
}

/// The superblocks of a row in order: use(first column, columns, the superblock's bytes).
template <typename Byte, typename Use>
void for_superblocks(const layout::Scheme& scheme, Byte* panel, std::int64_t cols, Use&& use) {
    const std::int64_t padded = layout::padded_cols(scheme, cols);
    for (std::int64_t start = 0; start < padded; start += kSuperblock) {
        const std::int64_t span = std::min(kSuperblock, padded - start);
        use(start, span, panel);
        panel += layout::superblock_bytes(scheme, span);
    }
}

/// One panel of a matrix.
struct PanelPacker {
    const layout::Scheme& scheme;
    const ConstQuantizedMatrix& matrix;
    std::int64_t rows, cols;

    std::int64_t groups() const { return layout::padded_cols(scheme, cols) / scheme.group; }

    void pack(std::int64_t panel, std::uint8_t* out) const {
        const std::int64_t row = panel * kPanelRows;
        const std::int64_t present = std::clamp<std::int64_t>(rows - row, 0, kPanelRows);
        for_superblocks(scheme, out, cols, [&](std::int64_t start, std::int64_t span, std::uint8_t* superblock) {
            const std::int64_t head = layout::header_bytes(scheme, span);
            std::memset(superblock, 0, static_cast<std::size_t>(head));
            for (std::int64_t r = 0; r < present; ++r) put_scales(superblock, row + r, r, start, span);
            for (std::int64_t b = 0; b < span / kBlock; ++b)
                put_block(superblock + head + b * layout::block_bytes(scheme), row, present, start + b * kBlock);
        });
    }

 private:
    void put_scales(std::uint8_t* superblock, std::int64_t row, std::int64_t lane, std::int64_t start,
                    std::int64_t span) const {
        const std::int64_t count = span / scheme.group, from = row * groups() + start / scheme.group;
        for (std::int64_t g = 0; g < count; ++g) {
            std::memcpy(superblock + g * 32 + lane * 2, matrix.scales + from + g, 2);
            if (scheme.asymmetric) std::memcpy(superblock + (count + g) * 32 + lane * 2, matrix.mins + from + g, 2);
        }
    }
    void put_block(std::uint8_t* block, std::int64_t row, std::int64_t present, std::int64_t start) const {
        std::uint8_t q[kBlock * kPanelRows];
        std::memset(q, scheme.zero(), sizeof q);
        const std::int64_t count = std::clamp<std::int64_t>(cols - start, 0, kBlock);
        for (std::int64_t r = 0; r < present; ++r)
            for (std::int64_t k = 0; k < count; ++k) q[k * kPanelRows + r] = matrix.q[(row + r) * cols + start + k];
        pack_block(scheme, q, block);
    }
};

}  // namespace

void pack_block(const layout::Scheme& scheme, const std::uint8_t* q, std::uint8_t* block) {
    const int low = scheme.low_bits(), high = scheme.high_bits(), mask = (1 << low) - 1;
    std::memset(block, 0, static_cast<std::size_t>(layout::block_bytes(scheme)));
    for (int quad = 0; quad < 8; ++quad) {
        std::uint8_t* line = block + layout::plane_line(low, quad) * kLineBytes;
        const int shift = layout::plane_shift(low, quad);
        const std::uint8_t* from = q + quad * 4 * kPanelRows;
        for (int r = 0; r < kPanelRows; ++r)
            for (int i = 0; i < 4; ++i)
                line[r * 4 + i] |= static_cast<std::uint8_t>((from[i * kPanelRows + r] & mask) << shift);
        if (high == 0) continue;
        std::uint8_t* high_line = block + (low + layout::plane_line(high, quad)) * kLineBytes;
        const int high_shift = layout::plane_shift(high, quad);
        for (int r = 0; r < kPanelRows; ++r)
            for (int i = 0; i < 4; ++i)
                high_line[r * 4 + i] |= static_cast<std::uint8_t>(from[i * kPanelRows + r] >> low << high_shift);
    }
}

void pack_matrix(Team& team, const ConstQuantizedMatrix& matrix, std::int64_t rows, std::int64_t cols,
                 const layout::Scheme& scheme, std::uint8_t* out) {
    const std::int64_t panels = layout::padded_rows(rows) / kPanelRows, bytes = layout::panel_bytes(scheme, cols);
    const PanelPacker packer{scheme, matrix, rows, cols};
    team.parallel_for(panels, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t p = begin; p < end; ++p) packer.pack(p, out + p * bytes);
    });
}

void unpack_matrix(Team& team, const std::uint8_t* packed, std::int64_t rows, std::int64_t cols,
                   const layout::Scheme& scheme, const QuantizedMatrix& matrix) {
    const std::int64_t bytes = layout::panel_bytes(scheme, cols);
    const std::int64_t groups = layout::padded_cols(scheme, cols) / scheme.group;
    const auto one_row = [&](std::int64_t row) {
        const std::int64_t lane = row % kPanelRows;
        const auto use = [&](std::int64_t start, std::int64_t span, const std::uint8_t* superblock) {
            const std::int64_t count = span / scheme.group, at = row * groups + start / scheme.group;
            for (std::int64_t g = 0; g < count; ++g) {
                std::memcpy(matrix.scales + at + g, superblock + g * 32 + lane * 2, 2);
                if (scheme.asymmetric) std::memcpy(matrix.mins + at + g, superblock + (count + g) * 32 + lane * 2, 2);
            }
            const std::uint8_t* block = superblock + layout::header_bytes(scheme, span) + lane * 4;
            for (std::int64_t col = start; col < start + span; col += kBlock, block += layout::block_bytes(scheme)) {
                std::uint8_t q[kBlock];
                unpack_lane(scheme, block, q);
                const std::int64_t present = std::clamp<std::int64_t>(cols - col, 0, kBlock);
                std::memcpy(matrix.q + row * cols + col, q, static_cast<std::size_t>(present));
            }
        };
        for_superblocks(scheme, packed + row / kPanelRows * bytes, cols, use);
    };
    team.parallel_for(rows, kPanelRows, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) one_row(row);
    });
}

void dequantize_row(const layout::Scheme& scheme, const std::uint8_t* packed, std::int64_t cols, std::int64_t row,
                    float* out) {
    const std::int64_t lane = row % kPanelRows;
    const std::uint8_t* panel = packed + row / kPanelRows * layout::panel_bytes(scheme, cols);
    const float zero = static_cast<float>(scheme.zero());
    for_superblocks(scheme, panel, cols, [&](std::int64_t start, std::int64_t span, const std::uint8_t* superblock) {
        const std::uint8_t* block = superblock + layout::header_bytes(scheme, span) + lane * 4;
        float scale = 0, minimum = 0;
        for (std::int64_t in = 0; in < std::min(span, cols - start); in += kBlock) {
            if (in % scheme.group == 0) {
                const std::int64_t at = in / scheme.group * 32 + lane * 2;
                std::uint16_t half;
                std::memcpy(&half, superblock + at, 2);
                scale = cpu::half_to_float(half);
                if (scheme.asymmetric) {
                    std::memcpy(&half, superblock + span / scheme.group * 32 + at, 2);
                    minimum = cpu::half_to_float(half);
                }
            }
            std::uint8_t q[kBlock];
            unpack_lane(scheme, block, q);
            block += layout::block_bytes(scheme);
            const std::int64_t present = std::min(kBlock, cols - start - in);
            for (std::int64_t k = 0; k < present; ++k) {
                const float centred = static_cast<float>(q[k]) - zero;
                out[start + in + k] = scheme.asymmetric ? std::fma(scale, centred, minimum) : scale * centred;
            }
        }
    });
}

}  // namespace cnl
