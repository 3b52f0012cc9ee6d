// SPDX-License-Identifier: Apache-2.0
// What the kernels take, and the functions that launch them: no CUDA syntax, so that any file may include it. All
// pointers are device memory, all sizes were checked when the model was built.
#pragma once

#include <cstdint>

#include "../kv_cache.hpp"
#include "launch.hpp"
#include "tile.hpp"

namespace cnl::cuda {

/// Whether a table of kernels by scheme has one everywhere, but where there is none on purpose: a list that is shorter
/// than its array leaves nulls at the end.
template <typename Kernel>
constexpr bool is_complete(const Kernel (&table)[kSchemeCount], int none = -1) {
    for (int i = 0; i < kSchemeCount; ++i)
        if ((table[i] == nullptr) != (i == none)) return false;
    return true;
}

/// Quantized activations (tile.hpp), token_blocks(tokens) blocks of them.
struct Act {
    std::int8_t* values = nullptr;
    std::int32_t* sums = nullptr;
    float* scales = nullptr;
};

/// A matrix in tiles.
struct Tiles {
    int scheme = 0;  // scheme_number (tile.hpp)
    int rows = 0, cols = 0;
    const std::uint8_t* data = nullptr;

    CNL_HOST_DEVICE int pairs() const { return (rows + 31) / 32; }
};

enum class Epilogue { store, add, swiglu };

/// out[token * stride + row] = | += sums + bias. With swiglu: `up` is a second matrix of the same size and scheme, and
/// out = silu(sums + bias) * (up sums + up_bias).
struct Product {
    Tiles weight, up;
    const float *bias = nullptr, *up_bias = nullptr;
    float* out = nullptr;
    std::int64_t stride = 0;
};

/// Up to four products of one scheme, one Act and one number of columns in a launch.
struct MatmulArgs {
    static constexpr int kMaxProducts = 4;
    Act act;
    int tokens = 0, cols = 0;
    int count = 0;
    Product products[kMaxProducts];
};

/// Up to this many tokens every row of weights is a stream from memory, shared by the warps of one block.
inline constexpr int kStreamTokens = 64;

void matmul(const Queue& queue, const MatmulArgs& args, Epilogue epilogue);
/// The same for one token by dp4a instead of mma: an alternative to be measured, same bits.
void matmul_dp4a(const Queue& queue, const MatmulArgs& args, Epilogue epilogue);

/// Packed panels (layout.hpp) of rows [32 pair_begin, 32 pair_end) of a matrix -> its tiles.
void repack(const Queue& queue, const layout::Scheme& scheme, const std::uint8_t* panels, std::int64_t rows,
            std::int64_t cols, std::int64_t pair_begin, std::int64_t pair_end, std::uint8_t* tiles);

/// One row of a step: what the host prepares for every token, once a step. cos and sin follow in memory: float
/// [half], [half]; rows are `row_bytes` apart.
struct Row {
    std::int32_t token;     // -1: the token that was chosen last for this row (Sampled)
    std::int32_t position;  // in its sequence; -1: nothing is here (padding of a captured step)
    std::int32_t table;     // where its sequence's page table begins
    std::int32_t output;    // for the i-th row of a step: the row whose logits are output i
    // For the i-th row of a step: the i-th tile of attention, neighbouring rows of one sequence, and the number of its
    // first chunk among those of all tiles.
    std::int32_t tile_row, tile_count, tile_task;
    std::int32_t unused;
};
static_assert(sizeof(Row) == 32);
struct StepRows {
    const std::byte* rows = nullptr;
    std::int64_t row_bytes = 0;
    const std::int32_t* tables = nullptr;  // page tables, one after another
    CNL_HOST_DEVICE const Row& at(std::int64_t i) const { return *reinterpret_cast<const Row*>(rows + i * row_bytes); }
    CNL_HOST_DEVICE const float* cos(std::int64_t i) const {
        return reinterpret_cast<const float*>(rows + i * row_bytes + sizeof(Row));
    }
};

void embed(const Queue& queue, const Tiles& table, const StepRows& step, const std::int32_t* chosen, int tokens,
           float* x);
/// gamma null: quantize(x). Else quantize(x / rms(x) * gamma).
void norm_quantize(const Queue& queue, const float* x, const float* gamma, float eps, int tokens, int cols,
                   const Act& out);
void gather_rows(const Queue& queue, const float* x, const StepRows& step, int count, int cols, float* out);

/// The cache in GPU memory. A slab (KvLayout: same size) holds 64 positions of one kv head of one layer:
///   fp16   K [d/8][64][8] fp16,    V [64][d] fp16
///   int8   K [d/16][64][16] int8,  V [64][d] int8,  K scale [64] fp16,  V scale [64] fp16
struct Cache {
    std::uint8_t* base = nullptr;
    std::int64_t page_stride = 0, slab_stride = 0;  // of one layer: base is that layer's first slab
    int kv_heads = 0, head_dim = 0, padded_dim = 0;
    bool int8 = false;
    std::int64_t v_offset = 0, k_scale_offset = 0, v_scale_offset = 0;
};

/// Rotates q [rows, heads * d] and k in place and writes k and v into the cache.
void rope_append(const Queue& queue, const StepRows& step, int rows, float* q, float* k, const float* v, int heads,
                 const Cache& cache);

struct AttentionArgs {
    StepRows step;
    Cache cache;
    const float* q = nullptr;
    float* out = nullptr;
    int heads = 0;
    int first_tile = 0, tiles = 0;  // of Row::tile_row
    int piece_heads = 1;            // heads of a group that a block takes together
    int chunks = 1;                 // decode: most chunks of keys that a tile sees
    // Decode: every chunk is a block of its own. Partial results of chunk_task * kv_heads * pieces + ..., and arrival
    // counters, zero between launches.
    float* partials = nullptr;
    std::uint32_t* arrivals = nullptr;
};
inline constexpr int kChunkKeys = 256;

/// How attention is cut: `queries` = tokens * heads that a block holds.
struct AttentionCut {
    int queries, piece_heads, pieces, tile_tokens;
};
/// For decode a tile is one token; for prefill it is as many as fit.
AttentionCut attention_cut(const Queue& queue, int group, int padded_dim, bool int8, bool decode);
/// Floats of AttentionArgs::partials for that many chunks in all.
std::int64_t partial_floats(const AttentionCut& cut, std::int64_t tasks, int kv_heads, int padded_dim);
/// Tiles of one token, a block for every chunk of keys; the last one to arrive merges them in order.
void attention_decode(const Queue& queue, AttentionArgs args);
/// Tiles of neighbouring tokens; a block walks through its chunks. The same bits.
void attention_prefill(const Queue& queue, AttentionArgs args);

/// chosen[i] = the id of the largest of logits[i][0 .. vocab), the lowest id among equals, -1 where one is NaN.
void argmax(const Queue& queue, const float* logits, int rows, int vocab, std::int32_t* chosen, float* scratch_values,
            std::int32_t* scratch_ids);
inline constexpr int kArgmaxParts = 64;  // scratch: that many a row

/// ids, values [rows, width] = the largest of logits[i][0 .. vocab), largest first, the lowest id among equals; what is
/// not a number or infinite comes before all others. width: a power of two, 32 .. kMaxTop; -1 and -infinity beyond the
/// vocabulary. scratch: top_keys of 64 bits.
void top_logits(const Queue& queue, const float* logits, int rows, int vocab, int width, std::int32_t* ids,
                float* values, std::uint64_t* scratch);
inline constexpr int kMaxTop = 1024;
std::int64_t top_keys(std::int64_t rows, std::int64_t vocab, int width);

/// Benchmark: reads `bytes`, a multiple of 16, as fast as it can.
void read_memory(const Queue& queue, const void* memory, std::int64_t bytes, std::uint32_t* sink);
/// Benchmark: does nothing.
void nothing(const Queue& queue);
/// Whether the code that was loaded waits for its predecessor: it was compiled for Hopper or later. A module built for
/// older GPUs runs on Hopper too, without that.
bool waits_for_previous();

}  // namespace cnl::cuda
