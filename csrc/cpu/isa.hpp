// SPDX-License-Identifier: Apache-2.0
// The micro-kernels that every instruction set provides, and nothing else.
//
// The files that fill a table (isa_*.cpp) are compiled beyond the baseline of the rest. A function that is inline in a
// shared header could be emitted there with AVX-512 and kept by the linker for everybody. So this header holds data
// only, kernel files include no standard header but <cstdint>, and all their code has internal linkage.
//
// All tables give the same bits. The order of operations is written once, in kernels_*.inl, over the vectors of 16
// floats of vec_*.hpp; only exact integer sums are left to the instruction set.
#pragma once

#include <cstdint>

namespace cnl::cpu {

inline constexpr int kLanes = 16;         // rows of a panel, floats of a vector
inline constexpr int kTileTokens = 6;     // tokens a matmul kernel holds in registers beside two panels
inline constexpr int kStreamTokens = 12;  // and beside one
inline constexpr int kPairRows = 32;      // rows of two panels: the unit of work of a matmul
inline constexpr int kSpan = 256;         // columns that share an activation scale: a superblock of the weights
inline constexpr int kChunkKeys = 256;    // keys of one attention chunk
inline constexpr int kPageKeys = 64;      // positions of a cache page

/// What the matmul kernels multiply: the schemes of layout.hpp with 4 and 8 bits, and shapes of 8 bits to which the
/// others are expanded (ExpandSuperblock). A byte of 8 bits is the value + 128 even where a min is beside; no file has
/// that shape.
struct WeightShape {
    int bits, group;
    bool asymmetric;
};
inline constexpr int kShapeCount = 9;
inline constexpr WeightShape kShapes[kShapeCount] = {{4, 64, false},  {4, 64, true},  {4, 32, false},
                                                     {8, 64, false},  {8, 32, false}, {8, 64, true},
                                                     {4, 128, false}, {4, 128, true}, {8, 128, false}};

/// c += W a over a range of whole superblocks, for one panel and 1 .. 12 tokens or two neighbouring ones and 1 .. 6.
struct MatmulTile {
    const std::uint8_t* weights;  // the range's first superblock in the first panel
    std::int64_t panel_bytes;     // from there to the same superblock of the second panel
    std::int64_t cols;            // of the range, a multiple of 64 or of the group; only the last superblock is short
    const std::int8_t* values;    // [cols / 32][tokens][32]
    const std::int32_t* sums;     // [cols / 32 or 64][tokens]: see QuantizeSpan
    const float* whole64;         // [cols / 64][tokens]: whole sums, for the mins of asymmetric weights
    const float* scales;          // [superblocks][tokens]
    float* c;                     // [tokens][kPairRows]
    std::int64_t weights_ahead;   // bytes from a line that is read to the one that is asked for
    // Pairs only. What the next call reads is asked for beside the arithmetic of this one: lines ask_begin .. ask_end
    // of every group, and all activations this far from the present ones.
    std::int64_t values_ahead;
    int ask_begin, ask_end;
};

/// A superblock of a scheme without matmul kernels, to be written in the shape of 8 bits that stands for it.
struct ExpandSuperblock {
    const std::uint8_t* from;
    std::uint8_t* to;            // both aligned to 64 bytes
    int bits;                    // of the scheme: 2, 3, 5 or 6
    int offset;                  // to be added to every value
    int blocks;                  // of 32 columns to write
    int from_header, to_header;  // bytes before the blocks
    int from_groups, to_groups;  // scales of a row
    int repeat;                  // how often each scale is written
    bool asymmetric;
    std::int64_t ahead;  // bytes from a line that is read to the one that is asked for
};

/// One token's 256 columns (or the last, shorter ones): x -> int8. `tokens` is the stride of the tile's arrays.
struct QuantizeSpan {
    const float* x;      // [cols]
    const float* gamma;  // [cols], or null: y = x, else y = x * factor * gamma
    float factor;
    int cols;  // 1 .. 256
    int tokens;
    std::int8_t* values;  // [8][tokens][32]; columns up to a multiple of 64 are written
    // Sums of 32 and of 64 columns, as this table's products of symmetric weights start with them (block_sum in
    // vec_*.hpp).
    std::int32_t* sums32;  // [8][tokens]
    std::int32_t* sums64;  // [4][tokens]
    float* whole64;        // [4][tokens]: sums over 64 columns
    float* scale;          // [1]
};

/// How the bytes of a cache slab lie (KvLayout).
struct KvShape {
    int head_dim, padded_dim;
    bool int8;
    std::int64_t v_offset, k_scale_offset, v_scale_offset;
};

/// Attention of some queries over one chunk of 256 keys. Query i sees the first keys[i] (1 .. 256) of them.
struct AttentionChunk {
    KvShape shape;
    const std::uint8_t* slabs[kChunkKeys / kPageKeys];
    const std::uint8_t* next;  // what is read after this chunk, to be asked for in time; null where nothing is
    std::int64_t next_bytes;
    int queries;
    const float* q;            // [queries][padded_dim], times 1 / sqrt(head_dim)
    const std::int32_t* keys;  // [queries]
    float* scores;             // [queries][256], scratch
    float* acc;                // [queries][padded_dim]   sum of p v
    float* max;                // [queries]               of the scores
    float* sum;                // [queries]               of p = exp(score - max)
};

/// 16 rows of one group of columns -> q. Transposed: element (column k, row r) at [k * 16 + r].
struct QuantizeGroup {
    const float* w;           // [cols][16]
    const float* importance;  // [cols] weights of the squared errors, not all of them 0; null: all are 1
    int cols;                 // 1 .. group
    int bits;
    bool asymmetric;
    std::uint8_t* q;       // [cols][16]
    std::uint16_t* scale;  // [16] fp16
    std::uint16_t* min;    // [16] fp16, asymmetric only
    float* error;          // [16] sum of squared errors, importance left out
};

struct Kernels {
    const char* name;
    /// One panel that is read once, from memory: [shape][tokens - 1].
    void (*stream_panel[kShapeCount][kStreamTokens])(const MatmulTile&);
    /// Two panels that one call after the other reads.
    void (*pair[kShapeCount][kTileTokens])(const MatmulTile&);
    void (*expand)(const ExpandSuperblock&);
    /// 1 / sqrt(mean(x^2) + eps)
    float (*rms_factor)(const float* x, std::int64_t cols, float eps);
    void (*quantize_span)(const QuantizeSpan&);
    /// The sum that sums32 or sums64 stands for.
    std::int32_t (*whole_sum)(std::int32_t sum);
    /// out = silu(gate) * up; n a multiple of 16
    void (*swiglu)(const float* gate, const float* up, float* out, std::int64_t n);
    /// out = exp(x); n a multiple of 16. Tests only; the ops use it inline.
    void (*exp)(const float* x, float* out, std::int64_t n);
    /// Rotates pairs (j, j + half) of one head.
    void (*rope)(float* x, const float* cos, const float* sin, int half);
    /// Writes one position's key and value (head_dim floats each) into its slab.
    void (*kv_store)(const KvShape&, std::uint8_t* slab, int position, const float* k, const float* v);
    void (*attention_chunk)(const AttentionChunk&);
    /// (max, sum, acc) of earlier chunks takes in those of the next.
    void (*attention_merge)(float* max, float* sum, float* acc, float next_max, float next_sum, const float* next_acc,
                            int padded_dim);
    /// out[dim] = acc / sum
    void (*attention_finish)(const float* acc, float sum, int head_dim, float* out);
    void (*quantize_group)(const QuantizeGroup&);
    /// Benchmark: runs `iterations` of this set's int8 multiply-add at full rate; the number of multiply-adds done.
    std::int64_t (*int8_peak)(std::int64_t iterations);
    /// The same for its float multiply-add.
    std::int64_t (*float_peak)(std::int64_t iterations);
    /// Benchmark: reads an even number of aligned 64-byte lines, asking for each `ahead` bytes before it is read; a sum
    /// of them, so that the reading is not for nothing.
    std::uint64_t (*read_lines)(const std::uint8_t* lines, std::int64_t count, std::int64_t ahead);
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;         // x86-64 only
extern const Kernels kAvxVnniKernels;      // x86-64 only, where the compiler knows it
extern const Kernels kAvx512Kernels;       // x86-64 only
extern const Kernels kNeonDotprodKernels;  // aarch64 only
extern const Kernels kNeonI8mmKernels;     // aarch64 only

}  // namespace cnl::cpu
