// SPDX-License-Identifier: Apache-2.0
// Float matrices to packed ones and back.
#pragma once

#include <cstdint>

#include "../layout.hpp"
#include "../threads.hpp"

namespace cnl {

struct QuantizeError {
    double squared_error = 0;  // sum of (w - dequantized w)^2
    double squares = 0;        // sum of w^2
};

/// Packs weight float [rows, cols] into out, layout::packed_bytes(scheme, rows, cols) bytes, padding included. Every
/// group of a row gets the scale (and min) of least sum of importance * error^2; importance float [cols], finite and
/// >= 0, null: all columns count the same, as those of a group do whose values are equal, be they 0. The
/// same bytes for every number of threads and instruction set. Throws std::invalid_argument naming row and column for
/// NaN, infinity or values whose scale does not fit fp16.
QuantizeError quantize_weights(Team& team, const float* weight, std::int64_t rows, std::int64_t cols,
                               const layout::Scheme& scheme, const float* importance, std::uint8_t* out);

/// The scales and mins that quantize_weights would choose, fp16 [rows, ceil(cols / group)] each; mins is left alone for
/// symmetric schemes. Throws as quantize_weights.
void fit_groups(Team& team, const float* weight, std::int64_t rows, std::int64_t cols, const layout::Scheme& scheme,
                const float* importance, std::uint16_t* scales, std::uint16_t* mins);

/// What a packed matrix [rows, cols] holds: q [rows, cols] as stored, scales and mins fp16 [rows, ceil(cols / group)].
/// Mins are neither read nor written for symmetric schemes.
struct ConstQuantizedMatrix {
    const std::uint8_t* q;
    const std::uint16_t *scales, *mins;
};
struct QuantizedMatrix {
    std::uint8_t* q;
    std::uint16_t *scales, *mins;
};
/// Packs it into out, padding included. Every q is below 2^bits.
void pack_matrix(Team& team, const ConstQuantizedMatrix& matrix, std::int64_t rows, std::int64_t cols,
                 const layout::Scheme& scheme, std::uint8_t* out);
/// The inverse of pack_matrix.
void unpack_matrix(Team& team, const std::uint8_t* packed, std::int64_t rows, std::int64_t cols,
                   const layout::Scheme& scheme, const QuantizedMatrix& matrix);

/// out[0 .. cols) = row `row` of a packed matrix.
void dequantize_row(const layout::Scheme& scheme, const std::uint8_t* packed, std::int64_t cols, std::int64_t row,
                    float* out);

/// 16 rows x 32 columns, column k's row r at q[k * 16 + r], as a block of the layout.
void pack_block(const layout::Scheme& scheme, const std::uint8_t* q, std::uint8_t* block);

}  // namespace cnl
