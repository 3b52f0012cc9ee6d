// SPDX-License-Identifier: Apache-2.0
// Matrix products: blocking, hand-out of work and epilogues around the micro-kernels.
//
// The unit of work is a pair of panels (32 rows). Its sums are built in a small buffer c [tokens][32] and leave it in
// the epilogue. Up to twelve tokens (decode): every panel is one stream from memory, read once. More: the columns are
// cut so that the pair's weights and one tile's activations stay in the first cache while all tiles of a block of
// tokens pass, each of which asks for its share of the next cut's weights; the next cut adds to c. Neither changes a
// bit, because a cut lies between superblocks, where c is visited anyway.
//
// Schemes without kernels of their own are expanded to 8 bits, a cut of a pair at a time.
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

/// The kernels that multiply a scheme: those of its own shape, or of the 8 bits to which it is expanded.
struct Road {
    int shape = -1;  // index into cpu::kShapes
    bool expanded = false;
};

constexpr Road road_of(const layout::Scheme& scheme) {
    const auto find = [](int bits, int group, bool asymmetric) {
        for (int i = 0; i < cpu::kShapeCount; ++i) {
            const cpu::WeightShape& shape = cpu::kShapes[i];
            if (shape.bits == bits && shape.group == group && shape.asymmetric == asymmetric) return i;
        }
        return -1;
    };
    const int own = find(scheme.bits, scheme.group, scheme.asymmetric);
    if (own >= 0) return {own, false};
    return {find(8, std::min(scheme.group, 64), scheme.asymmetric), true};
}

constexpr std::array<Road, layout::kSchemes.size()> kRoads = [] {
    std::array<Road, layout::kSchemes.size()> roads;
    for (std::size_t i = 0; i < roads.size(); ++i) roads[i] = road_of(layout::kSchemes[i]);
    return roads;
}();
const Road& road_of(const Weight& w) { return kRoads[static_cast<std::size_t>(w.scheme - layout::kSchemes.data())]; }

constexpr bool layouts_agree() {
    for (const Road& road : kRoads)
        if (road.shape < 0) return false;
    return layout::kRowAlign == kPairRows && layout::kPanelRows == cpu::kLanes && layout::kSuperblock == kSpan;
}
static_assert(layouts_agree(), "isa.hpp restates layout.hpp, and every scheme needs a way to be multiplied");

constexpr std::int64_t kMaxBlockTiles = 26;       // 156 tokens: c is 20 KB
constexpr std::int64_t kBlockBytes = 600 * 1024;  // activations of a block of tokens: the second cache
constexpr std::int64_t kChunkBytes = 20 * 1024;   // weights of a pair between two cuts: the first cache
constexpr std::int64_t kPieceBytes = 128 * 1024;  // weights a thread takes at a time in decode
constexpr std::int64_t kStreamPairs = 8;          // of one matrix before as many of the other
constexpr std::int64_t kExpandedSupers = 2;       // superblocks of a panel expanded at a time: 17 KB of a pair
constexpr std::int64_t kExpandedBytes = 4352;     // of the largest of them: 8 bits in groups of 32, or with mins

std::int64_t pairs_of(const Weight& w) { return layout::padded_rows(w.rows) / kPairRows; }

/// A tile's activations from column `col` on, a multiple of kSpan.
cpu::MatmulTile tile_at(const ActivationData& a, const Tiles& tiles, std::int64_t tile, int group,
                        std::int64_t col = 0) {
    const std::int64_t begin = tiles.begin(tile), size = tiles.size(tile), padded = ActivationData::padded(a.cols);
    const std::int32_t* sums = group == 32 ? a.sums32.get() : a.sums64.get();
    cpu::MatmulTile t{};
    t.values = a.values.get() + begin * padded + col * size;
    t.sums = sums + begin * padded / (group == 32 ? 32 : 64) + col / (group == 32 ? 32 : 64) * size;
    t.whole64 = a.whole64.get() + begin * padded / 64 + col / 64 * size;
    t.scales = a.scales.get() + begin * ActivationData::spans(a.cols) + col / kSpan * size;
    return t;
}

const std::uint8_t* pair_data(const Weight& w, std::int64_t pair) {
    return w.data + pair * 2 * layout::panel_bytes(*w.scheme, w.cols);
}

/// Where after this tile's activations those of the next call lie: of the next tile, or of the first at the next cut.
std::int64_t values_ahead(const ActivationData& a, const Tiles& tiles, std::int64_t tile, std::int64_t first,
                          std::int64_t last, std::int64_t col, std::int64_t next_col, const std::int8_t* values) {
    const std::int64_t after = tile + 1 < last ? tile + 1 : first;
    const std::int64_t ahead_col = tile + 1 < last ? col : next_col;
    return a.values.get() + tiles.begin(after) * ActivationData::padded(a.cols) + ahead_col * tiles.size(after) -
           values;
}

constexpr layout::Scheme as_scheme(const cpu::WeightShape& shape) {
    return {"", shape.bits, shape.group, shape.asymmetric};
}

constexpr bool expansions_exist() {
    for (std::size_t i = 0; i < kRoads.size(); ++i) {
        if (!kRoads[i].expanded) continue;
        const int bits = layout::kSchemes[i].bits;
        if (bits != 2 && bits != 3 && bits != 5 && bits != 6) return false;
        if (layout::superblock_bytes(as_scheme(cpu::kShapes[kRoads[i].shape]), kSpan) > kExpandedBytes) return false;
    }
    return true;
}
static_assert(expansions_exist());

/// Superblocks of a matrix in the 8-bit shape that its scheme is expanded to. All divisions are done once.
class Expansion {
 public:
    Expansion(const Weight& w, const cpu::WeightShape& shape) {
        const layout::Scheme& from = *w.scheme;
        const layout::Scheme to = as_scheme(shape);
        const std::int64_t padded = layout::padded_cols(from, w.cols);
        cols = layout::padded_cols(to, w.cols);
        from_bytes_ = layout::superblock_bytes(from, kSpan);
        to_bytes_ = layout::superblock_bytes(to, kSpan);
        full_ = superblock(from, to, kSpan, kSpan);
        // Of a last group of 128 the activations may have the first half only.
        if (cols % kSpan) last_ = superblock(from, to, padded % kSpan ? padded % kSpan : kSpan, cols % kSpan);
    }

    /// Columns col .. col + count, whole superblocks, of a panel.
    void run(const std::uint8_t* panel, std::int64_t col, std::int64_t count, std::uint8_t* out) const {
        const cpu::Kernels& kernels = cpu::kernels();
        panel += col / kSpan * from_bytes_;
        for (; count > 0; count -= kSpan, panel += from_bytes_, out += to_bytes_) {
            cpu::ExpandSuperblock s = count >= kSpan ? full_ : last_;
            s.from = panel;
            s.to = out;
            kernels.expand(s);
        }
    }
    /// Bytes of `count` columns, where none or the last superblock is short.
    std::int64_t bytes(std::int64_t count) const { return (count + kSpan - 1) / kSpan * to_bytes_; }

    std::int64_t cols;

 private:
    static cpu::ExpandSuperblock superblock(const layout::Scheme& from, const layout::Scheme& to,
                                            std::int64_t from_span, std::int64_t to_span) {
        cpu::ExpandSuperblock s{};
        s.bits = from.bits;
        s.offset = 128 - from.zero();
        s.blocks = static_cast<int>(to_span / layout::kBlock);
        s.from_header = static_cast<int>(layout::header_bytes(from, from_span));
        s.to_header = static_cast<int>(layout::header_bytes(to, to_span));
        s.from_groups = static_cast<int>(from_span / from.group);
        s.to_groups = static_cast<int>(to_span / to.group);
        s.repeat = from.group / to.group;
        s.ahead = cpu::stream_ahead(1);
        s.asymmetric = from.asymmetric;
        return s;
    }

    std::int64_t from_bytes_, to_bytes_;
    cpu::ExpandSuperblock full_, last_{};
};

/// One tile of all tokens, one superblock after the other: longer pieces, or two panels in turn, read memory slower.
void stream_expanded(const ActivationData& a, const Tiles& tiles, const Expansion& expansion, int index,
                     const std::uint8_t* panel, float* c) {
    alignas(64) std::uint8_t expanded[kExpandedBytes];
    const cpu::Kernels& kernels = cpu::kernels();
    const int group = cpu::kShapes[index].group, groups = static_cast<int>(kSpan) / group;
    cpu::MatmulTile t = tile_at(a, tiles, 0, group);
    t.weights = expanded;
    t.c = c;
    for (std::int64_t col = 0; col < expansion.cols; col += kSpan) {
        t.cols = std::min<std::int64_t>(kSpan, expansion.cols - col);
        expansion.run(panel, col, t.cols, expanded);
        kernels.stream_panel[index][a.m - 1](t);
        t.values += kSpan * a.m;
        t.sums += groups * a.m;
        t.whole64 += kSpan / 64 * a.m;
        t.scales += a.m;
    }
}

/// multiply_pair for a scheme that is expanded; c is zero.
void multiply_expanded(const ActivationData& a, const Tiles& tiles, const Weight& w, std::int64_t pair,
                       std::int64_t first, std::int64_t last, float* c) {
    const int index = road_of(w).shape;
    const Expansion expansion(w, cpu::kShapes[index]);
    const std::uint8_t* weights = pair_data(w, pair);
    const std::int64_t panel = layout::panel_bytes(*w.scheme, w.cols), step = kExpandedSupers * kSpan;
    if (tiles.count == 1) {
        stream_expanded(a, tiles, expansion, index, weights, c);
        stream_expanded(a, tiles, expansion, index, weights + panel, c + cpu::kLanes);
        return;
    }
    alignas(64) std::uint8_t expanded[2 * kExpandedSupers * kExpandedBytes];
    for (std::int64_t col = 0; col < expansion.cols; col += step) {
        const std::int64_t count = std::min(step, expansion.cols - col), bytes = expansion.bytes(count);
        expansion.run(weights, col, count, expanded);
        expansion.run(weights + panel, col, count, expanded + bytes);
        for (std::int64_t tile = first; tile < last; ++tile) {
            cpu::MatmulTile t = tile_at(a, tiles, tile, cpu::kShapes[index].group, col);
            t.weights = expanded;
            t.panel_bytes = bytes;
            t.cols = count;
            t.c = c + (tiles.begin(tile) - tiles.begin(first)) * kPairRows;
            t.ask_begin = t.ask_end = 1;  // for no weights: they are here
            t.values_ahead =
                values_ahead(a, tiles, tile, first, last, col, col + step < expansion.cols ? col + step : 0, t.values);
            cpu::kernels().pair[index][tiles.size(tile) - 1](t);
        }
    }
}

/// c [tokens of tiles first .. last][32] = the pair's rows times these tokens. `next` is the pair that follows.
void multiply_pair(const ActivationData& a, const Tiles& tiles, const Weight& w, std::int64_t pair, std::int64_t first,
                   std::int64_t last, const std::uint8_t* next, float* c) {
    const layout::Scheme& scheme = *w.scheme;
    const Road road = road_of(w);
    const cpu::Kernels& kernels = cpu::kernels();
    const std::int64_t panel = layout::panel_bytes(scheme, w.cols), origin = tiles.begin(first);
    const std::int64_t superblock = layout::superblock_bytes(scheme, kSpan);
    // Of a group of 128 the activations may have the first half only.
    const std::int64_t group = std::min(scheme.group, 64), cols = layout::round_up(w.cols, group);
    const std::uint8_t* weights = pair_data(w, pair);
    const std::int64_t tokens = tiles.begin(last - 1) + tiles.size(last - 1) - origin;
    std::memset(c, 0, static_cast<std::size_t>(tokens * kPairRows) * sizeof(float));
    if (road.expanded) {
        multiply_expanded(a, tiles, w, pair, first, last, c);
        return;
    }
    if (tiles.count == 1) {
        cpu::MatmulTile t = tile_at(a, tiles, 0, scheme.group);
        t.cols = cols;
        t.weights_ahead = cpu::stream_ahead(tokens);
        for (int i = 0; i < 2; ++i) {
            t.weights = weights + i * panel;
            t.c = c + i * cpu::kLanes;
            kernels.stream_panel[road.shape][tokens - 1](t);
        }
        return;
    }
    const std::int64_t step = std::max<std::int64_t>(1, kChunkBytes / (2 * superblock)) * kSpan;
    const std::int64_t lines = layout::block_bytes(scheme) * group / layout::kBlock / layout::kLineBytes;
    for (std::int64_t col = 0; col < cols; col += step) {
        const std::uint8_t* now = weights + col / kSpan * superblock;
        const std::uint8_t* then = col + step < cols ? now + step / kSpan * superblock : next;
        for (std::int64_t tile = first; tile < last; ++tile) {
            const std::int64_t size = tiles.size(tile), turn = tile - first;
            cpu::MatmulTile t = tile_at(a, tiles, tile, scheme.group, col);
            t.weights = now;
            t.weights_ahead = then - now;
            t.ask_begin = static_cast<int>(lines * turn / (last - first));
            t.ask_end = static_cast<int>(lines * (turn + 1) / (last - first));
            t.panel_bytes = panel;
            t.cols = std::min(step, cols - col);
            t.c = c + (tiles.begin(tile) - origin) * kPairRows;
            t.values_ahead =
                values_ahead(a, tiles, tile, first, last, col, col + step < cols ? col + step : 0, t.values);
            kernels.pair[road.shape][size - 1](t);
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
    const auto finish = [&](std::int64_t pair, std::int64_t first, std::int64_t last, const float* gate_sums,
                            const float* up_sums) {
        for_rows(tiles, gate, pair, first, last, gate_sums,
                 [&](std::int64_t token, std::int64_t row, const float* sums, std::int64_t rows) {
                     alignas(64) float g[kPairRows], u[kPairRows], product[kPairRows];
                     std::memcpy(g, sums, sizeof g);
                     std::memcpy(u, up_sums, sizeof u);
                     up_sums += kPairRows;
                     for (std::int64_t r = 0; gate_bias && r < rows; ++r) g[r] += gate_bias[row + r];
                     for (std::int64_t r = 0; up_bias && r < rows; ++r) u[r] += up_bias[row + r];
                     cpu::kernels().swiglu(g, u, product, kPairRows);
                     std::memcpy(h + token * gate.rows + row, product, static_cast<std::size_t>(rows) * sizeof(float));
                 });
        // Who finishes the last rows of a span of h quantizes it, for the block's tokens.
        const std::int64_t span = pair * kPairRows / kSpan, span_pairs = kSpan / kPairRows;
        const std::int64_t parts = std::min(span_pairs, pairs_of(gate) - span * span_pairs);
        if (!writer || !last_part(done[first * spans + span], parts)) return;
        const std::int64_t end = tiles.begin(last - 1) + tiles.size(last - 1);
        for (std::int64_t token = tiles.begin(first); token < end; ++token)
            writer->write(h, nullptr, 1.0f, token, span, span + 1);
    };
    if (tiles.count == 1) {  // every change from one matrix to the other stops a stream: some pairs of each in turn
        team.parallel_for(pairs_of(gate), kStreamPairs, [&](std::int64_t begin, std::int64_t end) {
            constexpr std::int64_t kSums = cpu::kStreamTokens * kPairRows;
            alignas(64) std::array<float, kStreamPairs * kSums> c, d;
            for (std::int64_t i = begin; i < end; ++i)
                multiply_pair(a, tiles, gate, i, 0, 1, nullptr, c.data() + (i - begin) * kSums);
            for (std::int64_t i = begin; i < end; ++i)
                multiply_pair(a, tiles, up, i, 0, 1, nullptr, d.data() + (i - begin) * kSums);
            for (std::int64_t i = begin; i < end; ++i)
                finish(i, 0, 1, c.data() + (i - begin) * kSums, d.data() + (i - begin) * kSums);
        });
        return;
    }
    for_pairs(team, a, tiles, pairs_of(gate), 2 * layout::panel_bytes(*gate.scheme, gate.cols),
              [&](std::int64_t pair, std::int64_t first, std::int64_t last) {
                  alignas(64) Sums c, d;
                  multiply_pair(a, tiles, gate, pair, first, last, pair_data(up, pair), c.data());
                  multiply_pair(a, tiles, up, pair, first, last, pair_data(gate, pair + 1), d.data());
                  finish(pair, first, last, c.data(), d.data());
              });
}

}  // namespace cnl::ops
