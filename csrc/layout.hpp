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
//   A block of 16 rows x 32 columns is one or two planes of bits, low bits first; a plane of p bits is p lines of 64 B:
//
//   8 bits    line t = 0..7, row r, byte i:   byte                       = q[r][4t + i]
//   4 bits    line t = 0..3:                  bits 4h .. 4h+3  (h = 0,1) = q[r][4(t + 4h) + i]
//   2 bits    line t = 0..1:                  bits 2h, 2h+1 (h = 0..3)   = q[r][4(t + 2h) + i]
//   1 bit     one line:                       bit h         (h = 0..7)   = q[r][4h + i]
//
//   2, 4, 8 bits: one plane.   3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2: the second plane holds the high bits of the values.
//
// A 64-byte line therefore holds four consecutive columns of each of 16 rows: one 512-bit operand of vpdpbusd, two
// 256-bit ones, four 128-bit ones. Values of b bits are unsigned on disk:
//
//   symmetric    w = scale * (q - 2^(b-1))    q in 0 .. 2^b - 1, but 1 .. 255 for 8 bits
//   asymmetric   w = scale * q + min          q in 0 .. 2^b - 1
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
    int bits;         // 2, 3, 4, 5, 6 or 8
    int group;        // columns that share one scale (per row): 32, 64 or 128
    bool asymmetric;  // a min beside every scale
    constexpr int zero() const { return asymmetric ? 0 : 1 << (bits - 1); }
    constexpr int low_bits() const { return bits < 4 ? 2 : bits < 8 ? 4 : 8; }  // of the first plane
    constexpr int high_bits() const { return bits - low_bits(); }               // of the second, 0 where there is none
};

inline constexpr std::array<Scheme, 23> kSchemes{{
    {"q4-s64", 4, 64, false},   {"q4-a64", 4, 64, true},   {"q4-s32", 4, 32, false},   {"q8-s64", 8, 64, false},
    {"q4-s128", 4, 128, false}, {"q4-a128", 4, 128, true}, {"q8-s32", 8, 32, false},   {"q8-s128", 8, 128, false},
    {"q6-s32", 6, 32, false},   {"q6-s64", 6, 64, false},  {"q6-s128", 6, 128, false}, {"q5-s32", 5, 32, false},
    {"q5-s64", 5, 64, false},   {"q5-a64", 5, 64, true},   {"q5-s128", 5, 128, false}, {"q5-a128", 5, 128, true},
    {"q3-s32", 3, 32, false},   {"q3-s64", 3, 64, false},  {"q3-a64", 3, 64, true},    {"q3-a128", 3, 128, true},
    {"q2-s32", 2, 32, false},   {"q2-a64", 2, 64, true},   {"q2-a128", 2, 128, true},
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

/// Where a plane of `bits` (1, 2, 4 or 8) keeps columns 4 quad .. 4 quad + 3 of a block: the line, and the bit in its
/// bytes.
constexpr int plane_line(int bits, int quad) { return quad & (bits - 1); }
constexpr int plane_shift(int bits, int quad) { return quad & -bits; }

/// Where one value and its scale live, in bytes from the start of the tensor.
struct Position {
    std::int64_t scale;  // fp16; the min, if any, is at scale + min_offset
    std::int64_t min_offset;
    std::int64_t byte, high_byte;  // of the value's low bits, and of its high ones
    int shift, high_shift;         // of the bits inside their byte
};

constexpr Position locate(const Scheme& s, std::int64_t cols, std::int64_t row, std::int64_t col) {
    const std::int64_t k = padded_cols(s, cols);
    const std::int64_t superblock = col / kSuperblock, in_super = col % kSuperblock;
    const std::int64_t span = k - superblock * kSuperblock < kSuperblock ? k - superblock * kSuperblock : kSuperblock;
    const std::int64_t start = row / kPanelRows * panel_bytes(s, cols) + superblock * superblock_bytes(s, kSuperblock);
    const std::int64_t lane = row % kPanelRows,
                       block = start + header_bytes(s, span) + in_super / kBlock * block_bytes(s);
    const int quad = static_cast<int>(in_super % kBlock / 4), low = s.low_bits(), high = s.high_bits();
    Position at{};
    at.scale = start + (in_super / s.group * kPanelRows + lane) * 2;
    at.min_offset = span / s.group * kPanelRows * 2;
    at.byte = block + plane_line(low, quad) * kLineBytes + lane * 4 + in_super % 4;
    at.shift = plane_shift(low, quad);
    if (high > 0) {
        at.high_byte = block + (low + plane_line(high, quad)) * kLineBytes + lane * 4 + in_super % 4;
        at.high_shift = plane_shift(high, quad);
    }
    return at;
}

constexpr int unpack_value(const Scheme& s, const std::uint8_t* tensor, const Position& at) {
    const int low = tensor[at.byte] >> at.shift & ((1 << s.low_bits()) - 1);
    if (s.high_bits() == 0) return low;
    return low | (tensor[at.high_byte] >> at.high_shift & ((1 << s.high_bits()) - 1)) << s.low_bits();
}
constexpr void pack_value(const Scheme& s, std::uint8_t* tensor, const Position& at, int q) {
    const auto put = [&](std::int64_t byte, int shift, int bits, int value) {
        const int mask = ((1 << bits) - 1) << shift;
        tensor[byte] = static_cast<std::uint8_t>((tensor[byte] & ~mask) | (value << shift & mask));
    };
    put(at.byte, at.shift, s.low_bits(), q);
    if (s.high_bits() > 0) put(at.high_byte, at.high_shift, s.high_bits(), q >> s.low_bits());
}

constexpr bool has_size(std::string_view name, std::int64_t superblock) {
    return superblock_bytes(*find_scheme(name), kSuperblock) == superblock;
}
static_assert(has_size("q4-s64", 2176));  // 4.25 bits per weight
static_assert(has_size("q4-a64", 2304));  // 4.5
static_assert(has_size("q4-s32", 2304));  // 4.5, GGML's Q4_0 value for value
static_assert(has_size("q8-s64", 4224));  // 8.25
static_assert(has_size("q4-s128", 2112) && has_size("q4-a128", 2176) && has_size("q8-s32", 4352));
static_assert(has_size("q8-s128", 4160) && has_size("q6-s32", 3328) && has_size("q6-s64", 3200));
static_assert(has_size("q6-s128", 3136) && has_size("q5-s32", 2816) && has_size("q5-s64", 2688));
static_assert(has_size("q5-a64", 2816) && has_size("q5-s128", 2624) && has_size("q5-a128", 2688));
static_assert(has_size("q3-s32", 1792) && has_size("q3-s64", 1664) && has_size("q3-a64", 1792));
static_assert(has_size("q3-a128", 1664) && has_size("q2-s32", 1280) && has_size("q2-a64", 1280));
static_assert(has_size("q2-a128", 1152));

}  // namespace cnl::layout
