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

/// Packs weight float [rows, cols] into out, layout::packed_bytes(scheme, rows, cols) bytes, padding included. The same
/// bytes for every number of threads and instruction set. Throws std::invalid_argument naming row and column for NaN,
/// infinity or values whose scale does not fit fp16.
QuantizeError quantize_weights(Team& team, const float* weight, std::int64_t rows, std::int64_t cols,
                               const layout::Scheme& scheme, std::uint8_t* out);

/// out[0 .. cols) = row `row` of a packed matrix.
void dequantize_row(const layout::Scheme& scheme, const std::uint8_t* packed, std::int64_t cols, std::int64_t row,
                    float* out);

}  // namespace cnl
