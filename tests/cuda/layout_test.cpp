// SPDX-License-Identifier: Apache-2.0
// The tile layout against a naive product, exact, without a GPU: every instruction's fragment map is written out here
// from the manuals and fed with the bytes that tile.hpp places. Prints one line a check; exits with 1 at the first that
// fails. Built and run by tests/test_cuda_layout.py.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/tile.hpp"

using namespace cnl;
using namespace cnl::cuda;

namespace {

std::mt19937 random_bits(1);
int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }

void expect(bool ok, const char* what) {
    if (ok) return;
    std::printf("FAILED: %s\n", what);
    std::exit(1);
}

/// A tile's values and 8 tokens, with the exact products per half of the columns.
struct Problem {
    int bits, q[kTileRows][kTileCols], x[kTokenBlock][kTileCols];
    std::vector<std::uint8_t> tile;
    std::int8_t tokens[kTokenBlock][kTileCols];

    explicit Problem(int bits_) : bits(bits_), tile(static_cast<std::size_t>(kTileRows * kTileCols * bits_ / 8)) {
        for (int r = 0; r < kTileRows; ++r)
            for (int k = 0; k < kTileCols; ++k) {
                q[r][k] = draw(0, (1 << bits) - 1);
                const TilePlace at = place_in_tile(bits, r, k);
                tile[static_cast<std::size_t>(at.byte)] =
                    static_cast<std::uint8_t>(tile[static_cast<std::size_t>(at.byte)] | q[r][k] << at.shift);
            }
        for (int n = 0; n < kTokenBlock; ++n)
            for (int k = 0; k < kTileCols; ++k) {
                x[n][k] = draw(-127, 127);
                tokens[n][place_in_token(k)] = static_cast<std::int8_t>(x[n][k]);
            }
    }
    int product(int row, int token, int begin, int end) const {
        int sum = 0;
        for (int k = begin; k < end; ++k) sum += q[row][k] * x[token][k];
        return sum;
    }
    /// 32-bit word `word` of a lane's 16 bytes; piece: which 512 bytes.
    std::uint32_t word(int lane, int piece, int word_index) const {
        std::uint32_t w = 0;
        for (int b = 0; b < 4; ++b)
            w |= std::uint32_t(tile[static_cast<std::size_t>(piece * 512 + lane * 16 + word_index * 4 + b)]) << 8 * b;
        return w;
    }
    /// The registers of A of an int8 mma over 32 columns, as fragments.cuh makes them.
    void fragment(int lane, int half, std::uint32_t (&a)[4]) const {
        if (bits == 4) {
            const std::uint32_t w0 = word(lane, 0, 2 * half), w1 = word(lane, 0, 2 * half + 1);
            a[0] = w0 & 0x0f0f0f0fu, a[1] = w0 >> 4 & 0x0f0f0f0fu;
            a[2] = w1 & 0x0f0f0f0fu, a[3] = w1 >> 4 & 0x0f0f0f0fu;
        } else {
            for (int i = 0; i < 4; ++i) a[i] = word(lane, half, i);
        }
    }
};

int byte_of(std::uint32_t w, int i) { return static_cast<int>(w >> 8 * i & 255u); }

/// mma.m16n8k32: a lane (g, t) has A[g | g + 8][4t + i | 16 + 4t + i] and B[4t + i | 16 + 4t + i][g].
void check_mma_s8(const Problem& p) {
    for (int half = 0; half < 2; ++half) {
        int a[16][32], b[32][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            std::uint32_t registers[4];
            p.fragment(lane, half, registers);
            for (int i = 0; i < 4; ++i) {
                a[g][4 * t + i] = byte_of(registers[0], i);
                a[g + 8][4 * t + i] = byte_of(registers[1], i);
                a[g][16 + 4 * t + i] = byte_of(registers[2], i);
                a[g + 8][16 + 4 * t + i] = byte_of(registers[3], i);
                b[4 * t + i][g] = p.tokens[g][t * 16 + half * 8 + i];
                b[16 + 4 * t + i][g] = p.tokens[g][t * 16 + half * 8 + 4 + i];
            }
        }
        for (int r = 0; r < 16; ++r)
            for (int n = 0; n < 8; ++n) {
                int sum = 0;
                for (int k = 0; k < 32; ++k) sum += a[r][k] * b[k][n];
                expect(sum == p.product(r, n, 32 * half, 32 * half + 32), "mma.m16n8k32 s8");
            }
    }
}

/// mma.m8n8k16, what Turing has: a lane has A[g][4t + i], B[4t + i][g] and C[g][2t, 2t + 1]. The registers of the
/// larger one in its order: rows g, rows g + 8, then the last 16 columns of both.
void check_mma_turing(const Problem& p) {
    for (int half = 0; half < 2; ++half) {
        int c[16][8] = {};
        for (int i = 0; i < 4; ++i) {
            int a[8][16], b[16][8];
            for (int lane = 0; lane < 32; ++lane) {
                const int g = lane / 4, t = lane % 4;
                std::uint32_t registers[4];
                p.fragment(lane, half, registers);
                for (int j = 0; j < 4; ++j) {
                    a[g][4 * t + j] = byte_of(registers[i], j);
                    b[4 * t + j][g] = p.tokens[g][t * 16 + half * 8 + i / 2 * 4 + j];
                }
            }
            for (int r = 0; r < 8; ++r)
                for (int n = 0; n < 8; ++n)
                    for (int k = 0; k < 16; ++k) c[r + i % 2 * 8][n] += a[r][k] * b[k][n];
        }
        for (int r = 0; r < 16; ++r)
            for (int n = 0; n < 8; ++n) expect(c[r][n] == p.product(r, n, 32 * half, 32 * half + 32), "mma.m8n8k16 s8");
    }
}

/// mma.m16n8k16 in fp16: A[g | g + 8][2t, 2t + 1 | 2t + 8, 2t + 9], B[2t, 2t + 1 | 2t + 8, 2t + 9][g]. The masks leave
/// a pair of nibbles in the halves of a register, the second pair after a shift by 8.
void check_mma_f16(const Problem& p) {
    for (int half = 0; half < 2; ++half)
        for (int s = 0; s < 2; ++s) {
            int a[16][16], b[16][8];
            for (int lane = 0; lane < 32; ++lane) {
                const int g = lane / 4, t = lane % 4;
                const std::uint32_t w = p.word(lane, 0, 2 * half + s);
                const std::uint32_t registers[4] = {w & 0x000f000fu, w >> 4 & 0x000f000fu, w >> 8 & 0x000f000fu,
                                                    w >> 12 & 0x000f000fu};
                for (int i = 0; i < 2; ++i) {
                    a[g][2 * t + i] = static_cast<int>(registers[0] >> 16 * i & 0xffffu);
                    a[g + 8][2 * t + i] = static_cast<int>(registers[1] >> 16 * i & 0xffffu);
                    a[g][2 * t + 8 + i] = static_cast<int>(registers[2] >> 16 * i & 0xffffu);
                    a[g + 8][2 * t + 8 + i] = static_cast<int>(registers[3] >> 16 * i & 0xffffu);
                    const int column = 32 * half + 8 * t + 4 * s + i;
                    b[2 * t + i][g] = p.x[g][column];
                    b[2 * t + 8 + i][g] = p.x[g][column + 2];
                }
            }
            for (int r = 0; r < 16; ++r)
                for (int n = 0; n < 8; ++n) {
                    int sum = 0, expected = 0;
                    for (int k = 0; k < 16; ++k) sum += a[r][k] * b[k][n];
                    for (int t = 0; t < 4; ++t)
                        expected += p.product(r, n, 32 * half + 8 * t + 4 * s, 32 * half + 8 * t + 4 * s + 4);
                    expect(sum == expected, "mma.m16n8k16 f16");
                }
        }
}

/// dp4a: a word's nibbles against the four bytes of a token at the same place, summed over the lanes of a row.
void check_dp4a(const Problem& p) {
    for (int g = 0; g < 8; ++g)
        for (int high = 0; high < 2; ++high)
            for (int half = 0; half < 2; ++half) {
                int sum = 0;
                for (int t = 0; t < 4; ++t) {
                    std::uint32_t a[4];
                    p.fragment(4 * g + t, half, a);
                    for (int s = 0; s < 2; ++s)
                        for (int i = 0; i < 4; ++i)
                            sum += byte_of(a[2 * s + high], i) * p.tokens[3][t * 16 + half * 8 + s * 4 + i];
                }
                expect(sum == p.product(g + 8 * high, 3, 32 * half, 32 * half + 32), "dp4a");
            }
}

/// wgmma m64nNk16 with A in registers: warp w of the four holds rows 16w + .. as an m16n8k16 fragment, and lane (g, t)
/// register i has columns 2t + 8 (i / 2) + {0, 1} of row 16w + g + 8 (i % 2): four stacked tiles.
void check_wgmma() {
    const Problem tiles[4] = {Problem(4), Problem(4), Problem(4), Problem(4)};
    for (int half = 0; half < 2; ++half)
        for (int s = 0; s < 2; ++s) {
            int a[64][16], column_of[16];
            for (int thread = 0; thread < 128; ++thread) {
                const int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
                const std::uint32_t w = tiles[warp].word(lane, 0, 2 * half + s);
                for (int i = 0; i < 4; ++i)
                    for (int j = 0; j < 2; ++j) {
                        const int k = 2 * t + 8 * (i / 2) + j;
                        const std::uint32_t pair = w >> (i / 2 * 8 + i % 2 * 4) & 0x000f000fu;
                        a[16 * warp + g + 8 * (i % 2)][k] = static_cast<int>(pair >> 16 * j & 0xffffu);
                        column_of[k] = 32 * half + 8 * t + 4 * s + 2 * (i / 2) + j;
                    }
            }
            for (int r = 0; r < 64; ++r)
                for (int k = 0; k < 16; ++k)
                    expect(a[r][k] == tiles[r / 16].q[r % 16][column_of[k]], "wgmma m64nNk16 A");
        }
}

/// Every value of a tile has a place of its own, and every bit is used.
void check_places(int bits) {
    std::vector<int> used(static_cast<std::size_t>(kTileRows * kTileCols * bits / 8));
    for (int r = 0; r < kTileRows; ++r)
        for (int k = 0; k < kTileCols; ++k) {
            const TilePlace at = place_in_tile(bits, r, k);
            const int mask = ((1 << bits) - 1) << at.shift;
            expect((used[static_cast<std::size_t>(at.byte)] & mask) == 0, "two values in one place");
            used[static_cast<std::size_t>(at.byte)] |= mask;
        }
    for (const int mask : used) expect(mask == 255, "unused bits in a tile");
    std::vector<bool> seen(kTileCols);
    for (int k = 0; k < kTileCols; ++k) {
        expect(!seen[static_cast<std::size_t>(place_in_token(k))], "two columns in one place");
        seen[static_cast<std::size_t>(place_in_token(k))] = true;
    }
}

/// Sizes: what kernels load is aligned, and parameters of all rows have a place.
void check_sizes() {
    for (int number = 0; number < kSchemeCount; ++number) {
        const layout::Scheme& s = scheme_at(number);
        expect(tile_bytes(s) % 512 == 0 && param_bytes(s) % 32 == 0, "a tile is not aligned");
        std::vector<bool> seen(static_cast<std::size_t>(param_bytes(s) / 2));
        for (int row = 0; row < kTileRows; ++row)
            for (int half = 0; half < (s.group == 32 ? 2 : 1); ++half)
                for (int kind = 0; kind < (s.asymmetric ? 2 : 1); ++kind) {
                    const auto at = static_cast<std::size_t>(param_index(s, row, half, kind));
                    expect(at < seen.size() && !seen[at], "two parameters in one place");
                    seen[at] = true;
                }
        for (const std::int64_t rows : {1, 31, 33, 49954})
            for (const std::int64_t cols : {1, 32, 64, 96, 250, 4096, 11008}) {
                const std::int64_t bytes = tiled_bytes(s, rows, cols), tiles = row_tiles(rows) * col_tiles(cols);
                expect(bytes == tiles * (tile_bytes(s) + param_bytes(s)) && params_offset(s, rows, cols) % 512 == 0,
                       "a matrix has a wrong size");
            }
    }
}

}  // namespace

int main() {
    for (int round = 0; round < 20; ++round) {
        for (const int bits : {4, 8}) {
            const Problem p(bits);
            check_mma_s8(p);
            check_mma_turing(p);
            check_dp4a(p);
            if (bits == 4) check_mma_f16(p);
        }
        check_wgmma();
    }
    for (const int bits : {4, 8}) check_places(bits);
    check_sizes();
    std::printf("mma s8, on Turing, mma f16, dp4a, wgmma A, places, sizes: all equal\n");
}
