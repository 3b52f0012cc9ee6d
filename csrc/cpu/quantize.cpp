// SPDX-License-Identifier: Apache-2.0
#include "quantize.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "cpu_info.hpp"
#include "half.hpp"

namespace cnl {
namespace {

using layout::kBlock, layout::kPanelRows, layout::kSuperblock;

std::string place(std::int64_t row, std::int64_t col) {
    return " at row " + std::to_string(row) + ", column " + std::to_string(col);
}

[[noreturn]] void refuse_values(const float* weight, std::int64_t cols, std::int64_t row, std::int64_t rows,
                                std::int64_t col, std::int64_t count) {
    for (std::int64_t r = row; r < row + rows; ++r)
        for (std::int64_t k = col; k < col + count; ++k)
            if (!std::isfinite(weight[r * cols + k]))
                throw std::invalid_argument("the weight is " + std::to_string(weight[r * cols + k]) + place(r, k) +
                                            "; only finite values can be quantized");
    throw std::logic_error("refuse_values: all values are finite");
}

void check_scales(const std::uint16_t* halves, std::int64_t row, std::int64_t col) {
    for (int r = 0; r < kPanelRows; ++r)
        if ((halves[r] & 0x7c00) == 0x7c00)
            throw std::invalid_argument("the weights" + place(row + r, col) +
                                        " and after it need a scale beyond fp16 (65504); the checkpoint is damaged");
}

/// One panel of 16 rows, group by group: transpose, fit, pack.
class PanelQuantizer {
 public:
    PanelQuantizer(const layout::Scheme& scheme, const float* weight, std::int64_t rows, std::int64_t cols)
        : scheme_(scheme), weight_(weight), rows_(rows), cols_(cols) {}

    QuantizeError run(std::int64_t panel, std::uint8_t* out) {
        const std::int64_t padded = layout::padded_cols(scheme_, cols_);
        QuantizeError total;
        for (std::int64_t start = 0; start < padded; start += kSuperblock) {
            const std::int64_t span = std::min(kSuperblock, padded - start);
            const std::int64_t groups = span / scheme_.group, header = layout::header_bytes(scheme_, span);
            std::memset(out, 0, static_cast<std::size_t>(header));
            for (std::int64_t g = 0; g < groups; ++g) {
                const std::int64_t col = start + g * scheme_.group;
                fit(panel * kPanelRows, col, total);
                std::memcpy(out + g * 32, scales_, 32);
                if (scheme_.asymmetric) std::memcpy(out + (groups + g) * 32, mins_, 32);
                std::uint8_t* block = out + header + g * scheme_.group / kBlock * layout::block_bytes(scheme_);
                for (int b = 0; b < scheme_.group / kBlock; ++b, block += layout::block_bytes(scheme_))
                    pack(q_ + b * kBlock * kPanelRows, block);
            }
            out += layout::superblock_bytes(scheme_, span);
        }
        return total;
    }

 private:
    void fit(std::int64_t row, std::int64_t col, QuantizeError& total) {
        const std::int64_t rows = std::clamp<std::int64_t>(rows_ - row, 0, kPanelRows);
        const std::int64_t count = std::clamp<std::int64_t>(cols_ - col, 0, scheme_.group);
        const int zero = scheme_.zero();
        std::memset(q_, zero, sizeof q_);
        std::memset(scales_, 0, sizeof scales_);
        std::memset(mins_, 0, sizeof mins_);
        if (rows == 0 || count == 0) return;
        float squares[kPanelRows] = {};
        for (std::int64_t r = 0; r < rows; ++r) {
            const float* source = weight_ + (row + r) * cols_ + col;
            float sum = 0;
            for (std::int64_t k = 0; k < count; ++k) {
                transposed_[k * kPanelRows + r] = source[k];
                sum += source[k] * source[k];
            }
            squares[r] = sum;
        }
        for (std::int64_t r = rows; r < kPanelRows; ++r)
            for (std::int64_t k = 0; k < count; ++k) transposed_[k * kPanelRows + r] = 0.0f;
        float poison = 0;
        for (std::int64_t i = 0; i < count * kPanelRows; ++i) poison += transposed_[i] * 0.0f;
        if (poison != 0.0f) refuse_values(weight_, cols_, row, rows, col, count);

        float error[kPanelRows];
        cpu::kernels().quantize_group(cpu::QuantizeGroup{transposed_, static_cast<int>(count), scheme_.bits,
                                                         scheme_.asymmetric, q_, scales_, mins_, error});
        check_scales(scales_, row, col);
        if (scheme_.asymmetric) check_scales(mins_, row, col);
        for (std::int64_t r = 0; r < rows; ++r) {
            total.squared_error += static_cast<double>(error[r]);
            total.squares += static_cast<double>(squares[r]);
        }
    }

    void pack(const std::uint8_t* q, std::uint8_t* block) const {
        const int lines = scheme_.bits == 4 ? 4 : 8;
        for (int t = 0; t < lines; ++t)
            for (int r = 0; r < kPanelRows; ++r)
                for (int i = 0; i < 4; ++i) {
                    const int low = q[(4 * t + i) * kPanelRows + r];
                    const int high = scheme_.bits == 4 ? q[(16 + 4 * t + i) * kPanelRows + r] << 4 : 0;
                    block[t * 64 + r * 4 + i] = static_cast<std::uint8_t>(low | high);
                }
    }

    const layout::Scheme& scheme_;
    const float* weight_;
    std::int64_t rows_, cols_;
    alignas(64) float transposed_[64 * kPanelRows];
    alignas(64) std::uint8_t q_[64 * kPanelRows];
    std::uint16_t scales_[kPanelRows], mins_[kPanelRows];
};

}  // namespace

QuantizeError quantize_weights(Team& team, const float* weight, std::int64_t rows, std::int64_t cols,
                               const layout::Scheme& scheme, std::uint8_t* out) {
    const std::int64_t panels = layout::padded_rows(rows) / kPanelRows, bytes = layout::panel_bytes(scheme, cols);
    // Added up in the order of the panels, so that the sums do not depend on who did which.
    auto* errors =
        reinterpret_cast<QuantizeError*>(team.scratch(static_cast<std::size_t>(panels) * sizeof(QuantizeError)));
    team.parallel_for(panels, 1, [&](std::int64_t begin, std::int64_t end) {
        PanelQuantizer quantizer(scheme, weight, rows, cols);
        for (std::int64_t p = begin; p < end; ++p) std::construct_at(errors + p, quantizer.run(p, out + p * bytes));
    });
    QuantizeError total;
    for (std::int64_t p = 0; p < panels; ++p) {
        total.squared_error += errors[p].squared_error;
        total.squares += errors[p].squares;
    }
    return total;
}

void dequantize_row(const layout::Scheme& scheme, const std::uint8_t* packed, std::int64_t cols, std::int64_t row,
                    float* out) {
    const std::int64_t padded = layout::padded_cols(scheme, cols), lane = row % kPanelRows;
    const std::uint8_t* superblock = packed + row / kPanelRows * layout::panel_bytes(scheme, cols);
    const float zero = static_cast<float>(scheme.zero());
    for (std::int64_t start = 0; start < padded; start += kSuperblock) {
        const std::int64_t span = std::min(kSuperblock, padded - start), count = std::min(span, cols - start);
        const std::uint8_t* values = superblock + layout::header_bytes(scheme, span) + lane * 4;
        float scale = 0, minimum = 0;
        for (std::int64_t k = 0; k < count; ++k) {
            if (k % scheme.group == 0) {
                const std::int64_t at = k / scheme.group * 32 + lane * 2;
                std::uint16_t half;
                std::memcpy(&half, superblock + at, 2);
                scale = cpu::half_to_float(half);
                if (scheme.asymmetric) {
                    std::memcpy(&half, superblock + span / scheme.group * 32 + at, 2);
                    minimum = cpu::half_to_float(half);
                }
            }
            const std::int64_t j = k % kBlock, line = scheme.bits == 4 ? j % 16 : j;
            const std::uint8_t byte = values[k / kBlock * layout::block_bytes(scheme) + line / 4 * 64 + line % 4];
            const int q = scheme.bits == 8 ? byte : j < 16 ? byte & 15 : byte >> 4;
            const float centred = static_cast<float>(q) - zero;
            out[start + k] = scheme.asymmetric ? std::fma(scale, centred, minimum) : scale * centred;
        }
        superblock += layout::superblock_bytes(scheme, span);
    }
}

}  // namespace cnl
