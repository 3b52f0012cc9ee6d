// SPDX-License-Identifier: Apache-2.0
// Causal attention: which queries and chunks of keys make a task, and the merging of chunks in order.
//
// Query heads that share a kv head, and neighbouring tokens of a sequence, form a tile, so that every key and value is
// read and converted once for all of them. With enough tiles a task is a tile: it walks through its chunks and merges
// as it goes. With few (decode, few heads) a task is one chunk of a tile; the partial results go to the team's scratch
// memory and are merged after a barrier. Chunks begin at multiples of 256 positions and are merged in order either
// way, hence the same bits.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../ops.hpp"
#include "activations.hpp"
#include "cpu_info.hpp"
#include "kv_shape.hpp"

namespace cnl::ops {
namespace {

using cpu::kChunkKeys, cpu::kPageKeys;

constexpr int kTileQueries = 32;
constexpr std::int64_t kTasksPerThread = 4;  // below that, chunks are handed out one by one

struct Problem {
    const float* q;
    int heads, group;  // group: query heads of a kv head
    std::span<const SequenceRows> sequences;
    const KvCache& cache;
    int layer;
    float* out;
    cpu::KvShape shape;
    int tile_tokens;

    std::int64_t tiles_of(const SequenceRows& s) const { return (s.count + tile_tokens - 1) / tile_tokens; }
    int tile_queries() const { return tile_tokens * group; }
};

/// Consecutive tokens of one sequence, for one kv head. Query t * group + g is token t, head g of the group.
struct Tile {
    const SequenceRows* sequence;
    std::int64_t token;
    int tokens, kv_head;

    std::int64_t position(int t) const { return sequence->start + token + t; }
    std::int64_t chunks() const { return position(tokens - 1) / kChunkKeys + 1; }
};

Tile tile_at(const Problem& p, std::int64_t index) {
    Tile tile{};
    const int kv_heads = p.cache.layout().kv_heads;
    tile.kv_head = static_cast<int>(index % kv_heads);
    index /= kv_heads;
    tile.sequence = p.sequences.data();
    while (index >= p.tiles_of(*tile.sequence)) index -= p.tiles_of(*tile.sequence++);
    tile.token = index * p.tile_tokens;
    tile.tokens = static_cast<int>(std::min<std::int64_t>(p.tile_tokens, tile.sequence->count - tile.token));
    return tile;
}

const float* query_row(const Problem& p, const Tile& tile, int t, int g) {
    const std::int64_t row = tile.sequence->row + tile.token + t;
    return p.q + (row * p.heads + tile.kv_head * p.group + g) * p.shape.head_dim;
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
    const float scale = 1.0f / std::sqrt(static_cast<float>(p.shape.head_dim));
    for (int t = 0; t < tile.tokens; ++t)
        for (int g = 0; g < p.group; ++g, q += p.shape.padded_dim) {
            const float* source = query_row(p, tile, t, g);
            for (int j = 0; j < p.shape.head_dim; ++j) q[j] = source[j] * scale;
        }
}

/// First token of the tile that sees this chunk, or tile.tokens.
int first_token(const Tile& tile, std::int64_t chunk) {
    return static_cast<int>(std::clamp<std::int64_t>(chunk * kChunkKeys - tile.position(0), 0, tile.tokens));
}

/// One chunk for the tile's tokens from `first` on; results in the given arrays, query 0 being that of token `first`.
void attend_chunk(const Problem& p, const Tile& tile, std::int64_t chunk, int first, const Workspace& w, float* acc,
                  float* max, float* sum) {
    cpu::AttentionChunk c{};
    c.shape = p.shape;
    const std::int64_t start = chunk * kChunkKeys, last = tile.position(tile.tokens - 1);
    for (int i = 0; i < kChunkKeys / kPageKeys && start + i * kPageKeys <= last; ++i) {
        const std::int32_t page = tile.sequence->pages[start / kPageKeys + i];
        c.slabs[i] = p.cache.slab(page, p.layer, tile.kv_head);
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

void write_query(const Problem& p, const Tile& tile, int query, const float* acc, float sum) {
    const std::int64_t row = tile.sequence->row + tile.token + query / p.group;
    float* out = p.out + (row * p.heads + tile.kv_head * p.group + query % p.group) * p.shape.head_dim;
    cpu::kernels().attention_finish(acc, sum, p.shape.head_dim, out);
}

void attend_tile(const Problem& p, const Tile& tile, const Workspace& w) {
    const int queries = tile.tokens * p.group, d = p.shape.padded_dim;
    load_queries(p, tile, w.q);
    attend_chunk(p, tile, 0, 0, w, w.total_acc, w.total_max, w.total_sum);
    for (std::int64_t chunk = 1; chunk < tile.chunks(); ++chunk) {
        const int first = first_token(tile, chunk), skipped = first * p.group;
        attend_chunk(p, tile, chunk, first, w, w.acc, w.max, w.sum);
        for (int i = skipped; i < queries; ++i) {
            const int j = i - skipped;
            cpu::kernels().attention_merge(w.total_max + i, w.total_sum + i, w.total_acc + std::int64_t(i) * d,
                                           w.max[j], w.sum[j], w.acc + std::int64_t(j) * d, d);
        }
    }
    for (int i = 0; i < queries; ++i) write_query(p, tile, i, w.total_acc + std::int64_t(i) * d, w.total_sum[i]);
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

/// Task `task` of all (tile, chunk) pairs in order: the tile, its first task and the chunk.
struct ChunkTask {
    Tile tile;
    std::int64_t chunk;
};
ChunkTask chunk_task(const Problem& p, std::int64_t tiles, std::int64_t task) {
    for (std::int64_t i = 0; i < tiles; ++i) {
        const Tile tile = tile_at(p, i);
        if (task < tile.chunks()) return {tile, task};
        task -= tile.chunks();
    }
    return {};
}

void merge_tile(const Problem& p, const Tile& tile, std::int64_t first_task, const Partials& partials) {
    const int queries = tile.tokens * p.group;
    const std::int64_t d = p.shape.padded_dim;
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
    for (int i = 0; i < queries; ++i) write_query(p, tile, i, acc + i * d, sum[i]);
}

void attend_by_chunks(Team& team, const Problem& p, std::int64_t tiles, std::int64_t tasks, std::byte* scratch,
                      const Workspace& w) {
    const Partials partials{reinterpret_cast<float*>(scratch), p.tile_queries(), p.shape.padded_dim};
    team.parallel_for(tasks, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t task = begin; task < end; ++task) {
            const auto [tile, chunk] = chunk_task(p, tiles, task);
            load_queries(p, tile, w.q);
            attend_chunk(p, tile, chunk, first_token(tile, chunk), w, partials.acc(task), partials.max(task),
                         partials.sum(task));
        }
    });
    team.parallel_for(tiles, 1, [&](std::int64_t begin, std::int64_t end) {
        std::int64_t first_task = 0;
        for (std::int64_t i = 0; i < begin; ++i) first_task += tile_at(p, i).chunks();
        for (std::int64_t i = begin; i < end; ++i) {
            const Tile tile = tile_at(p, i);
            merge_tile(p, tile, first_task, partials);
            first_task += tile.chunks();
        }
    });
}

}  // namespace

void attention(Team& team, const float* q, int heads, std::span<const SequenceRows> sequences, const KvCache& cache,
               int layer, float* out) {
    const KvLayout& layout = cache.layout();
    const int group = heads / layout.kv_heads;
    const Problem p{q, heads, group, sequences, cache, layer, out, kv_shape(layout), std::max(1, kTileQueries / group)};
    std::int64_t tiles = 0, tasks = 0;
    for (const SequenceRows& s : sequences) tiles += p.tiles_of(s) * layout.kv_heads;
    const bool by_chunks = tiles < kTasksPerThread * team.size();
    if (by_chunks)
        for (std::int64_t i = 0; i < tiles; ++i) tasks += tile_at(p, i).chunks();

    const std::int64_t own = layout::round_up(Workspace::floats(p), 16);
    const std::int64_t shared = layout::round_up(tasks * Partials::floats(p), 16);
    std::byte* scratch = team.scratch(static_cast<std::size_t>(own * team.size() + shared) * sizeof(float));
    float* floats = reinterpret_cast<float*>(scratch);
    const Workspace w(p, floats + shared + own * team.index());
    if (by_chunks && tasks > tiles) {
        attend_by_chunks(team, p, tiles, tasks, scratch, w);
        return;
    }
    team.parallel_for(tiles, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) attend_tile(p, tile_at(p, i), w);
    });
}

}  // namespace cnl::ops
