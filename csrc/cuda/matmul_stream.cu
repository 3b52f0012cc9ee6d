// SPDX-License-Identifier: Apache-2.0
// Products with few tokens (decode): the weights are a stream from memory, read once.
//
// A block takes a tile of 16 rows (swiglu: of gate and of up), its eight warps take the superblocks in turn. Sums must
// be added in the order of the superblocks, so each leaves its own in shared memory, and after every round of them
// threads that own a result each go on with their chain. The first weights are asked for before the wait for the
// previous kernel: they depend on nothing.
#include <algorithm>

#include "fragments.cuh"

namespace cnl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kResults = kTileRows * kTokenBlock;  // of a tile and a block of tokens

/// The product that a block works on, and the row tile in it.
__device__ __forceinline__ const Product& product_of(const MatmulArgs& a, int& row_tile) {
    int i = 0;
    while (row_tile >= 2 * a.products[i].weight.pairs()) row_tile -= 2 * a.products[i++].weight.pairs();
    return a.products[i];
}

/// Blocks that a processor should hold: as many as their registers allow without spills.
constexpr int resident(int scheme, int matrices, int blocks) {
    const bool small = scheme <= 1;  // 4 bits, one group a tile
    return blocks > 1 ? 1 : matrices == 1 ? (small ? 3 : 2) : (small ? 2 : 1);
}

template <int kScheme, int kMatrices, int kBlocks, bool kDot>
__global__ void __launch_bounds__(kThreads, resident(kScheme, kMatrices, kBlocks))
    stream_kernel(const __grid_constant__ MatmulArgs a, Epilogue epilogue, int round) {
    constexpr int kAhead = kBlocks == 1 ? 4 : 2;
    constexpr int kOwned = (kBlocks * kResults + kThreads - 1) / kThreads;  // results that a thread adds up
    CNL_SHARED_MEMORY(memory);
    auto* partial = reinterpret_cast<float*>(memory);  // [round][matrices][blocks][16 rows][8 tokens]

    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const int g = lane / 4, t = lane % 4;
    const int tiles = static_cast<int>(col_tiles(a.cols)), supers = static_cast<int>(spans(a.cols));
    int row_tile = static_cast<int>(blockIdx.x);
    const Product& product = product_of(a, row_tile);
    const int first_block = static_cast<int>(blockIdx.y) * kBlocks;

    // Tiles are asked for kAhead before they are needed.
    TileStream<kScheme> gate(product.weight, row_tile, tiles, lane, warp);
    TileStream<kScheme> up(kMatrices == 2 ? product.up : product.weight, row_tile, tiles, lane, warp);
    TileRegisters<kScheme> next[kMatrices][kAhead];
    const auto fetch = [&](bool wanted, int i, int slot) {
        gate.load_if(wanted, i, next[0][slot]);
        if constexpr (kMatrices == 2) up.load_if(wanted, i, next[kMatrices - 1][slot]);
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) fetch(warp < supers, i, i);
    wait_for_previous();

    // A lane's token of B. Where there are fewer tokens the last one is read again: an address that is asked for
    // anyway.
    const std::int8_t* x[kBlocks];
    const std::int32_t* sums[kBlocks];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
        const int left = a.tokens - (first_block + n) * kTokenBlock - 1;
        const int token = kDot ? 0 : g < left ? g : left > 0 ? left : 0;
        const std::int64_t block = static_cast<std::int64_t>(first_block + n) * tiles;
        x[n] = a.act.values + block * kTokenBlock * kTileCols + token * kTileCols + t * 16;
        sums[n] = a.act.sums + block * kSumKinds * kTokenBlock + (kDot ? 0 : 2 * t);
    }
    float c[kMatrices][kOwned] = {};

    for (int base = 0; base < supers; base += round) {
        const int end = base + round < supers ? base + round : supers;
        for (int super = base + warp; super < end; super += kWarps) {
            float f[kMatrices][kBlocks][4] = {};
            // The next superblock of this warp may lie in the next round: rounds are multiples of the warps.
            const bool more = super + kWarps < supers;
#pragma unroll
            for (int i = 0; i < kSpanTiles; ++i) {
                const int tile = super * kSpanTiles + i, slot = i % kAhead, ahead = i + kAhead;
                const bool same = ahead < kSpanTiles;  // superblock as now
                const int from = same ? ahead : ahead + (kWarps - 1) * kSpanTiles;
                const std::int32_t* sum = sums[0] + tile * kSumKinds * kTokenBlock;
                if constexpr (kDot) {
                    const uint4 v = *reinterpret_cast<const uint4*>(x[0] + tile * kTokenBlock * kTileCols);
#pragma unroll
                    for (int j = 0; j < kMatrices; ++j) multiply_dp4a(next[j][slot], v, sum, f[j][0]);
                    fetch(same || more, from, slot);
                } else {
                    const TileOperands<kScheme> first(next[0][slot]), second(next[kMatrices - 1][slot]);
                    fetch(same || more, from, slot);
#pragma unroll
                    for (int n = 0; n < kBlocks; ++n) {
                        const uint4 v = *reinterpret_cast<const uint4*>(x[n] + tile * kTokenBlock * kTileCols);
                        sum = sums[n] + tile * kSumKinds * kTokenBlock;
                        first.multiply(v, sum, f[0][n]);
                        if constexpr (kMatrices == 2) second.multiply(v, sum, f[kMatrices - 1][n]);
                    }
                }
            }
            gate.advance(kWarps);
            up.advance(kWarps);
            float* own = partial + static_cast<std::int64_t>(super - base) * kMatrices * kBlocks * kResults;
#pragma unroll
            for (int j = 0; j < kMatrices; ++j)
#pragma unroll
                for (int n = 0; n < kBlocks; ++n) {
                    float* at = own + (j * kBlocks + n) * kResults + g * kTokenBlock + 2 * t;
                    if constexpr (kDot) {
                        if (t == 0) at[0] = f[j][n][0], at[8 * kTokenBlock] = f[j][n][2];
                    } else {
                        *reinterpret_cast<float2*>(at) = make_float2(f[j][n][0], f[j][n][1]);
                        *reinterpret_cast<float2*>(at + 8 * kTokenBlock) = make_float2(f[j][n][2], f[j][n][3]);
                    }
                }
        }
        __syncthreads();
#pragma unroll
        for (int o = 0; o < kOwned; ++o) {
            const int result = o * kThreads + thread, block = first_block + result / kResults,
                      token = result % kTokenBlock;
            if (result >= kBlocks * kResults || block * kTokenBlock + token >= a.tokens) continue;
            const float* scale = a.act.scales + static_cast<std::int64_t>(block) * supers * kTokenBlock + token;
            for (int super = base; super < end; ++super) {
                const float* own =
                    partial + static_cast<std::int64_t>(super - base) * kMatrices * kBlocks * kResults + result;
#pragma unroll
                for (int j = 0; j < kMatrices; ++j)
                    c[j][o] = fmaf(own[j * kBlocks * kResults], scale[super * kTokenBlock], c[j][o]);
            }
        }
        if (end < supers) __syncthreads();
    }
#pragma unroll
    for (int o = 0; o < kOwned; ++o) {
        const int result = o * kThreads + thread;
        const int token = (first_block + result / kResults) * kTokenBlock + result % kTokenBlock;
        const int row = row_tile * kTileRows + result % kResults / kTokenBlock;
        if (result < kBlocks * kResults && token < a.tokens && row < product.weight.rows)
            finish(product, epilogue, token, row, c[0][o], c[kMatrices - 1][o]);
    }
}

using Kernel = void (*)(MatmulArgs, Epilogue, int);

template <int kMatrices, int kBlocks, bool kDot>
Kernel of_scheme(int scheme) {
    constexpr Kernel kKernels[kSchemeCount] = {
        stream_kernel<0, kMatrices, kBlocks, kDot>, stream_kernel<1, kMatrices, kBlocks, kDot>,
        stream_kernel<2, kMatrices, kBlocks, kDot>, stream_kernel<3, kMatrices, kBlocks, kDot>};
    static_assert(is_complete(kKernels));
    return kKernels[scheme];
}

template <int kMatrices>
Kernel of_blocks(int scheme, int blocks) {
    switch (blocks) {
        case 1:
            return of_scheme<kMatrices, 1, false>(scheme);
        case 2:
            return of_scheme<kMatrices, 2, false>(scheme);
        default:
            return of_scheme<kMatrices, 4, false>(scheme);
    }
}

void launch_stream(const Queue& queue, const char* name, Kernel kernel, const MatmulArgs& args, Epilogue epilogue,
                   int blocks) {
    // Few rounds, but as much shared memory as lets several blocks run on a processor.
    constexpr std::size_t kSharedBytes = 24576;
    const int matrices = epilogue == Epilogue::swiglu ? 2 : 1, supers = static_cast<int>(spans(args.cols));
    const std::size_t each = sizeof(float) * static_cast<std::size_t>(matrices * blocks * kResults);
    const int fit = static_cast<int>(kSharedBytes / each) / kWarps * kWarps;
    const int round = std::min(std::max(fit, kWarps), (supers + kWarps - 1) / kWarps * kWarps);
    unsigned row_tiles = 0;
    for (int i = 0; i < args.count; ++i) row_tiles += 2 * static_cast<unsigned>(args.products[i].weight.pairs());
    const auto groups = static_cast<unsigned>((args.tokens + blocks * kTokenBlock - 1) / (blocks * kTokenBlock));
    launch(queue, name, kernel, {dim3(row_tiles, groups), dim3(kThreads), each * static_cast<std::size_t>(round)}, args,
           epilogue, round);
}

}  // namespace

void matmul_stream(const Queue& queue, const MatmulArgs& args, Epilogue epilogue) {
    // With two matrices four blocks of tokens do not fit in registers.
    const int most = epilogue == Epilogue::swiglu ? 2 : 4, scheme = args.products[0].weight.scheme;
    const int blocks = std::min(args.tokens <= 8 ? 1 : args.tokens <= 16 ? 2 : 4, most);
    const Kernel kernel = epilogue == Epilogue::swiglu ? of_blocks<2>(scheme, blocks) : of_blocks<1>(scheme, blocks);
    launch_stream(queue, "matmul", kernel, args, epilogue, blocks);
}

void matmul_dp4a(const Queue& queue, const MatmulArgs& args, Epilogue epilogue) {
    const int scheme = args.products[0].weight.scheme;
    const Kernel kernel = epilogue == Epilogue::swiglu ? of_scheme<2, 1, true>(scheme) : of_scheme<1, 1, true>(scheme);
    launch_stream(queue, "matmul_dp4a", kernel, args, epilogue, 1);
}

}  // namespace cnl::cuda
