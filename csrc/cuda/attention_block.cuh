// SPDX-License-Identifier: Apache-2.0
// What a block of attention does; attention.cu has the picture.
#pragma once

#include <cmath>

#include "fragments.cuh"

namespace cnl::cuda {

inline constexpr int kAttentionThreads = 256;
inline constexpr int kAttentionWarps = kAttentionThreads / kWarp;
inline constexpr int kPageKeys = KvLayout::kPage;
inline constexpr int kSlice = 128;  // dimensions of V that pass through shared memory together
inline constexpr int kStages = 2;
static_assert(kChunkKeys == kAttentionThreads && kChunkKeys % kPageKeys == 0);

/// Shared memory of a block, in bytes from its start.
struct AttentionPlan {
    int q, scores, total, stages, numbers, bytes;
    CNL_HOST_DEVICE AttentionPlan(int queries, int padded_dim, int element, bool decode) {
        q = 0;
        scores = q + queries * padded_dim * 4;
        total = scores + queries * kChunkKeys * 4;
        stages = total + (decode ? 0 : queries * padded_dim * 4);
        const int slice = padded_dim < kSlice ? padded_dim : kSlice;
        numbers = stages + kStages * kPageKeys * slice * element;
        bytes = numbers + (4 * queries + 4) * 4;
    }
};

template <bool kInt8, int kCount>
__device__ __forceinline__ void read_values(const std::uint8_t* p, float (&v)[kCount]) {
    if constexpr (kInt8) {
        std::uint32_t w;
        if constexpr (kCount == 4) w = *reinterpret_cast<const std::uint32_t*>(p);
        if constexpr (kCount == 2) w = *reinterpret_cast<const std::uint16_t*>(p);
        if constexpr (kCount == 1) w = *p;
        for (int i = 0; i < kCount; ++i) v[i] = static_cast<float>(static_cast<std::int8_t>(w >> 8 * i & 255u));
    } else {
        std::uint32_t w[2] = {0, 0};
        if constexpr (kCount == 4) {
            const uint2 both = *reinterpret_cast<const uint2*>(p);
            w[0] = both.x, w[1] = both.y;
        }
        if constexpr (kCount == 2) w[0] = *reinterpret_cast<const std::uint32_t*>(p);
        if constexpr (kCount == 1) w[0] = *reinterpret_cast<const std::uint16_t*>(p);
        for (int i = 0; i < kCount; ++i) v[i] = half_to_float(static_cast<std::uint16_t>(w[i / 2] >> 16 * (i % 2)));
    }
}

template <bool kInt8, int kQueries>
class AttentionBlock {
 public:
    static constexpr int kElement = kInt8 ? 1 : 2;
    static constexpr int kEach = 16 / kElement;  // elements of a 16-byte piece
    // Threads of a query in the value phase, queries and dimensions of a thread.
    static constexpr int kPerQuery = kQueries >= 8 ? 32 : kQueries == 4 ? 64 : 128;
    static constexpr int kOwnQueries = kQueries == 16 ? 2 : 1;
    static constexpr int kOwnDims = kSlice / kPerQuery;

    __device__ AttentionBlock(const AttentionArgs& args, unsigned char* memory, bool is_decode)
        : a(args), thread(static_cast<int>(threadIdx.x)), d(a.cache.padded_dim), decode(is_decode) {
        const AttentionPlan plan(kQueries, d, kElement, decode);
        q = reinterpret_cast<float*>(memory + plan.q);
        scores = reinterpret_cast<float*>(memory + plan.scores);
        total = reinterpret_cast<float*>(memory + plan.total);
        stages = memory + plan.stages;
        max = reinterpret_cast<float*>(memory + plan.numbers);
        sum = max + kQueries;
        old_weight = sum + kQueries;
        new_weight = old_weight + kQueries;
        flag = reinterpret_cast<int*>(new_weight + kQueries);

        group = a.heads / a.cache.kv_heads;
        pieces = (group + a.piece_heads - 1) / a.piece_heads;
        kv_head = static_cast<int>(blockIdx.x) / pieces;
        piece = static_cast<int>(blockIdx.x) % pieces;
        tile = a.first_tile + static_cast<int>(blockIdx.y);
        const Row& row = a.step.at(tile);
        first_row = row.tile_row;
        tokens = row.tile_count;
        task = row.tile_task;
        position = a.step.at(first_row).position;
        table = a.step.tables + a.step.at(first_row).table;
    }

    __device__ bool empty() const { return position < 0; }
    __device__ int chunks() const { return (position + tokens - 1) / kChunkKeys + 1; }
    __device__ bool is_last(int arrived) const { return arrived + 1 == chunks(); }

    __device__ void load_queries() {
        const float scale = 1.0f / sqrtf(static_cast<float>(a.cache.head_dim));
        for (int i = thread; i < kQueries * d; i += kAttentionThreads) {
            const int query = i / d, j = i % d;
            q[i] = valid(query) && j < a.cache.head_dim ? query_row(a.q, query)[j] * scale : 0.0f;
        }
    }

    /// One chunk: max and sum of every query in shared memory, use(query, dimension, values) for what a thread owns.
    template <typename Use>
    __device__ void attend(int chunk, Use&& use) {
        const int start = chunk * kChunkKeys, seen = position + tokens - start;
        const int limit = seen < kChunkKeys ? seen : kChunkKeys;
        const int pages = (limit + kPageKeys - 1) / kPageKeys, slices = (d + kSlice - 1) / kSlice;
        for (int i = 0; i < kStages; ++i) {
            stage_page(start, limit, pages, i);
            commit_copies();
        }
        score(start, limit);
        __syncthreads();
        for (int query = thread / kWarp; query < kQueries; query += kAttentionWarps) softmax(query, start);
        __syncthreads();
        for (int item = 0, slice = 0; slice < slices; ++slice) {
            float acc[kOwnQueries][kOwnDims] = {};
            for (int page = 0; page < pages; ++page, ++item) {
                wait_copies<kStages - 1>();
                __syncthreads();
                add_page(stages + item % kStages * stage_bytes(), slice, page, start, acc);
                __syncthreads();
                if (item + kStages < pages * slices) stage_page(start, limit, pages, item + kStages);
                commit_copies();
            }
            for (int i = 0; i < kOwnQueries; ++i) {
                const int query = own_query(i), dim = slice * kSlice + own_dim();
                if (query < kQueries && dim < d && keys(query, start) > 0) use(query, dim, acc[i]);
            }
        }
        wait_copies<0>();
        __syncthreads();
    }

    /// Chunk of decode: to the partial results, or out where there is only one. All dimensions are padded ones.
    __device__ void decode_chunk(int chunk) {
        load_queries();
        __syncthreads();
        if (chunks() == 1) {
            attend(chunk,
                   [&](int query, int dim, const float (&acc)[kOwnDims]) { write(query, dim, acc, sum[query]); });
            return;
        }
        float* own = partial(chunk);
        attend(chunk, [&](int query, int dim, const float (&acc)[kOwnDims]) {
            for (int i = 0; i < kOwnDims; ++i) own[query * (d + 2) + dim + i] = acc[i];
        });
        if (thread < kQueries) {
            own[thread * (d + 2) + d] = max[thread];
            own[thread * (d + 2) + d + 1] = sum[thread];
        }
        __syncthreads();
        const std::int64_t counter = static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
        if (thread == 0) *flag = is_last(static_cast<int>(arrive(a.arrivals + counter)));
        __syncthreads();
        if (!*flag) return;
        if (thread == 0) a.arrivals[counter] = 0;
        for (int i = thread; i < kQueries * d; i += kAttentionThreads) merge_chunks(i / d, i % d);
    }

    /// All chunks of a tile of prefill.
    __device__ void walk() {
        load_queries();
        __syncthreads();
        for (int chunk = 0; chunk < chunks(); ++chunk)
            attend(chunk, [&](int query, int dim, const float (&acc)[kOwnDims]) {
                float* so_far = total + query * d + dim;
                for (int i = 0; i < kOwnDims; ++i)
                    so_far[i] = chunk == 0 ? acc[i] : fmaf(so_far[i], old_weight[query], acc[i] * new_weight[query]);
            });
        for (int slice = 0; slice * kSlice < d; ++slice)
            for (int i = 0; i < kOwnQueries; ++i) {
                const int query = own_query(i), dim = slice * kSlice + own_dim();
                if (query >= kQueries || dim >= d) continue;
                float acc[kOwnDims];
                for (int j = 0; j < kOwnDims; ++j) acc[j] = total[query * d + dim + j];
                write(query, dim, acc, sum[query]);
            }
    }

 private:
    __device__ int token(int query) const { return query / a.piece_heads; }
    __device__ int head(int query) const { return piece * a.piece_heads + query % a.piece_heads; }
    __device__ bool valid(int query) const { return token(query) < tokens && head(query) < group; }
    /// How many keys of the chunk a query sees, 0 or less if none.
    __device__ int keys(int query, int start) const {
        if (!valid(query)) return 0;
        const int seen = position + token(query) + 1 - start;
        return seen < kChunkKeys ? seen : kChunkKeys;
    }
    template <typename T>
    __device__ T* query_row(T* base, int query) const {
        const std::int64_t row = first_row + token(query);
        return base + (row * a.heads + kv_head * group + head(query)) * a.cache.head_dim;
    }
    __device__ const std::uint8_t* slab(int key_position) const {
        return a.cache.base + table[key_position / kPageKeys] * a.cache.page_stride + kv_head * a.cache.slab_stride;
    }
    __device__ int own_query(int i) const { return thread / kPerQuery * kOwnQueries + i; }
    __device__ int own_dim() const { return thread % kPerQuery * kOwnDims; }
    __device__ int stage_bytes() const { return kPageKeys * (d < kSlice ? d : kSlice) * kElement; }

    __device__ void stage_page(int start, int limit, int pages, int item) {
        const int page = item % pages, first = item / pages * kSlice, width = d - first < kSlice ? d - first : kSlice;
        if (width <= 0) return;
        const int rows = limit - page * kPageKeys < kPageKeys ? limit - page * kPageKeys : kPageKeys;
        const std::uint8_t* from = slab(start + page * kPageKeys) + a.cache.v_offset + first * kElement;
        unsigned char* to = stages + item % kStages * stage_bytes();
        const int pieces_of_row = width * kElement / 16;
        for (int i = thread; i < rows * pieces_of_row; i += kAttentionThreads) {
            const int row = i / pieces_of_row, at = i % pieces_of_row * 16;
            copy_async(to + row * width * kElement + at, from + static_cast<std::int64_t>(row) * d * kElement + at);
        }
    }

    __device__ void score(int start, int limit) {
        if (thread >= limit) return;
        const std::uint8_t* page = slab(start + thread);
        const std::uint8_t* key = page + thread % kPageKeys * 16;
        float s[kQueries] = {};
#pragma unroll 4
        for (int j = 0; j < d; j += kEach) {
            const uint4 piece_of_key =
                *reinterpret_cast<const uint4*>(key + static_cast<std::int64_t>(j / kEach) * kPageKeys * 16);
            const std::uint32_t words[4] = {piece_of_key.x, piece_of_key.y, piece_of_key.z, piece_of_key.w};
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                constexpr int kWord = kEach / 4;  // elements of a word
                float k[kWord];
                for (int i = 0; i < kWord; ++i)
                    k[i] = kInt8 ? static_cast<float>(static_cast<std::int8_t>(words[w] >> 8 * i & 255u))
                                 : half_to_float(static_cast<std::uint16_t>(words[w] >> 16 * (i % 2)));
#pragma unroll
                for (int r = 0; r < kQueries; ++r)
#pragma unroll
                    for (int i = 0; i < kWord; ++i) s[r] = fmaf(k[i], q[r * d + j + w * kWord + i], s[r]);
            }
        }
        const float scale = kInt8 ? half_to_float(reinterpret_cast<const std::uint16_t*>(
                                        page + a.cache.k_scale_offset)[thread % kPageKeys])
                                  : 1.0f;
#pragma unroll
        for (int r = 0; r < kQueries; ++r) scores[r * kChunkKeys + thread] = kInt8 ? s[r] * scale : s[r];
    }

    __device__ void softmax(int query, int start) {
        const int lane = thread % kWarp, count = keys(query, start);
        if (count <= 0) return;
        float* p = scores + query * kChunkKeys;
        float largest = -INFINITY;
        for (int i = lane; i < count; i += kWarp) largest = largest > p[i] ? largest : p[i];
        for (int mask = 16; mask > 0; mask /= 2) {
            const float other = shuffle_xor(largest, mask);
            largest = largest > other ? largest : other;
        }
        for (int i = lane; i < kChunkKeys; i += kWarp) p[i] = i < count ? exp_f32(p[i] - largest) : 0.0f;
        sync_warp();
        float s = 0.0f;
        for (int i = lane % 16; i < count; i += 16) s = s + p[i];
        for (int mask = 8; mask > 0; mask /= 2) s = s + shuffle_xor(s, mask);
        sync_warp();
        if constexpr (kInt8)
            for (int i = lane; i < count; i += kWarp)
                p[i] = p[i] * half_to_float(reinterpret_cast<const std::uint16_t*>(
                                  slab(start + i) + a.cache.v_scale_offset)[i % kPageKeys]);
        if (lane == 0) merge_numbers(query, start, largest, s);
    }

    /// The chunk's (max, sum) joins those of the chunks before, if this block walks through them.
    __device__ void merge_numbers(int query, int start, float next_max, float next_sum) {
        if (decode || start == 0) {
            max[query] = next_max;
            sum[query] = next_sum;
            return;
        }
        const float top = max[query] > next_max ? max[query] : next_max;
        const float old_w = exp_f32(max[query] - top), new_w = exp_f32(next_max - top);
        sum[query] = fmaf(sum[query], old_w, next_sum * new_w);
        max[query] = top;
        old_weight[query] = old_w;
        new_weight[query] = new_w;
    }

    __device__ void add_page(const unsigned char* stage, int slice, int page, int start,
                             float (&acc)[kOwnQueries][kOwnDims]) const {
        const int first = slice * kSlice, width = d - first < kSlice ? d - first : kSlice;
        if (own_query(0) >= kQueries || own_dim() >= width) return;
        int count[kOwnQueries];
        int common = kPageKeys;
        for (int i = 0; i < kOwnQueries; ++i) {
            const int left = keys(own_query(i), start) - page * kPageKeys;
            count[i] = left < 0 ? 0 : left < kPageKeys ? left : kPageKeys;
            common = count[i] < common ? count[i] : common;
        }
        const unsigned char* values = stage + own_dim() * kElement;
        const float* p = scores + own_query(0) * kChunkKeys + page * kPageKeys;
#pragma unroll 8
        for (int t = 0; t < common; ++t) {
            float v[kOwnDims];
            read_values<kInt8>(values + t * width * kElement, v);
            for (int i = 0; i < kOwnQueries; ++i)
                for (int j = 0; j < kOwnDims; ++j) acc[i][j] = fmaf(p[i * kChunkKeys + t], v[j], acc[i][j]);
        }
        for (int i = 0; i < kOwnQueries; ++i)  // what only one of them sees
            for (int t = common; t < count[i]; ++t) {
                float v[kOwnDims];
                read_values<kInt8>(values + t * width * kElement, v);
                for (int j = 0; j < kOwnDims; ++j) acc[i][j] = fmaf(p[i * kChunkKeys + t], v[j], acc[i][j]);
            }
    }

    __device__ void write(int query, int dim, const float (&acc)[kOwnDims], float all) const {
        if (!valid(query)) return;
        const float factor = 1.0f / all;
        float* out = query_row(a.out, query);
        for (int i = 0; i < kOwnDims; ++i)
            if (dim + i < a.cache.head_dim) out[dim + i] = acc[i] * factor;
    }

    __device__ float* partial(int chunk) const {
        const std::int64_t index = (static_cast<std::int64_t>(task) + chunk) * gridDim.x + blockIdx.x;
        return a.partials + index * kQueries * (d + 2);
    }
    __device__ void merge_chunks(int query, int dim) const {
        if (!valid(query) || dim >= a.cache.head_dim) return;
        const float* own = partial(0) + query * (d + 2);
        float acc = load_published(own + dim), top = load_published(own + d), all = load_published(own + d + 1);
        for (int chunk = 1; chunk < chunks(); ++chunk) {
            own = partial(chunk) + query * (d + 2);
            const float next = load_published(own + dim), next_max = load_published(own + d);
            const float next_sum = load_published(own + d + 1), larger = top > next_max ? top : next_max;
            const float old_w = exp_f32(top - larger), new_w = exp_f32(next_max - larger);
            all = fmaf(all, old_w, next_sum * new_w);
            acc = fmaf(acc, old_w, next * new_w);
            top = larger;
        }
        query_row(a.out, query)[dim] = acc * (1.0f / all);
    }

    const AttentionArgs& a;
    int thread, d, group, pieces, kv_head, piece, tile, first_row, tokens, task, position;
    bool decode;
    const std::int32_t* table;
    float *q, *scores, *total, *max, *sum, *old_weight, *new_weight;
    int* flag;
    unsigned char* stages;
};

}  // namespace cnl::cuda
