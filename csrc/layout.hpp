// SPDX-License-Identifier: Apache-2.0
// The packed weight layout: the one definition. The converter, the kernels, the tests and every back end use it.
//
// A weight matrix W [rows N, columns K] (y = W x) is stored as PANELS of 16 rows. A panel is one ascending stream:
//
//   panel p (rows 16p .. 16p+15) = superblock 0 | superblock 1 | ...            256 columns each, the last may be
//   shorter superblock                   = scales [groups][16 rows] fp16
//                                  mins   [groups][16 rows] fp16                 asymmetric schemes only
//                                  zero bytes up to a multiple of 64
//                                  block 0 | block 1 | ...                       32 columns each
//
//   4-bit block (256 B): 4 lines of 64 B.  line t, row r, byte i:  low nibble  = q[r][4t + i]
//                                                                 high nibble = q[r][16 + 4t + i]
//   8-bit block (512 B): 8 lines of 64 B.  line t, row r, byte i:  byte        = q[r][4t + i]
//
// A 64-byte line therefore holds four consecutive columns of each of 16 rows: one 512-bit operand of vpdpbusd, two
// 256-bit ones, four 128-bit ones. Values are unsigned on disk:
//
//   symmetric 4 bit   w = scale * (q - 8)          q in 0..15
//   asymmetric 4 bit  w = scale * q + min          q in 0..15
//   symmetric 8 bit   w = scale * (q - 128)        q in 1..255
//
// Rows are padded to a multiple of 32 and columns to a multiple of the group. Padding has scale 0, min 0 and the
// value that stands for zero, so it contributes exactly nothing.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace cnl::layout {

inline constexpr std::int64_t kPanelRows = 16;
inline constexpr std::int64_t kRowAlign = 32;
inline constexpr std::int64_t kBlock = 32;
inline constexpr std::int64_t kSuperblock = 256;
inline constexpr std::int64_t kLineBytes = 64;

/// How the values of one tensor are stored. `name` is what files and the command line say.
struct Scheme {
    std::string_view name;
    int bits;         // 4 or 8
    int group;        // columns that share one scale (per row): 32 or 64
    bool asymmetric;  // a min beside every scale
    constexpr int zero() const { return asymmetric ? 0 : 1 << (bits - 1); }
};

inline constexpr std::array<Scheme, 4> kSchemes{{
    {"q4-s64", 4, 64, false},
    {"q4-a64", 4, 64, true},
    {"q4-s32", 4, 32, false},
    {"q8-s64", 8, 64, false},
}};

constexpr const Scheme* find_scheme(std::string_view name) {
    for (const Scheme& scheme : kSchemes)
        if (scheme.name == name) return &scheme;
    return nullptr;
}

constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}
constexpr std::int64_t padded_rows(std::int64_t rows) { return round_up(rows, kRowAlign); }
constexpr std::int64_t padded_cols(const Scheme& s, std::int64_t cols) { return round_up(cols, s.group); }

/// Bytes of scales (and mins) before the blocks of a superblock that spans `cols` padded columns.
constexpr std::int64_t header_bytes(const Scheme& s, std::int64_t cols) {
    return round_up(cols / s.group * kPanelRows * 2 * (s.asymmetric ? 2 : 1), kLineBytes);
}
constexpr std::int64_t block_bytes(const Scheme& s) { return kPanelRows * kBlock * s.bits / 8; }
constexpr std::int64_t superblock_bytes(const Scheme& s, std::int64_t cols) {
    return header_bytes(s, cols) + cols / kBlock * block_bytes(s);
}
constexpr std::int64_t panel_bytes(const Scheme& s, std::int64_t cols) {
    const std::int64_t k = padded_cols(s, cols);
    const std::int64_t tail = k % kSuperblock;
    return k / kSuperblock * superblock_bytes(s, kSuperblock) + (tail ? superblock_bytes(s, tail) : 0);
}
constexpr std::int64_t packed_bytes(const Scheme& s, std::int64_t rows, std::int64_t cols) {
    return padded_rows(rows) / kPanelRows * panel_bytes(s, cols);
}

/// Where one value and its scale live, in bytes from the start of the tensor.
struct Position {
    std::int64_t scale;  // fp16; the min, if any, is at scale + min_offset
    std::int64_t min_offset;
    std::int64_t byte;
    int shift;  // of the value inside its byte
};

constexpr Position locate(const Scheme& s, std::int64_t cols, std::int64_t row, std::int64_t col) {
    const std::int64_t k = padded_cols(s, cols);
    const std::int64_t superblock = col / kSuperblock, in_super = col % kSuperblock;
    const std::int64_t span = k - superblock * kSuperblock < kSuperblock ? k - superblock * kSuperblock : kSuperblock;
    const std::int64_t start = row / kPanelRows * panel_bytes(s, cols) + superblock * superblock_bytes(s, kSuperblock);
    const std::int64_t lane = row % kPanelRows, in_block = in_super % kBlock;
    const std::int64_t half = s.bits == 4 ? in_block % 16 : in_block;
    Position at{};
    at.scale = start + (in_super / s.group * kPanelRows + lane) * 2;
    at.min_offset = span / s.group * kPanelRows * 2;
    at.byte = start + header_bytes(s, span) + in_super / kBlock * block_bytes(s) + half / 4 * kLineBytes + lane * 4 +
              half % 4;
    at.shift = s.bits == 4 && in_block >= 16 ? 4 : 0;
    return at;
}

constexpr int unpack_value(const Scheme& s, const std::uint8_t* tensor, const Position& at) {
    return tensor[at.byte] >> at.shift & ((1 << s.bits) - 1);
}
constexpr void pack_value(const Scheme& s, std::uint8_t* tensor, const Position& at, int q) {
    const int mask = ((1 << s.bits) - 1) << at.shift;
    tensor[at.byte] = static_cast<std::uint8_t>((tensor[at.byte] & ~mask) | (q << at.shift & mask));
}

static_assert(superblock_bytes(kSchemes[0], kSuperblock) == 2176);  // 4.25 bits per weight
static_assert(superblock_bytes(kSchemes[1], kSuperblock) == 2304);  // 4.5
static_assert(superblock_bytes(kSchemes[2], kSuperblock) == 2304);  // 4.5, GGML's Q4_0 value for value
static_assert(superblock_bytes(kSchemes[3], kSuperblock) == 4224);  // 8.25

}  // namespace cnl::layout
