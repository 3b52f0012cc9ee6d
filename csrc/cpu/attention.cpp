// SPDX-License-Identifier: Apache-2.0
// Causal attention: which queries and chunks of keys make a task, and the merging of chunks in order.
//
// Query heads that share a kv head, and neighbouring tokens of a sequence, form a tile, so that every key and value is
// read and converted once for all of them. With many tiles a task is a tile: it walks through its chunks and merges as
// it goes. With few (decode) a task is one chunk of a tile; who finishes the last chunk of a tile merges all of them.
// Chunks begin at multiples of 256 positions and are merged in order either way, hence the same bits. Likewise whoever
// finishes the last head of 256 columns quantizes them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

#include "../ops.hpp"
#include "activations.hpp"
#include "cpu_info.hpp"
#include "kv_shape.hpp"

namespace cnl::ops {
namespace {

using cpu::kChunkKeys, cpu::kPageKeys, cpu::kSpan;

constexpr int kTileQueries = 32;
constexpr std::int64_t kQueriesPerThread = 256;  // with fewer in all tiles, chunks are handed out one by one

using Counter = std::atomic<std::uint32_t>;

struct Problem {
    float* q;
    int heads, group;      // group: query heads of a kv head
    const NewKeys* fresh;  // what tasks rotate and append themselves; null: all that is done
    std::span<const SequenceRows> sequences;
    const KvCache& cache;
    int layer;
    float* attended;
    const SpanWriter* out;  // or null
    cpu::KvShape shape;
    int tile_tokens;

    std::int64_t tiles_of(const SequenceRows& s) const { return (s.count + tile_tokens - 1) / tile_tokens; }
    int tile_queries() const { return tile_tokens * group; }
    int kv_heads() const { return heads / group; }
    std::int64_t q_size() const { return std::int64_t(heads) * shape.head_dim; }
};

/// Consecutive tokens of one sequence, for one kv head. Query t * group + g is token t, head g of the group.
struct Tile {
    const SequenceRows* sequence;
    std::int64_t token, token_tile;  // token_tile counts over all sequences
    int tokens, kv_head;

    std::int64_t position(int t) const { return sequence->start + token + t; }
    std::int64_t chunks() const { return position(tokens - 1) / kChunkKeys + 1; }
    std::int64_t row(int t) const { return sequence->row + token + t; }
};

Tile tile_at(const Problem& p, std::int64_t index) {
    Tile tile{};
    tile.kv_head = static_cast<int>(index % p.kv_heads());
    index /= p.kv_heads();
    tile.token_tile = index;
    tile.sequence = p.sequences.data();
    while (index >= p.tiles_of(*tile.sequence)) index -= p.tiles_of(*tile.sequence++);
    tile.token = index * p.tile_tokens;
    tile.tokens = static_cast<int>(std::min<std::int64_t>(p.tile_tokens, tile.sequence->count - tile.token));
    return tile;
}

/// What one thread works in; grown when a larger model comes.
struct Workspace {
    float *q, *scores, *acc, *max, *sum, *total_acc, *total_max, *total_sum;
    std::int32_t* keys;

    static std::int64_t floats(const Problem& p) {
        return static_cast<std::int64_t>(p.tile_queries()) * (3 * p.shape.padded_dim + kChunkKeys + 5);
    }
    Workspace(const Problem& p, float* memory) {
        const std::int64_t n = p.tile_queries(), d = p.shape.padded_dim;
        q = memory;
        acc = q + n * d;
        total_acc = acc + n * d;
        scores = total_acc + n * d;
        max = scores + n * kChunkKeys;
        sum = max + n;
        total_max = sum + n;
        total_sum = total_max + n;
        keys = reinterpret_cast<std::int32_t*>(total_sum + n);
    }
};

void load_queries(const Problem& p, const Tile& tile, float* q) {
    const int d = p.shape.head_dim;
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    for (int t = 0; t < tile.tokens; ++t) {
        const std::int64_t row = tile.row(t);
        for (int g = 0; g < p.group; ++g, q += p.shape.padded_dim) {
            std::memcpy(q, p.q + (row * p.heads + tile.kv_head * p.group + g) * d, sizeof(float) * std::size_t(d));
            if (p.fresh) cpu::kernels().rope(q, p.fresh->cos + row * (d / 2), p.fresh->sin + row * (d / 2), d / 2);
            for (int j = 0; j < d; ++j) q[j] *= scale;
        }
    }
}

/// Rotates and stores the tile's new keys whose positions lie in `chunk`.
void append(const Problem& p, const Tile& tile, std::int64_t chunk) {
    const int d = p.shape.head_dim;
    for (int t = 0; t < tile.tokens; ++t) {
        const std::int64_t position = tile.position(t), row = tile.row(t);
        if (position / kChunkKeys != chunk) continue;
        float* key = p.fresh->k + (row * p.kv_heads() + tile.kv_head) * d;
        cpu::kernels().rope(key, p.fresh->cos + row * (d / 2), p.fresh->sin + row * (d / 2), d / 2);
        std::uint8_t* slab = p.cache.slab(tile.sequence->pages[position / kPageKeys], p.layer, tile.kv_head);
        cpu::kernels().kv_store(p.shape, slab, static_cast<int>(position % kPageKeys), key,
                                p.fresh->v + (row * p.kv_heads() + tile.kv_head) * d);
    }
}

/// First token of the tile that sees this chunk, or tile.tokens.
int first_token(const Tile& tile, std::int64_t chunk) {
    return static_cast<int>(std::clamp<std::int64_t>(chunk * kChunkKeys - tile.position(0), 0, tile.tokens));
}

/// A chunk of a tile and its number among all; chunk 0 of the first tile in turn is task 0.
struct Task {
    Tile tile;
    std::int64_t chunk, first_of_tile;
};

Task chunk_task(const Problem& p, std::int64_t task) {
    Tile tile = tile_at(p, 0);
    for (std::int64_t passed = 0;;) {
        const std::int64_t chunks = tile.chunks(), all = chunks * p.kv_heads(), i = task - passed;
        if (i < all) {
            tile.kv_head = static_cast<int>(i / chunks);
            return {tile, i % chunks, task - i % chunks};
        }
        passed += all;
        tile = tile_at(p, (tile.token_tile + 1) * p.kv_heads());
    }
}

/// One chunk for the tile's tokens from `first` on; results in the given arrays, query 0 being that of token `first`.
/// (next, next_chunk) is what this thread will probably read after that; null where nothing is.
void attend_chunk(const Problem& p, const Tile& tile, std::int64_t chunk, int first, const Tile* next,
                  std::int64_t next_chunk, const Workspace& w, float* acc, float* max, float* sum) {
    cpu::AttentionChunk c{};
    c.shape = p.shape;
    const std::int64_t start = chunk * kChunkKeys, last = tile.position(tile.tokens - 1);
    for (int i = 0; i < kChunkKeys / kPageKeys && start + i * kPageKeys <= last; ++i) {
        const std::int32_t page = tile.sequence->pages[start / kPageKeys + i];
        c.slabs[i] = p.cache.slab(page, p.layer, tile.kv_head);
    }
    if (next) {
        const std::int64_t begin = next_chunk * kChunkKeys, end = next->position(next->tokens - 1) + 1;
        c.next = p.cache.slab(next->sequence->pages[begin / kPageKeys], p.layer, next->kv_head);
        c.next_bytes = layout::round_up(std::min<std::int64_t>(end - begin, kPageKeys), cpu::kLanes) *
                       p.shape.padded_dim * (p.shape.int8 ? 1 : 2);
    }
    c.queries = (tile.tokens - first) * p.group;
    c.q = w.q + static_cast<std::int64_t>(first) * p.group * p.shape.padded_dim;
    for (int t = first, i = 0; t < tile.tokens; ++t)
        for (int g = 0; g < p.group; ++g, ++i)
            w.keys[i] = static_cast<std::int32_t>(std::min<std::int64_t>(kChunkKeys, tile.position(t) + 1 - start));
    c.keys = w.keys;
    c.scores = w.scores;
    c.acc = acc;
    c.max = max;
    c.sum = sum;
    cpu::kernels().attention_chunk(c);
}

/// The tile's queries from their finished sums; the columns whose last head this was are quantized.
void finish_tile(const Problem& p, const Tile& tile, const float* acc, const float* sum, Counter* done) {
    const std::int64_t width = std::int64_t(p.group) * p.shape.head_dim, begin = tile.kv_head * width;
    float* attended = p.attended + begin;
    for (int t = 0, i = 0; t < tile.tokens; ++t)
        for (int g = 0; g < p.group; ++g, ++i)
            cpu::kernels().attention_finish(acc + std::int64_t(i) * p.shape.padded_dim, sum[i], p.shape.head_dim,
                                            attended + tile.row(t) * p.q_size() + g * p.shape.head_dim);
    if (!p.out) return;
    for (std::int64_t span = begin / kSpan; span * kSpan < begin + width; ++span) {
        const std::int64_t stop = std::min<std::int64_t>((span + 1) * kSpan, p.out->cols);
        const std::int64_t kv_heads = (stop - 1) / width - span * kSpan / width + 1;
        if (!last_part(done[tile.token_tile * p.out->spans + span], kv_heads)) continue;
        for (int t = 0; t < tile.tokens; ++t) p.out->write(p.attended, nullptr, 1.0f, tile.row(t), span, span + 1);
    }
}

void attend_tile(const Problem& p, const Tile& tile, const Tile* next, const Workspace& w, Counter* done) {
    const int queries = tile.tokens * p.group, d = p.shape.padded_dim;
    const std::int64_t chunks = tile.chunks();
    load_queries(p, tile, w.q);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        if (p.fresh) append(p, tile, chunk);
        const bool last = chunk + 1 == chunks;
        const Tile* then = last ? next : &tile;
        const int first = first_token(tile, chunk), skipped = first * p.group;
        if (chunk == 0) {
            attend_chunk(p, tile, 0, 0, then, last ? 0 : 1, w, w.total_acc, w.total_max, w.total_sum);
            continue;
        }
        attend_chunk(p, tile, chunk, first, then, last ? 0 : chunk + 1, w, w.acc, w.max, w.sum);
        for (int i = skipped; i < queries; ++i) {
            const int j = i - skipped;
            cpu::kernels().attention_merge(w.total_max + i, w.total_sum + i, w.total_acc + std::int64_t(i) * d,
                                           w.max[j], w.sum[j], w.acc + std::int64_t(j) * d, d);
        }
    }
    finish_tile(p, tile, w.total_acc, w.total_sum, done);
}

/// Partial results of the tasks (tile, chunk): [task][tile queries] of acc [d], max, sum.
struct Partials {
    float* memory;
    std::int64_t queries, d;
    static std::int64_t floats(const Problem& p) {
        return static_cast<std::int64_t>(p.tile_queries()) * (p.shape.padded_dim + 2);
    }
    float* acc(std::int64_t task) const { return memory + task * queries * (d + 2); }
    float* max(std::int64_t task) const { return acc(task) + queries * d; }
    float* sum(std::int64_t task) const { return max(task) + queries; }
};

void merge_tile(const Problem& p, const Task& last, const Partials& partials, Counter* done) {
    const Tile& tile = last.tile;
    const int queries = tile.tokens * p.group;
    const std::int64_t d = p.shape.padded_dim, first_task = last.first_of_tile;
    float *acc = partials.acc(first_task), *max = partials.max(first_task), *sum = partials.sum(first_task);
    for (std::int64_t chunk = 1; chunk < tile.chunks(); ++chunk) {
        const int skipped = first_token(tile, chunk) * p.group;
        const std::int64_t task = first_task + chunk;
        for (int i = skipped; i < queries; ++i) {
            const int j = i - skipped;
            cpu::kernels().attention_merge(max + i, sum + i, acc + i * d, partials.max(task)[j], partials.sum(task)[j],
                                           partials.acc(task) + j * d, p.shape.padded_dim);
        }
    }
    finish_tile(p, tile, acc, sum, done);
}

void attend_by_chunks(Team& team, const Problem& p, std::int64_t tasks, const Partials& partials, const Workspace& w,
                      Counter* merged, Counter* done) {
    team.parallel_for(tasks, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const Task task = chunk_task(p, i);
            const Task next = i + 1 < tasks ? chunk_task(p, i + 1) : Task{};
            if (p.fresh) append(p, task.tile, task.chunk);
            load_queries(p, task.tile, w.q);
            attend_chunk(p, task.tile, task.chunk, first_token(task.tile, task.chunk),
                         i + 1 < tasks ? &next.tile : nullptr, next.chunk, w, partials.acc(i), partials.max(i),
                         partials.sum(i));
            const std::int64_t tile = task.tile.token_tile * p.kv_heads() + task.tile.kv_head;
            if (last_part(merged[tile], task.tile.chunks())) merge_tile(p, task, partials, done);
        }
    });
}

void attend_by_tiles(Team& team, const Problem& p, std::int64_t tiles, const Workspace& w, Counter* done) {
    team.parallel_for(tiles, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const Tile next = i + 1 < tiles ? tile_at(p, i + 1) : Tile{};
            attend_tile(p, tile_at(p, i), i + 1 < tiles ? &next : nullptr, w, done);
        }
    });
}

}  // namespace

void attention(Team& team, float* q, int heads, const NewKeys* fresh, std::span<const SequenceRows> sequences,
               const KvCache& cache, int layer, float* attended, Activations* out) {
    const KvLayout& layout = cache.layout();
    const int group = heads / layout.kv_heads;
    std::int64_t rows = 0, most = 0;
    for (const SequenceRows& s : sequences) {
        rows += s.count;
        most = std::max(most, s.count);
    }
    const auto tile_tokens = static_cast<int>(std::min<std::int64_t>(most, std::max(1, kTileQueries / group)));
    if (fresh && most > tile_tokens) {  // a later tile of a sequence reads what an earlier one appends
        rope_append(team, q, fresh->k, fresh->v, fresh->cos, fresh->sin, heads, sequences, cache, layer);
        fresh = nullptr;
    }
    std::optional<SpanWriter> spans;
    if (out) spans.emplace(SpanWriter::shared(team, out->data(), rows, std::int64_t(heads) * layout.head_dim));
    const Problem p{
        q,          heads, group, fresh, sequences, cache, layer, attended, out ? &*spans : nullptr, kv_shape(layout),
        tile_tokens};

    std::int64_t token_tiles = 0, tasks = 0;
    for (const SequenceRows& s : sequences) token_tiles += p.tiles_of(s);
    const std::int64_t tiles = token_tiles * layout.kv_heads;
    if (tiles * p.tile_queries() < kQueriesPerThread * team.size())
        for (std::int64_t i = 0; i < token_tiles; ++i)
            tasks += tile_at(p, i * layout.kv_heads).chunks() * layout.kv_heads;
    const bool by_chunks = tasks > tiles;

    const std::int64_t own = layout::round_up(Workspace::floats(p), 16);
    const std::int64_t shared = by_chunks ? layout::round_up(tasks * Partials::floats(p), 16) : 0;
    std::byte* scratch = team.scratch(static_cast<std::size_t>(own * team.size() + shared) * sizeof(float));
    Counter* merged = team.counters(static_cast<std::size_t>(tiles + token_tiles * (out ? spans->spans : 0)));
    float* floats = reinterpret_cast<float*>(scratch);
    const Workspace w(p, floats + shared + own * team.index());
    if (by_chunks)
        attend_by_chunks(team, p, tasks, {floats, p.tile_queries(), p.shape.padded_dim}, w, merged, merged + tiles);
    else
        attend_by_tiles(team, p, tiles, w, merged + tiles);
}

}  // namespace cnl::ops
