// SPDX-License-Identifier: Apache-2.0
// _cuda.ops: attention and rotary positions over a cache made for the occasion.
#include <pybind11/stl.h>

#include "../kv_cache.hpp"
#include "bind_arrays.hpp"

namespace cnl::cuda {
namespace {

using Lengths = std::vector<std::pair<std::int64_t, std::int64_t>>;

/// A cache of one layer with sequences whose pages are taken in turn; NaN where nothing was written.
struct TestCache {
    KvLayout layout;
    std::vector<std::vector<std::int32_t>> pages;
    std::vector<SequenceRows> queries, all;
    std::int64_t query_rows = 0, key_rows = 0;
    DeviceArray<std::uint8_t> memory;

    TestCache(const std::string& kv_type, int kv_heads, int head_dim, const Lengths& lengths)
        : layout{kv_type == "int8" ? KvType::int8 : KvType::fp16, 1, kv_heads, head_dim}, pages(lengths.size()) {
        require(kv_type == "int8" || kv_type == "fp16", "kv_type must be fp16 or int8");
        std::int32_t next = 0;
        for (bool more = true; more;) {
            more = false;
            for (std::size_t i = 0; i < lengths.size(); ++i)
                if (static_cast<std::int64_t>(pages[i].size()) * KvLayout::kPage < lengths[i].first) {
                    pages[i].push_back(next++);
                    more = true;
                }
        }
        memory = poisoned<std::uint8_t>(layout.page_bytes() * static_cast<std::size_t>(next));
        for (std::size_t i = 0; i < lengths.size(); ++i) {
            const auto [length, count] = lengths[i];
            require(count > 0 && length >= count, "a sequence needs 1 <= queries <= length");
            queries.push_back({query_rows, count, length - count, pages[i].data()});
            all.push_back({key_rows, length, 0, pages[i].data()});
            query_rows += count;
            key_rows += length;
        }
    }
    Cache cache() const {
        Cache c;
        c.base = memory.get();
        c.page_stride = static_cast<std::int64_t>(layout.page_bytes());
        c.slab_stride = static_cast<std::int64_t>(layout.slab_bytes());
        c.kv_heads = layout.kv_heads;
        c.head_dim = layout.head_dim;
        c.padded_dim = layout.padded_dim();
        c.int8 = layout.type == KvType::int8;
        c.v_offset = static_cast<std::int64_t>(layout.v_offset());
        c.k_scale_offset = static_cast<std::int64_t>(layout.k_scale_offset());
        c.v_scale_offset = static_cast<std::int64_t>(layout.v_scale_offset());
        return c;
    }
};

/// kernel: "decode" takes every row alone, "prefill" in tiles, "auto" as a step does.
py::array_t<float> attention_op(const Floats& q, const Floats& k, const Floats& v, int heads, int kv_heads,
                                const Lengths& lengths, const std::string& kv_type, const std::string& kernel) {
    const Bench bench;
    const Queue& queue = bench.context.queue();
    const auto [rows, width] = shape_of(k);
    require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && width % kv_heads == 0, "heads do not divide");
    const int d = static_cast<int>(width / kv_heads);
    TestCache test(kv_type, kv_heads, d, lengths);
    require(rows == test.key_rows && v.size() == k.size() && q.size() == test.query_rows * heads * d,
            "sizes do not match");
    const std::vector<float> ones(static_cast<std::size_t>(rows * d / 2), 1.0f), zeros(ones.size());
    const std::vector<std::int32_t> all_tokens(static_cast<std::size_t>(rows)),
        tokens(static_cast<std::size_t>(test.query_rows));

    StepUpload fill(rows, d / 2, rows + 1);
    send(fill, bench.context, all_tokens, {}, test.all, ones.data(), zeros.data());
    const auto keys = sent(k), values = sent(v);
    const auto unused = poisoned<float>(static_cast<std::size_t>(rows * heads * d));
    rope_append(queue, fill.device(), static_cast<int>(rows), unused.get(), keys.get(), values.get(), heads,
                test.cache());

    AttentionArgs args;
    args.cache = test.cache();
    args.heads = heads;
    const auto queries = sent(q);
    const auto out = poisoned<float>(static_cast<std::size_t>(q.size()));
    args.q = queries.get();
    args.out = out.get();
    std::vector<SequenceRows> sequences = test.queries;
    const AttentionCut prefill =
        attention_cut(queue, heads / kv_heads, test.layout.padded_dim(), args.cache.int8, false);
    const AttentionCut decode = attention_cut(queue, heads / kv_heads, test.layout.padded_dim(), args.cache.int8, true);
    if (kernel == "decode") {  // a sequence a row
        sequences.clear();
        for (const SequenceRows& s : test.queries)
            for (std::int64_t i = 0; i < s.count; ++i) sequences.push_back({s.row + i, 1, s.start + i, s.pages});
    }
    StepUpload upload(test.query_rows, d / 2, (rows + 1) * test.query_rows);
    const StepShape shape =
        send(upload, bench.context, tokens, {}, sequences, ones.data(), zeros.data(), prefill.tile_tokens);
    args.step = upload.device();
    args.chunks = shape.chunks;
    const auto partials = poisoned<float>(
        static_cast<std::size_t>(partial_floats(decode, shape.tasks, kv_heads, test.layout.padded_dim()) + 1));
    const std::vector<std::uint32_t> none(static_cast<std::size_t>(test.query_rows * heads));
    const auto arrivals = sent(none.data(), none.size());
    args.partials = partials.get();
    args.arrivals = arrivals.get();
    args.tiles = shape.decode_tiles;
    const bool tiles_only = kernel == "prefill";
    require(kernel == "auto" || kernel == "decode" || tiles_only, "kernel must be auto, decode or prefill");
    if (shape.decode_tiles && tiles_only) attention_prefill(queue, args);
    if (shape.decode_tiles && !tiles_only) attention_decode(queue, args);
    args.first_tile = shape.decode_tiles;
    args.tiles = shape.prefill_tiles;
    if (shape.prefill_tiles) attention_prefill(queue, args);
    return fetched(bench.context, out, {test.query_rows, static_cast<py::ssize_t>(heads) * d});
}

/// (q, k rotated) of sequences that begin at 0.
py::tuple rope_op(const Floats& q, const Floats& k, const Floats& v, const Floats& cos, const Floats& sin, int heads,
                  int kv_heads, const Lengths& lengths, const std::string& kv_type) {
    const Bench bench;
    const auto [rows, width] = shape_of(k);
    require(kv_heads > 0 && heads > 0 && width % kv_heads == 0, "heads do not divide");
    const int d = static_cast<int>(width / kv_heads);
    const TestCache test(kv_type, kv_heads, d, lengths);
    require(rows == test.key_rows && v.size() == k.size() && q.size() == rows * heads * d &&
                cos.size() == rows * d / 2 && sin.size() == cos.size(),
            "sizes do not match");
    const std::vector<std::int32_t> tokens(static_cast<std::size_t>(rows));
    StepUpload upload(rows, d / 2, rows + 1);
    send(upload, bench.context, tokens, {}, test.all, cos.data(), sin.data());
    const auto queries = sent(q), keys = sent(k), values = sent(v);
    rope_append(bench.context.queue(), upload.device(), static_cast<int>(rows), queries.get(), keys.get(), values.get(),
                heads, test.cache());
    return py::make_tuple(fetched(bench.context, queries, {rows, static_cast<py::ssize_t>(heads) * d}),
                          fetched(bench.context, keys, {rows, width}));
}

}  // namespace
}  // namespace cnl::cuda

void bind_cuda_attention(pybind11::module_& ops) {
    using namespace cnl::cuda;
    ops.def("attention", &attention_op, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("heads"), py::arg("kv_heads"),
            py::arg("lengths"), py::arg("kv_type") = "fp16", py::arg("kernel") = "auto");
    ops.def("rope_append", &rope_op, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cos"), py::arg("sin"),
            py::arg("heads"), py::arg("kv_heads"), py::arg("lengths"), py::arg("kv_type") = "fp16");
}
