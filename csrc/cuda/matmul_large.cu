// SPDX-License-Identifier: Apache-2.0
// Products with many tokens (prefill): bound by arithmetic.
//
// A block computes 128 rows (swiglu: 64 of gate and the same of up) x 64 or 96 tokens: four warps along the rows, each
// with two tiles, times two or three along the tokens, each with four blocks of eight. Twelve warps are as many as the
// registers of a processor hold. Weights go from memory to
// registers, already in fragment order, a tile ahead; activations pass through two stages of shared memory, a
// superblock each, also in fragment order.
#include <algorithm>

#include "fragments.cuh"

namespace cnl::cuda {
namespace {

constexpr int kRowWarps = 4;
constexpr int kWarpBlocks = 4;  // blocks of 8 tokens that a warp multiplies
constexpr int kStages = 2;

template <int kTokenWarps>
struct Stage {
    static constexpr int kBlocks = kTokenWarps * kWarpBlocks;
    std::int8_t values[kBlocks][kSpanTiles][kTokenBlock * kTileCols];
    std::int32_t sums[kBlocks][kSpanTiles][kSumKinds * kTokenBlock];
    float scales[kBlocks][kTokenBlock];

    /// Asks for superblock `super` of the blocks of tokens from `first` on.
    __device__ __forceinline__ void fill(const MatmulArgs& a, int first, int super, int tiles, int supers) {
        constexpr int kThreads = kRowWarps * kTokenWarps * kWarp;
        constexpr int kValueCopies = kSpanTiles * kTokenBlock * kTileCols / 16;
        constexpr int kSumCopies = kSpanTiles * kSumKinds * kTokenBlock / 4, kScaleCopies = kTokenBlock / 4;
        constexpr int kPerBlock = kValueCopies + kSumCopies + kScaleCopies;
        for (int i = static_cast<int>(threadIdx.x); i < kBlocks * kPerBlock; i += kThreads) {
            const int block = i / kPerBlock, at = i % kPerBlock;
            const std::int64_t tile = static_cast<std::int64_t>(first + block) * tiles + super * kSpanTiles;
            if (at < kValueCopies) {
                copy_async(&values[block][0][0] + at * 16, a.act.values + tile * kTokenBlock * kTileCols + at * 16);
            } else if (at < kValueCopies + kSumCopies) {
                const int j = (at - kValueCopies) * 4;
                copy_async(&sums[block][0][0] + j, a.act.sums + tile * kSumKinds * kTokenBlock + j);
            } else {
                const int j = (at - kValueCopies - kSumCopies) * 4;
                copy_async(
                    &scales[block][j],
                    a.act.scales + (static_cast<std::int64_t>(first + block) * supers + super) * kTokenBlock + j);
            }
        }
    }
};

/// The product of a warp and its unit in it: a pair of row tiles, or with swiglu a row tile.
__device__ __forceinline__ const Product* product_of(const MatmulArgs& a, int per_pair, int& unit) {
    for (int i = 0; i < a.count; ++i) {
        const int units = per_pair * a.products[i].weight.pairs();
        if (unit < units) return &a.products[i];
        unit -= units;
    }
    return nullptr;
}

template <int kScheme, int kMatrices, int kTokenWarps>
__global__ void __launch_bounds__(kRowWarps * kTokenWarps * kWarp, 1)
    large_kernel(const __grid_constant__ MatmulArgs a, Epilogue epilogue) {
    CNL_SHARED_MEMORY(memory);
    auto* stages = reinterpret_cast<Stage<kTokenWarps>*>(memory);
    const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    const int g = lane / 4, t = lane % 4;
    const int tiles = static_cast<int>(col_tiles(a.cols)), supers = static_cast<int>(spans(a.cols));
    const int first_block = static_cast<int>(blockIdx.x) * Stage<kTokenWarps>::kBlocks;
    const int own_block = warp / kRowWarps * kWarpBlocks;  // in the stage

    int unit = static_cast<int>(blockIdx.y) * kRowWarps + warp % kRowWarps;
    const Product* product = product_of(a, kMatrices == 2 ? 2 : 1, unit);
    const bool idle = product == nullptr;  // beyond the last row: computes row 0 again and writes nothing
    if (idle) product = &a.products[0], unit = 0;
    const Tiles& other = kMatrices == 2 ? product->up : product->weight;
    const int tile0 = kMatrices == 2 ? unit : 2 * unit, tile1 = kMatrices == 2 ? unit : 2 * unit + 1;
    TileStream<kScheme> streams[2] = {{product->weight, tile0, tiles, lane, 0}, {other, tile1, tiles, lane, 0}};
    TileRegisters<kScheme> next[2];
    const auto fetch = [&](bool wanted, int i) {
        streams[0].load_if(wanted, i, next[0]);
        streams[1].load_if(wanted, i, next[1]);
    };
    fetch(true, 0);
    wait_for_previous();
    stages[0].fill(a, first_block, 0, tiles, supers);
    commit_copies();

    float c[2][kWarpBlocks][4] = {};
    for (int super = 0; super < supers; ++super) {
        wait_copies<0>();
        __syncthreads();  // the stage is there, and nobody reads the other one any more
        if (super + 1 < supers) stages[(super + 1) % kStages].fill(a, first_block, super + 1, tiles, supers);
        commit_copies();
        const Stage<kTokenWarps>& stage = stages[super % kStages];
        float f[2][kWarpBlocks][4] = {};
        // Unrolled, the compiler would mix the tiles, for more registers than there are.
#pragma unroll 1
        for (int i = 0; i < kSpanTiles; ++i) {
            const TileOperands<kScheme> first(next[0]), second(next[1]);
            fetch(i + 1 < kSpanTiles || super + 1 < supers, i + 1);
#pragma unroll
            for (int n = 0; n < kWarpBlocks; ++n) {
                const uint4 v =
                    *reinterpret_cast<const uint4*>(&stage.values[own_block + n][i][g * kTileCols + t * 16]);
                const std::int32_t* sums = &stage.sums[own_block + n][i][2 * t];
                first.multiply(v, sums, f[0][n]);
                second.multiply(v, sums, f[1][n]);
            }
        }
        streams[0].advance(1);
        streams[1].advance(1);
#pragma unroll
        for (int n = 0; n < kWarpBlocks; ++n) {
            const float2 scale = *reinterpret_cast<const float2*>(&stage.scales[own_block + n][2 * t]);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                c[j][n][0] = fmaf(f[j][n][0], scale.x, c[j][n][0]);
                c[j][n][1] = fmaf(f[j][n][1], scale.y, c[j][n][1]);
                c[j][n][2] = fmaf(f[j][n][2], scale.x, c[j][n][2]);
                c[j][n][3] = fmaf(f[j][n][3], scale.y, c[j][n][3]);
            }
        }
    }
    if (idle) return;
#pragma unroll
    for (int n = 0; n < kWarpBlocks; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = (first_block + own_block + n) * kTokenBlock + 2 * t + i % 2, in_tile = g + i / 2 * 8;
            if (token >= a.tokens) continue;
            const int row0 = tile0 * kTileRows + in_tile, row1 = tile1 * kTileRows + in_tile;
            if (kMatrices == 2) {
                if (row0 < product->weight.rows) finish(*product, epilogue, token, row0, c[0][n][i], c[1][n][i]);
            } else {
                if (row0 < product->weight.rows) finish(*product, epilogue, token, row0, c[0][n][i], 0.0f);
                if (row1 < product->weight.rows) finish(*product, epilogue, token, row1, c[1][n][i], 0.0f);
            }
        }
}

using Kernel = void (*)(MatmulArgs, Epilogue);

/// Groups of 32 need the registers of a second sum: two warps along the tokens are the most then.
constexpr int kSmallGroups = 2;
static_assert(scheme_at(kSmallGroups).group == 32);

template <int kMatrices, int kTokenWarps>
Kernel of_scheme(int scheme) {
    constexpr Kernel kKernels[kSchemeCount] = {
        large_kernel<0, kMatrices, kTokenWarps>, large_kernel<1, kMatrices, kTokenWarps>,
        kTokenWarps == 2 ? large_kernel<kSmallGroups, kMatrices, 2> : nullptr, large_kernel<3, kMatrices, kTokenWarps>};
    static_assert(is_complete(kKernels, kTokenWarps == 2 ? -1 : kSmallGroups));
    return kKernels[scheme];
}

template <int kTokenWarps>
void launch_large(const Queue& queue, const MatmulArgs& args, Epilogue epilogue) {
    const bool swiglu = epilogue == Epilogue::swiglu;
    constexpr int kTokens = kTokenWarps * kWarpBlocks * kTokenBlock;
    static_assert(kTokenAlign % kTokens == 0);
    const int scheme = args.products[0].weight.scheme;
    int units = 0;
    for (int i = 0; i < args.count; ++i) units += (swiglu ? 2 : 1) * args.products[i].weight.pairs();
    const Kernel kernel = swiglu ? of_scheme<2, kTokenWarps>(scheme) : of_scheme<1, kTokenWarps>(scheme);
    // Blocks that share weights are neighbours, so that they find them in the second cache.
    const dim3 grid(static_cast<unsigned>((args.tokens + kTokens - 1) / kTokens),
                    static_cast<unsigned>((units + kRowWarps - 1) / kRowWarps));
    launch(queue, "matmul_large", kernel,
           {grid, dim3(kRowWarps * kTokenWarps * kWarp), kStages * sizeof(Stage<kTokenWarps>)}, args, epilogue);
}

}  // namespace

void matmul_stream(const Queue& queue, const MatmulArgs& args, Epilogue epilogue);

void matmul(const Queue& queue, const MatmulArgs& args, Epilogue epilogue) {
    if (args.tokens <= kStreamTokens)
        matmul_stream(queue, args, epilogue);
    else if (args.tokens <= 256 || args.products[0].weight.scheme == kSmallGroups ||
             kStages * sizeof(Stage<3>) > queue.shared_limit)
        launch_large<2>(queue, args, epilogue);
    else
        launch_large<3>(queue, args, epilogue);
}

}  // namespace cnl::cuda
