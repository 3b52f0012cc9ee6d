// SPDX-License-Identifier: Apache-2.0
// How weights and activations lie in GPU memory: both in the order of tensor-core fragments, so that a lane's operands
// are one 16-byte load and no kernel shuffles or transposes. Plain constexpr C++ for the packer, the kernels and tests.
//
// A weight TILE is 16 rows x 64 columns. lane = 4g + t holds rows g and g + 8, columns k = 32 half + 8t + 4s + j:
//
//   4 bits (512 B)    lane: 16 bytes = word[half][s]; byte b of a word: low nibble row g, high nibble row g + 8
//   8 bits (1024 B)   half: lane: 16 bytes = word[s][row g, row g + 8]
//
//   byte b of a word holds j = {0, 2, 1, 3}[b]
//
// With that order of j one word, masked and shifted, is at the same time registers of A for mma.m16n8k32 (int8), for
// mma.m16n8k16 (fp16, by pairs j = 0, 1 and 2, 3), for two dp4a dots and, four warps stacked, for wgmma m64nNk16.
// A matrix is [padded rows / 16][4 ceil(cols / 256)] tiles, then as many parameter blocks: fp16 by row pair (g, g + 8),
// 8 x {scale, scale} | {scale, min, scale, min} | {scale half 0, half 1, scale half 0, half 1}.
//
// Activations are int8 in blocks of 8 TOKENS: [block][64 columns][token][64 B], byte 16t + 8 half + 4s + b = column as
// above, which is B of the same mma. Beside them [block][64 columns][4][8] int32 sums (columns 0-31, 32-63, all, all as
// a float) and [block][256 columns][8] float scales.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "../layout.hpp"

#ifdef __CUDACC__
#define CNL_HOST_DEVICE __host__ __device__
#else
#define CNL_HOST_DEVICE
#endif

namespace cnl::cuda {

inline constexpr int kTileRows = 16;
inline constexpr int kTileCols = 64;
inline constexpr int kWarp = 32;
inline constexpr int kTokenBlock = 8;
inline constexpr int kSpan = 256;  // columns that share an activation scale
inline constexpr int kSpanTiles = kSpan / kTileCols;
inline constexpr int kSumKinds = 4;  // sums of columns 0-31, of 32-63, of all 64, and that one as a float

/// The schemes that have kernels; layout.hpp knows more. What kernels are instantiated for is the place in this list.
inline constexpr std::array<std::string_view, 4> kSchemeNames{"q4-s64", "q4-a64", "q4-s32", "q8-s64"};
inline constexpr int kSchemeCount = static_cast<int>(kSchemeNames.size());
constexpr const layout::Scheme& scheme_at(int number) {
    return *layout::find_scheme(kSchemeNames[static_cast<std::size_t>(number)]);
}
/// -1: no kernel reads it.
constexpr int scheme_number(std::string_view name) {
    for (int i = 0; i < kSchemeCount; ++i)
        if (kSchemeNames[static_cast<std::size_t>(i)] == name) return i;
    return -1;
}

template <int kScheme>
struct SchemeOf {
    static constexpr int kBits = scheme_at(kScheme).bits;
    static constexpr int kGroup = scheme_at(kScheme).group;
    static constexpr bool kAsymmetric = scheme_at(kScheme).asymmetric;
    static constexpr int kZero = scheme_at(kScheme).zero();
    static_assert((kBits == 4 || kBits == 8) && (kGroup == 64 || (kGroup == 32 && !kAsymmetric)));
    static constexpr int kTileBytes = kTileRows * kTileCols * kBits / 8;
    static constexpr int kLoads = kTileBytes / (kWarp * 16);                    // 16-byte loads of a lane
    static constexpr int kParams = kTileCols / kGroup * (kAsymmetric ? 2 : 1);  // fp16 of a row
    static constexpr int kParamBytes = kTileRows * kParams * 2;
};

constexpr std::int64_t tile_bytes(const layout::Scheme& s) { return kTileRows * kTileCols * s.bits / 8; }
constexpr std::int64_t param_bytes(const layout::Scheme& s) {
    return std::int64_t(kTileRows) * kTileCols / s.group * (s.asymmetric ? 2 : 1) * 2;
}
constexpr std::int64_t row_tiles(std::int64_t rows) { return layout::padded_rows(rows) / kTileRows; }
CNL_HOST_DEVICE constexpr std::int64_t spans(std::int64_t cols) { return (cols + kSpan - 1) / kSpan; }
/// Whole superblocks, so that no inner loop has a rest: tiles beyond the columns have scale 0 and activations 0, which
/// changes no bit of a sum. Models' widths are multiples of 256 anyway.
CNL_HOST_DEVICE constexpr std::int64_t col_tiles(std::int64_t cols) { return spans(cols) * kSpanTiles; }
constexpr std::int64_t params_offset(const layout::Scheme& s, std::int64_t rows, std::int64_t cols) {
    return row_tiles(rows) * col_tiles(cols) * tile_bytes(s);
}
/// Bytes of a whole matrix on the device.
constexpr std::int64_t tiled_bytes(const layout::Scheme& s, std::int64_t rows, std::int64_t cols) {
    return row_tiles(rows) * col_tiles(cols) * (tile_bytes(s) + param_bytes(s));
}

/// {0, 2, 1, 3}: which of four neighbouring columns byte b of a word holds, and the other way round.
CNL_HOST_DEVICE constexpr int swap_middle(int b) { return (b & 1) << 1 | b >> 1; }

/// Where a value of a tile lies.
struct TilePlace {
    int byte, shift;
};
constexpr TilePlace place_in_tile(int bits, int row, int col) {
    const int g = row % 8, high = row / 8, half = col / 32, t = col % 32 / 8, s = col % 8 / 4;
    const int b = swap_middle(col % 4), lane = 4 * g + t;
    if (bits == 4) return {lane * 16 + half * 8 + s * 4 + b, 4 * high};
    return {half * 512 + lane * 16 + (2 * s + high) * 4 + b, 0};
}
/// fp16 index of a parameter of (row, 32-column half) within a tile's block; `kind` 0 scale, 1 min.
constexpr int param_index(const layout::Scheme& s, int row, int half, int kind) {
    const int g = row % 8, high = row / 8, per_row = kTileCols / s.group * (s.asymmetric ? 2 : 1);
    return g * 2 * per_row + high * per_row + (s.group == 32 ? half : kind);
}

/// Byte of column `col` (of 64) within a token's 64 bytes.
CNL_HOST_DEVICE constexpr int place_in_token(int col) {
    return col % 32 / 8 * 16 + col / 32 * 8 + col % 8 / 4 * 4 + swap_middle(col % 4);
}

/// Sizes of the activations of `tokens` tokens; kernels read whole tiles of 32, 64 or 96 tokens.
inline constexpr std::int64_t kTokenAlign = 192;
constexpr std::int64_t token_blocks(std::int64_t tokens) { return layout::round_up(tokens, kTokenAlign) / kTokenBlock; }

}  // namespace cnl::cuda
