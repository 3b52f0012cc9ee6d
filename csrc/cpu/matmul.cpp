// SPDX-License-Identifier: Apache-2.0
// Matrix products: blocking, hand-out of work and epilogues around the micro-kernels.
//
// The unit of work is a pair of panels (32 rows). Its sums are built in a small buffer c [tokens][32] and leave it in
// the epilogue. Up to twelve tokens (decode): every panel is one stream from memory, read once. More: the columns are
// cut so that the pair's weights and one tile's activations stay in the first cache while all tiles of a block of
// tokens pass, each of which asks for its share of the next cut's weights; the next cut adds to c. Neither changes a
// bit, because a cut lies between superblocks, where c is visited anyway.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>

#include "../ops.hpp"
#include "activations.hpp"
#include "cpu_info.hpp"

namespace cnl::ops {
namespace {

using cpu::kPairRows, cpu::kSpan, cpu::kTileTokens;

constexpr bool schemes_agree() {
    if (layout::kSchemes.size() != cpu::kSchemeCount) return false;
    for (std::size_t i = 0; i < layout::kSchemes.size(); ++i) {
        const layout::Scheme& a = layout::kSchemes[i];
        const cpu::SchemeShape& b = cpu::kSchemeShapes[i];
        if (a.bits != b.bits || a.group != b.group || a.asymmetric != b.asymmetric) return false;
    }
    return layout::kRowAlign == kPairRows && layout::kPanelRows == cpu::kLanes && layout::kSuperblock == kSpan;
}
static_assert(schemes_agree(), "isa.hpp restates layout.hpp");

constexpr std::int64_t kMaxBlockTiles = 26;       // 156 tokens: c is 20 KB
constexpr std::int64_t kBlockBytes = 600 * 1024;  // activations of a block of tokens: the second cache
constexpr std::int64_t kChunkBytes = 20 * 1024;   // weights of a pair between two cuts: the first cache
constexpr std::int64_t kPieceBytes = 128 * 1024;  // weights a thread takes at a time in decode

int scheme_index(const Weight& w) { return static_cast<int>(w.scheme - layout::kSchemes.data()); }
std::int64_t pairs_of(const Weight& w) { return layout::padded_rows(w.rows) / kPairRows; }

cpu::MatmulTile tile_at(const ActivationData& a, const Tiles& tiles, std::int64_t tile, int group) {
    const std::int64_t begin = tiles.begin(tile), padded = ActivationData::padded(a.cols);
    cpu::MatmulTile t{};
    t.values = a.values.get() + begin * padded;
    t.sums = group == 32 ? a.sums32.get() + begin * padded / 32 : a.sums64.get() + begin * padded / 64;
    t.whole64 = a.whole64.get() + begin * padded / 64;
    t.scales = a.scales.get() + begin * ActivationData::spans(a.cols);
    return t;
}

const std::uint8_t* pair_data(const Weight& w, std::int64_t pair) {
    return w.data + pair * 2 * layout::panel_bytes(*w.scheme, w.cols);
}

/// c [tokens of tiles first .. last][32] = the pair's rows times these tokens. `next` is the pair that follows.
void multiply_pair(const ActivationData& a, const Tiles& tiles, const Weight& w, std::int64_t pair, std::int64_t first,
                   std::int64_t last, const std::uint8_t* next, float* c) {
    const layout::Scheme& scheme = *w.scheme;
    const int index = scheme_index(w);
    const cpu::Kernels& kernels = cpu::kernels();
    const std::int64_t cols = layout::padded_cols(scheme, w.cols), panel = layout::panel_bytes(scheme, w.cols);
    const std::int64_t superblock = layout::superblock_bytes(scheme, kSpan), origin = tiles.begin(first);
    const std::int64_t padded = ActivationData::padded(a.cols);
    const std::uint8_t* weights = pair_data(w, pair);
    const std::int64_t tokens = tiles.begin(last - 1) + tiles.size(last - 1) - origin;
    std::memset(c, 0, static_cast<std::size_t>(tokens * kPairRows) * sizeof(float));

    if (tiles.count == 1) {
        cpu::MatmulTile t = tile_at(a, tiles, 0, scheme.group);
        t.cols = cols;
        for (int i = 0; i < 2; ++i) {
            t.weights = weights + i * panel;
            t.c = c + i * cpu::kLanes;
            kernels.stream_panel[index][tokens - 1](t);
        }
        return;
    }
    const std::int64_t step = std::max<std::int64_t>(1, kChunkBytes / (2 * superblock)) * kSpan;
    const std::int64_t lines = layout::block_bytes(scheme) * scheme.group / layout::kBlock / layout::kLineBytes;
    for (std::int64_t col = 0; col < cols; col += step) {
        const std::uint8_t* now = weights + col / kSpan * superblock;
        const std::uint8_t* then = col + step < cols ? now + step / kSpan * superblock : next;
        for (std::int64_t tile = first; tile < last; ++tile) {
            const std::int64_t size = tiles.size(tile), turn = tile - first;
            cpu::MatmulTile t = tile_at(a, tiles, tile, scheme.group);
            t.weights = now;
            t.weights_ahead = then - now;
            t.ask_begin = static_cast<int>(lines * turn / (last - first));
            t.ask_end = static_cast<int>(lines * (turn + 1) / (last - first));
            t.panel_bytes = panel;
            t.cols = std::min(step, cols - col);
            t.values += col * size;
            t.sums += col / scheme.group * size;
            t.whole64 += col / 64 * size;
            t.scales += col / kSpan * size;
            t.c = c + (tiles.begin(tile) - origin) * kPairRows;
            const std::int64_t after = tile + 1 < last ? tile + 1 : first;
            const std::int64_t ahead_col = tile + 1 < last ? col : col + step < cols ? col + step : 0;
            t.values_ahead = a.values.get() + tiles.begin(after) * padded + ahead_col * tiles.size(after) - t.values;
            kernels.pair[index][size - 1](t);
        }
    }
}

/// Tokens are taken in blocks of whole tiles, of about equal size.
struct Blocks {
    std::int64_t tiles, count;
    Blocks(std::int64_t tile_count, std::int64_t padded_cols) : tiles(tile_count) {
        const std::int64_t fit = std::clamp<std::int64_t>(kBlockBytes / (padded_cols * kTileTokens), 4, kMaxBlockTiles);
        count = (tiles + fit - 1) / fit;
    }
    std::int64_t begin(std::int64_t block) const { return tiles * block / count; }
};

/// For every pair and block of tokens: fill(pair, first tile, last tile), pairs of one block next to each other.
template <typename Fill>
void for_pairs(Team& team, const ActivationData& a, const Tiles& tiles, std::int64_t pairs, std::int64_t pair_bytes,
               Fill&& fill) {
    const Blocks blocks(tiles.count, ActivationData::padded(a.cols));
    const std::int64_t grain = tiles.count > 1 ? 1 : std::max<std::int64_t>(1, kPieceBytes / pair_bytes);
    team.parallel_for(blocks.count * pairs, grain, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t block = i / pairs;
            fill(i % pairs, blocks.begin(block), blocks.begin(block + 1));
        }
    });
}

/// Visits the tokens and rows of a filled c: use(token, row, &c of that row, rows there).
template <typename Use>
void for_rows(const Tiles& tiles, const Weight& w, std::int64_t pair, std::int64_t first, std::int64_t last,
              const float* c, Use&& use) {
    const std::int64_t origin = tiles.begin(first), end = tiles.begin(last - 1) + tiles.size(last - 1);
    const std::int64_t row = pair * kPairRows, rows = std::min<std::int64_t>(kPairRows, w.rows - row);
    for (std::int64_t token = origin; token < end; ++token, c += kPairRows) use(token, row, c, rows);
}

using Sums = std::array<float, static_cast<std::size_t>(kMaxBlockTiles * kTileTokens * kPairRows)>;

}  // namespace

void matmul(Team& team, const Activations& x, std::span<const Projection> projections) {
    const ActivationData& a = x.data().seen_by(team);
    const Tiles tiles(a.m);
    std::int64_t pairs = 0, pair_bytes = 1;
    for (const Projection& p : projections) {
        pairs += pairs_of(*p.weight);
        pair_bytes = std::max(pair_bytes, 2 * layout::panel_bytes(*p.weight->scheme, p.weight->cols));
    }
    for_pairs(team, a, tiles, pairs, pair_bytes, [&](std::int64_t pair, std::int64_t first, std::int64_t last) {
        const Projection* p = projections.data();
        while (pair >= pairs_of(*p->weight)) pair -= pairs_of(*(p++)->weight);
        alignas(64) Sums c;
        multiply_pair(a, tiles, *p->weight, pair, first, last, pair_data(*p->weight, pair + 1), c.data());
        for_rows(tiles, *p->weight, pair, first, last, c.data(),
                 [&](std::int64_t token, std::int64_t row, const float* sums, std::int64_t rows) {
                     float* out = p->out + token * p->stride + row;
                     for (std::int64_t r = 0; r < rows; ++r) out[r] = p->bias ? sums[r] + p->bias[row + r] : sums[r];
                 });
    });
}

void matmul_add(Team& team, const Activations& activations, const Weight& w, const float* bias, float* x) {
    const ActivationData& a = activations.data().seen_by(team);
    const Tiles tiles(a.m);
    const std::int64_t pair_bytes = 2 * layout::panel_bytes(*w.scheme, w.cols);
    for_pairs(team, a, tiles, pairs_of(w), pair_bytes, [&](std::int64_t pair, std::int64_t first, std::int64_t last) {
        alignas(64) Sums c;
        multiply_pair(a, tiles, w, pair, first, last, pair_data(w, pair + 1), c.data());
        for_rows(tiles, w, pair, first, last, c.data(),
                 [&](std::int64_t token, std::int64_t row, const float* sums, std::int64_t rows) {
                     float* out = x + token * w.rows + row;
                     for (std::int64_t r = 0; r < rows; ++r) out[r] += bias ? sums[r] + bias[row + r] : sums[r];
                 });
    });
}

void matmul_swiglu(Team& team, const Activations& activations, const Weight& gate, const float* gate_bias,
                   const Weight& up, const float* up_bias, float* h, Activations* out) {
    const ActivationData& a = activations.data().seen_by(team);
    const Tiles tiles(a.m);
    const std::int64_t spans = ActivationData::spans(gate.rows);
    std::optional<SpanWriter> writer;
    if (out) writer.emplace(SpanWriter::shared(team, out->data(), a.m, gate.rows));
    std::atomic<std::uint32_t>* done = team.counters(static_cast<std::size_t>(tiles.count * spans));
    const std::int64_t pair_bytes =
        2 * (layout::panel_bytes(*gate.scheme, gate.cols) + layout::panel_bytes(*up.scheme, up.cols));
    for_pairs(team, a, tiles, pairs_of(gate), pair_bytes,
              [&](std::int64_t pair, std::int64_t first, std::int64_t last) {
                  alignas(64) Sums c, d;
                  multiply_pair(a, tiles, gate, pair, first, last, pair_data(up, pair), c.data());
                  multiply_pair(a, tiles, up, pair, first, last, pair_data(gate, pair + 1), d.data());
                  float* up_sums = d.data();
                  for_rows(tiles, gate, pair, first, last, c.data(),
                           [&](std::int64_t token, std::int64_t row, const float* sums, std::int64_t rows) {
                               alignas(64) float g[kPairRows], u[kPairRows], product[kPairRows];
                               std::memcpy(g, sums, sizeof g);
                               std::memcpy(u, up_sums, sizeof u);
                               up_sums += kPairRows;
                               for (std::int64_t r = 0; gate_bias && r < rows; ++r) g[r] += gate_bias[row + r];
                               for (std::int64_t r = 0; up_bias && r < rows; ++r) u[r] += up_bias[row + r];
                               cpu::kernels().swiglu(g, u, product, kPairRows);
                               std::memcpy(h + token * gate.rows + row, product,
                                           static_cast<std::size_t>(rows) * sizeof(float));
                           });
                  // Who finishes the last rows of a span of h quantizes it, for the block's tokens.
                  const std::int64_t span = pair * kPairRows / kSpan, span_pairs = kSpan / kPairRows;
                  const std::int64_t parts = std::min(span_pairs, pairs_of(gate) - span * span_pairs);
                  if (!writer || !last_part(done[first * spans + span], parts)) return;
                  const std::int64_t end = tiles.begin(last - 1) + tiles.size(last - 1);
                  for (std::int64_t token = tiles.begin(first); token < end; ++token)
                      writer->write(h, nullptr, 1.0f, token, span, span + 1);
              });
}

}  // namespace cnl::ops
