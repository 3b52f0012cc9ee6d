// SPDX-License-Identifier: Apache-2.0
// Causal attention with the operations of csrc/cpu/kernels_attention.inl, in their order: the same bits.
//
// A block holds up to 16 queries (tokens x heads of a group) of one kv head and walks through 256 keys at a time:
//   scores   a thread a key: it reads 16 bytes of it at a time, the queries come from shared memory
//   softmax  a warp a query
//   values   a thread some dimensions of some queries, in the order of the positions; a page of 64 positions x 128
//            dimensions at a time passes through shared memory, asked for two pages ahead
// Decode has few queries and many keys, so there every chunk is a block of its own and the last block to finish merges
// the parts, in order. Prefill has many queries: a block merges as it goes.
#include <algorithm>

#include "attention_block.cuh"

namespace cnl::cuda {
namespace {

template <bool kInt8, int kQueries>
__global__ void __launch_bounds__(kAttentionThreads, 1) decode_kernel(const __grid_constant__ AttentionArgs a) {
    CNL_SHARED_MEMORY(memory);
    wait_for_previous();
    AttentionBlock<kInt8, kQueries> block(a, memory, true);
    const int chunk = static_cast<int>(blockIdx.z);
    if (block.empty() || chunk >= block.chunks()) return;
    block.decode_chunk(chunk);
}

template <bool kInt8, int kQueries>
__global__ void __launch_bounds__(kAttentionThreads, 1) prefill_kernel(const __grid_constant__ AttentionArgs a) {
    CNL_SHARED_MEMORY(memory);
    wait_for_previous();
    AttentionBlock<kInt8, kQueries> block(a, memory, false);
    if (!block.empty()) block.walk();
}

using Kernel = void (*)(AttentionArgs);

template <bool kInt8>
Kernel decode_of(int queries) {
    switch (queries) {
        case 1:
            return decode_kernel<kInt8, 1>;
        case 2:
            return decode_kernel<kInt8, 2>;
        case 4:
            return decode_kernel<kInt8, 4>;
        default:
            return decode_kernel<kInt8, 8>;
    }
}
template <bool kInt8>
Kernel prefill_of(int queries) {
    switch (queries) {
        case 1:
            return prefill_kernel<kInt8, 1>;
        case 4:
            return prefill_kernel<kInt8, 4>;
        case 8:
            return prefill_kernel<kInt8, 8>;
        default:
            return prefill_kernel<kInt8, 16>;
    }
}

void launch_attention(const Queue& queue, const char* name, Kernel kernel, const AttentionArgs& args,
                      const AttentionCut& cut, bool decode) {
    const AttentionPlan plan(cut.queries, args.cache.padded_dim, args.cache.int8 ? 1 : 2, decode);
    const dim3 grid(static_cast<unsigned>(args.cache.kv_heads * cut.pieces), static_cast<unsigned>(args.tiles),
                    decode ? static_cast<unsigned>(args.chunks) : 1u);
    launch(queue, name, kernel, {grid, dim3(kAttentionThreads), static_cast<std::size_t>(plan.bytes)}, args);
}

}  // namespace

AttentionCut attention_cut(const Queue& queue, int group, int padded_dim, bool int8, bool decode) {
    // The most queries that shared memory holds; decode has no more than the heads of a group.
    int queries = decode ? 8 : 16;
    const auto fits = [&](int n) {
        return static_cast<std::size_t>(AttentionPlan(n, padded_dim, int8 ? 1 : 2, decode).bytes) <= queue.shared_limit;
    };
    while (queries > 1 && !fits(queries)) queries = !decode && queries == 4 ? 1 : queries / 2;
    while (decode && queries > 1 && queries / 2 >= group) queries /= 2;
    AttentionCut cut{};
    cut.queries = queries;
    cut.piece_heads = std::min(group, queries);
    cut.pieces = (group + cut.piece_heads - 1) / cut.piece_heads;
    cut.tile_tokens = decode ? 1 : queries / cut.piece_heads;
    return cut;
}

std::int64_t partial_floats(const AttentionCut& cut, std::int64_t tasks, int kv_heads, int padded_dim) {
    return tasks * kv_heads * cut.pieces * cut.queries * (padded_dim + 2);
}

void attention_decode(const Queue& queue, AttentionArgs args) {
    const AttentionCut cut =
        attention_cut(queue, args.heads / args.cache.kv_heads, args.cache.padded_dim, args.cache.int8, true);
    args.piece_heads = cut.piece_heads;
    launch_attention(queue, "attention_decode",
                     args.cache.int8 ? decode_of<true>(cut.queries) : decode_of<false>(cut.queries), args, cut, true);
}

void attention_prefill(const Queue& queue, AttentionArgs args) {
    const AttentionCut cut =
        attention_cut(queue, args.heads / args.cache.kv_heads, args.cache.padded_dim, args.cache.int8, false);
    args.piece_heads = cut.piece_heads;
    launch_attention(queue, "attention_prefill",
                     args.cache.int8 ? prefill_of<true>(cut.queries) : prefill_of<false>(cut.queries), args, cut,
                     false);
}

}  // namespace cnl::cuda
