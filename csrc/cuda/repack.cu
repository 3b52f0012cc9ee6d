// SPDX-License-Identifier: Apache-2.0
// Packed panels, as they lie in the file, to tiles: on the device, piece by piece, behind the upload.
#include "kernels.hpp"
#include "ptx.cuh"

namespace cnl::cuda {
namespace {

/// What a repack kernel must know of a matrix. `panels` begins at row tile `first`.
struct RepackArgs {
    const std::uint8_t* panels;
    std::uint8_t* tiles;
    std::int64_t panel_bytes, super_bytes, params;  // params: bytes from tiles to the first parameter block
    int padded_cols, col_tiles, first, count;
};

constexpr int kThreads = 128;

template <int kScheme>
struct Source {
    using S = SchemeOf<kScheme>;
    static constexpr int kBlockBytes = kTileRows * 32 * S::kBits / 8;
    const std::uint8_t* superblock;  // the one that holds the tile
    int header, in_super, groups;    // bytes before its blocks, the tile's first column in it, scales in it

    __device__ Source(const RepackArgs& a, int row_tile, int col_tile) {
        const int col = col_tile * kTileCols, super = col / kSpan;
        const int left = a.padded_cols - super * kSpan, span = left < kSpan ? left : kSpan;
        superblock = a.panels + row_tile * a.panel_bytes + super * a.super_bytes;
        in_super = col % kSpan;
        groups = span / S::kGroup;
        header = (groups * kTileRows * 2 * (S::kAsymmetric ? 2 : 1) + 63) / 64 * 64;
    }
    /// Four neighbouring columns (8t + 4s + 0..3 of a 32-column half) of a row, one a byte, in the file's order.
    __device__ std::uint32_t word(int half, int t, int s, int row) const {
        const std::uint8_t* block = superblock + header + (in_super / 32 + half) * kBlockBytes;
        const int line = S::kBits == 4 ? t % 2 * 2 + s : t * 2 + s;
        const std::uint32_t w = *reinterpret_cast<const std::uint32_t*>(block + line * 64 + row * 4);
        return S::kBits == 4 ? w >> (t >= 2 ? 4 : 0) & 0x0f0f0f0fu : w;
    }
    /// The parameter `i` (of kParams) of a row of the tile.
    __device__ std::uint16_t param(int i, int row) const {
        const int group = in_super / S::kGroup + (S::kGroup == 32 ? i : 0);
        const int kind = S::kAsymmetric ? i : 0;
        return reinterpret_cast<const std::uint16_t*>(superblock)[(kind * groups + group) * kTileRows + row];
    }
};

/// A warp a tile.
template <int kScheme>
__global__ void __launch_bounds__(kThreads) repack_kernel(RepackArgs a) {
    using S = SchemeOf<kScheme>;
    constexpr std::uint32_t kSwapMiddle = 0x3120;
    wait_for_previous();
    const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
    const std::int64_t task = static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    const int row_tile = static_cast<int>(task / a.col_tiles), col_tile = static_cast<int>(task % a.col_tiles);
    if (row_tile >= a.count) return;
    const Source<kScheme> source(a, row_tile, col_tile);
    const std::int64_t tile = static_cast<std::int64_t>(a.first + row_tile) * a.col_tiles + col_tile;
    // Columns may end within a tile or before it.
    const int left = a.padded_cols - col_tile * kTileCols, halves = left >= 64 ? 2 : left >= 32 ? 1 : 0;

    std::uint32_t words[S::kLoads][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            if (half >= halves) continue;
            const std::uint32_t low = permute_bytes(source.word(half, t, s, g), kSwapMiddle);
            const std::uint32_t high = permute_bytes(source.word(half, t, s, g + 8), kSwapMiddle);
            if constexpr (S::kBits == 4) {
                words[0][2 * half + s] = low | high << 4;
            } else {
                words[half][2 * s] = low;
                words[half][2 * s + 1] = high;
            }
        }
    for (int i = 0; i < S::kLoads; ++i)
        *reinterpret_cast<uint4*>(a.tiles + tile * S::kTileBytes + i * 512 + lane * 16) =
            make_uint4(words[i][0], words[i][1], words[i][2], words[i][3]);

    auto* params = reinterpret_cast<std::uint16_t*>(a.tiles + a.params + tile * S::kParamBytes);
    for (int i = lane; i < kTileRows * S::kParams; i += kWarp) {
        const int pair = i / (2 * S::kParams), in_pair = i % (2 * S::kParams);
        const int row = pair + 8 * (in_pair / S::kParams), index = in_pair % S::kParams;
        const bool present = S::kGroup == 32 ? index < halves : halves > 0;
        params[i] = present ? source.param(index, row) : std::uint16_t(0);
    }
}

}  // namespace

void repack(const Queue& queue, const layout::Scheme& scheme, const std::uint8_t* panels, std::int64_t rows,
            std::int64_t cols, std::int64_t pair_begin, std::int64_t pair_end, std::uint8_t* tiles) {
    constexpr void (*kKernels[kSchemeCount])(RepackArgs) = {repack_kernel<0>, repack_kernel<1>, repack_kernel<2>,
                                                            repack_kernel<3>};
    static_assert(is_complete(kKernels));
    RepackArgs a{};
    a.panels = panels;
    a.tiles = tiles;
    a.panel_bytes = layout::panel_bytes(scheme, cols);
    a.super_bytes = layout::superblock_bytes(scheme, layout::kSuperblock);
    a.params = params_offset(scheme, rows, cols);
    a.padded_cols = static_cast<int>(layout::padded_cols(scheme, cols));
    a.col_tiles = static_cast<int>(col_tiles(cols));
    a.first = static_cast<int>(2 * pair_begin);
    a.count = static_cast<int>(2 * (pair_end - pair_begin));
    const std::int64_t tasks = std::int64_t(a.count) * a.col_tiles;
    const auto blocks = static_cast<unsigned>((tasks + kThreads / kWarp - 1) / (kThreads / kWarp));
    launch(queue, "repack", kKernels[scheme_number(scheme.name)], {dim3(blocks), dim3(kThreads)}, a);
}

}  // namespace cnl::cuda
