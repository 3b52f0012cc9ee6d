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

constexpr int kMaxGroup = 128;
constexpr bool groups_fit() {
    for (const layout::Scheme& scheme : layout::kSchemes)
        if (scheme.group > kMaxGroup) return false;
    return true;
}
static_assert(groups_fit());

/// Fits the groups of a matrix, 16 rows at a time.
class GroupFitter {
 public:
    GroupFitter(const layout::Scheme& scheme, const float* weight, std::int64_t rows, std::int64_t cols,
                const float* importance)
        : scheme_(scheme), weight_(weight), rows_(rows), cols_(cols), importance_(importance) {}

    /// The group of `row` and the 15 after it that begins at `col`, into q, scales and mins: transposed, and what is
    /// outside of the matrix is padding.
    void fit(std::int64_t row, std::int64_t col, QuantizeError& total) {
        const std::int64_t rows = std::clamp<std::int64_t>(rows_ - row, 0, kPanelRows);
        const std::int64_t count = std::clamp<std::int64_t>(cols_ - col, 0, scheme_.group);
        std::memset(q, scheme_.zero(), sizeof q);
        std::memset(scales, 0, sizeof scales);
        std::memset(mins, 0, sizeof mins);
        if (rows == 0 || count == 0) return;
        float squares[kPanelRows] = {};
        transpose(row, rows, col, count, squares);

        float error[kPanelRows];
        cpu::QuantizeGroup group{};
        group.w = transposed_;
        group.importance = importance_of(col, count);
        group.cols = static_cast<int>(count);
        group.bits = scheme_.bits;
        group.asymmetric = scheme_.asymmetric;
        group.q = q;
        group.scale = scales;
        group.min = mins;
        group.error = error;
        cpu::kernels().quantize_group(group);
        check_scales(scales, row, col);
        if (scheme_.asymmetric) check_scales(mins, row, col);
        for (std::int64_t r = 0; r < rows; ++r) {
            total.squared_error += static_cast<double>(error[r]);
            total.squares += static_cast<double>(squares[r]);
        }
    }

    alignas(64) std::uint8_t q[kMaxGroup * kPanelRows];
    std::uint16_t scales[kPanelRows], mins[kPanelRows];

 private:
    void transpose(std::int64_t row, std::int64_t rows, std::int64_t col, std::int64_t count, float* squares) {
        // All of it: of a loop over the missing rows GCC 12 makes aligned stores to addresses that are not.
        if (rows < kPanelRows) std::fill_n(transposed_, count * kPanelRows, 0.0f);
        for (std::int64_t r = 0; r < rows; ++r) {
            const float* source = weight_ + (row + r) * cols_ + col;
            float sum = 0;
            for (std::int64_t k = 0; k < count; ++k) {
                transposed_[k * kPanelRows + r] = source[k];
                sum += source[k] * source[k];
            }
            squares[r] = sum;
        }
        float poison = 0;
        for (std::int64_t i = 0; i < count * kPanelRows; ++i) poison += transposed_[i] * 0.0f;
        if (poison != 0.0f) refuse_values(weight_, cols_, row, rows, col, count);
    }

    /// Relative to the group's largest, so that sums of squares stay in range; null where all count the same.
    const float* importance_of(std::int64_t col, std::int64_t count) {
        if (!importance_) return nullptr;
        const auto [least, most] = std::minmax_element(importance_ + col, importance_ + col + count);
        if (*least == *most) return nullptr;
        for (std::int64_t k = 0; k < count; ++k) relative_[k] = importance_[col + k] / *most;
        return relative_;
    }

    const layout::Scheme& scheme_;
    const float* weight_;
    std::int64_t rows_, cols_;
    const float* importance_;
    alignas(64) float transposed_[kMaxGroup * kPanelRows];
    float relative_[kMaxGroup];
};

QuantizeError quantize_panel(GroupFitter& fitter, const layout::Scheme& scheme, std::int64_t cols, std::int64_t panel,
                             std::uint8_t* out) {
    const std::int64_t padded = layout::padded_cols(scheme, cols), block_bytes = layout::block_bytes(scheme);
    QuantizeError total;
    for (std::int64_t start = 0; start < padded; start += kSuperblock) {
        const std::int64_t span = std::min(kSuperblock, padded - start);
        const std::int64_t groups = span / scheme.group, header = layout::header_bytes(scheme, span);
        std::memset(out, 0, static_cast<std::size_t>(header));
        std::uint8_t* block = out + header;
        for (std::int64_t g = 0; g < groups; ++g) {
            fitter.fit(panel * kPanelRows, start + g * scheme.group, total);
            std::memcpy(out + g * 32, fitter.scales, 32);
            if (scheme.asymmetric) std::memcpy(out + (groups + g) * 32, fitter.mins, 32);
            for (std::int64_t b = 0; b < scheme.group / kBlock; ++b, block += block_bytes)
                pack_block(scheme, fitter.q + b * kBlock * kPanelRows, block);
        }
        out += layout::superblock_bytes(scheme, span);
    }
    return total;
}

}  // namespace

QuantizeError quantize_weights(Team& team, const float* weight, std::int64_t rows, std::int64_t cols,
                               const layout::Scheme& scheme, const float* importance, std::uint8_t* out) {
    const std::int64_t panels = layout::padded_rows(rows) / kPanelRows, bytes = layout::panel_bytes(scheme, cols);
    // Added up in the order of the panels, so that the sums do not depend on who did which.
    auto* errors =
        reinterpret_cast<QuantizeError*>(team.scratch(static_cast<std::size_t>(panels) * sizeof(QuantizeError)));
    team.parallel_for(panels, 1, [&](std::int64_t begin, std::int64_t end) {
        GroupFitter fitter(scheme, weight, rows, cols, importance);
        for (std::int64_t p = begin; p < end; ++p)
            std::construct_at(errors + p, quantize_panel(fitter, scheme, cols, p, out + p * bytes));
    });
    QuantizeError total;
    for (std::int64_t p = 0; p < panels; ++p) {
        total.squared_error += errors[p].squared_error;
        total.squares += errors[p].squares;
    }
    return total;
}

void fit_groups(Team& team, const float* weight, std::int64_t rows, std::int64_t cols, const layout::Scheme& scheme,
                const float* importance, std::uint16_t* scales, std::uint16_t* mins) {
    const std::int64_t groups = layout::padded_cols(scheme, cols) / scheme.group;
    team.parallel_for((rows + kPanelRows - 1) / kPanelRows, 1, [&](std::int64_t begin, std::int64_t end) {
        GroupFitter fitter(scheme, weight, rows, cols, importance);
        QuantizeError unused;
        for (std::int64_t row = begin * kPanelRows; row < std::min(rows, end * kPanelRows); row += kPanelRows)
            for (std::int64_t g = 0; g < groups; ++g) {
                fitter.fit(row, g * scheme.group, unused);
                for (std::int64_t r = 0; r < std::min(kPanelRows, rows - row); ++r) {
                    scales[(row + r) * groups + g] = fitter.scales[r];
                    if (scheme.asymmetric) mins[(row + r) * groups + g] = fitter.mins[r];
                }
            }
    });
}

}  // namespace cnl
