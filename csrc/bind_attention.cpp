// SPDX-License-Identifier: Apache-2.0
// _core.ops, continued: attention and rope over a cache that is built from given keys and values.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "bind_arrays.hpp"
#include "cpu/half.hpp"
#include "kv_cache.hpp"
#include "ops.hpp"

namespace py = pybind11;

namespace {

using namespace cnl;
using namespace cnl::bind;

/// One sequence: its length, and how many of its last positions are queries.
using Lengths = std::vector<std::pair<std::int64_t, std::int64_t>>;

struct TestCache {
    KvLayout layout;
    KvCache cache;
    std::vector<int> ids;
    std::vector<SequenceRows> queries;  // of attention
    std::int64_t query_rows = 0, key_rows = 0;

    static std::int64_t pages(const Lengths& lengths) {
        std::int64_t sum = 0;
        for (const auto& [length, count] : lengths) {
            require(count > 0 && length >= count, "a sequence needs 1 <= queries <= length");
            sum += layout::round_up(length, KvLayout::kPage) / KvLayout::kPage;
        }
        return sum;
    }

    /// Layer 1 of 2 is used. All bytes are 0xff first: in a reused page anything may be found, NaN for example. Pages
    /// are taken in turn, so that no sequence has neighbouring ones.
    TestCache(KvType type, int kv_heads, int head_dim, const Lengths& lengths)
        : layout{type, 2, kv_heads, head_dim}, cache(layout, pages(lengths)) {
        for (std::int64_t p = 0; p < cache.pages_total(); ++p)
            std::memset(cache.slab(static_cast<std::int32_t>(p), 0, 0), 0xff, layout.page_bytes());
        for (std::size_t i = 0; i < lengths.size(); ++i) ids.push_back(cache.open());
        for (bool more = true; more;) {
            more = false;
            for (std::size_t i = 0; i < lengths.size(); ++i) {
                const std::int64_t left = lengths[i].first - cache.length(ids[i]);
                if (left > 0) cache.extend(ids[i], std::min<std::int64_t>(left, KvLayout::kPage));
                more = more || left > KvLayout::kPage;
            }
        }
        for (std::size_t i = 0; i < lengths.size(); ++i) {
            const auto [length, count] = lengths[i];
            queries.push_back({query_rows, count, length - count, cache.page_table(ids[i])});
            query_rows += count;
            key_rows += length;
        }
    }

    /// Rows are all positions of all sequences.
    std::vector<SequenceRows> all_rows() const {
        std::vector<SequenceRows> rows;
        std::int64_t row = 0;
        for (const SequenceRows& s : queries) {
            rows.push_back({row, s.start + s.count, 0, s.pages});
            row += s.start + s.count;
        }
        return rows;
    }
};

KvType kv_type_of(const std::string& name) {
    require(name == "fp16" || name == "int8", "kv_type must be fp16 or int8");
    return name == "int8" ? KvType::int8 : KvType::fp16;
}

py::array_t<float> attention(const Floats& q, const Floats& k, const Floats& v, int heads, int kv_heads,
                             const Lengths& lengths, const std::string& kv_type, const std::string& isa, int threads) {
    const auto [rows, width] = matrix_shape(k, "k");
    require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && width % kv_heads == 0, "heads do not divide");
    const std::int64_t head_dim = width / kv_heads;
    require(head_dim % 2 == 0 && head_dim <= 1024, "head_dim must be even and at most 1024");
    const IsaScope scope(isa);
    TestCache test(kv_type_of(kv_type), kv_heads, static_cast<int>(head_dim), lengths);
    require(rows == test.key_rows && v.ndim() == 2 && v.shape(0) == rows && v.shape(1) == width,
            "k and v must have a row for every position");
    require(q.ndim() == 2 && q.shape(0) == test.query_rows && q.shape(1) == heads * head_dim,
            "q must be [queries, heads * head_dim]");
    py::array_t<float> out({test.query_rows, heads * head_dim});
    float* target = out.mutable_data();
    std::vector<float> keys(k.data(), k.data() + k.size()), queries(q.data(), q.data() + q.size());
    std::vector<float> unused(static_cast<std::size_t>(rows * heads * head_dim));
    const std::vector<float> cos(static_cast<std::size_t>(rows * head_dim / 2), 1.0f), sin(cos.size(), 0.0f);
    const std::vector<SequenceRows> all = test.all_rows();
    ThreadPool(threads).run([&](Team& team) {
        ops::rope_append(team, unused.data(), keys.data(), v.data(), cos.data(), sin.data(), heads, all, test.cache, 1);
        ops::attention(team, queries.data(), heads, nullptr, test.queries, test.cache, 1, target, nullptr);
    });
    return out;
}

/// One step of attention as the model runs it: cached positions first, then the queries' own, rotated, appended and
/// attended in one op. q [queries, heads * d]; k, v, cos, sin of all positions. (attended, quantized, barriers)
py::tuple attention_step(const Floats& q, const Floats& k, const Floats& v, const Floats& cos, const Floats& sin,
                         int heads, int kv_heads, const Lengths& lengths, const std::string& kv_type,
                         const std::string& isa, int threads) {
    const auto [positions, width] = matrix_shape(k, "k");
    require(kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && width % kv_heads == 0, "heads do not divide");
    const std::int64_t d = width / kv_heads, half = d / 2;
    const IsaScope scope(isa);
    TestCache test(kv_type_of(kv_type), kv_heads, static_cast<int>(d), lengths);
    require(d % 2 == 0 && d <= 1024 && positions == test.key_rows && v.size() == k.size() &&
                q.size() == test.query_rows * heads * d && cos.size() == positions * half && sin.size() == cos.size(),
            "sizes do not match");
    // Rows of the step from rows of all positions.
    const auto pick = [&](const Floats& from, std::int64_t columns) {
        std::vector<float> rows;
        std::int64_t first = 0;
        for (const SequenceRows& s : test.queries) {
            const float* begin = from.data() + (first + s.start) * columns;
            rows.insert(rows.end(), begin, begin + s.count * columns);
            first += s.start + s.count;
        }
        return rows;
    };
    std::vector<float> new_k = pick(k, width), new_v = pick(v, width), new_cos = pick(cos, half),
                       new_sin = pick(sin, half);
    std::vector<float> all_k(k.data(), k.data() + k.size()), queries(q.data(), q.data() + q.size());
    std::vector<float> unused(static_cast<std::size_t>(positions * heads * d));
    std::vector<SequenceRows> cached = test.all_rows();
    for (std::size_t i = 0; i < cached.size(); ++i) cached[i].count = test.queries[i].start;
    std::erase_if(cached, [](const SequenceRows& s) { return s.count == 0; });
    py::array_t<float> out({test.query_rows, heads * d});
    float* target = out.mutable_data();
    ops::Activations quantized(test.query_rows, heads * d);
    ThreadPool pool(threads);
    pool.run([&](Team& team) {
        if (!cached.empty())
            ops::rope_append(team, unused.data(), all_k.data(), v.data(), cos.data(), sin.data(), heads, cached,
                             test.cache, 1);
    });
    std::int64_t barriers = 0;
    for (int repeat = 0; repeat < 2; ++repeat) {  // the first time takes the pool's memory
        std::copy_n(q.data(), q.size(), queries.data());
        new_k = pick(k, width);
        const ops::NewKeys fresh{new_k.data(), new_v.data(), new_cos.data(), new_sin.data()};
        const std::int64_t before = pool.barriers();
        pool.run([&](Team& team) {
            ops::attention(team, queries.data(), heads, &fresh, test.queries, test.cache, 1, target, &quantized);
        });
        barriers = pool.barriers() - before;
    }
    return py::make_tuple(out, activation_rows(quantized.data().shared), barriers);
}

/// (q, k rotated, cached K and V as float [rows, kv_heads * head_dim]) of sequences that begin at 0.
py::tuple rope_append(const Floats& q, const Floats& k, const Floats& v, const Floats& cos, const Floats& sin,
                      int heads, int kv_heads, const Lengths& lengths, const std::string& kv_type,
                      const std::string& isa, int threads) {
    const auto [rows, width] = matrix_shape(k, "k");
    require(kv_heads > 0 && heads > 0 && width % kv_heads == 0, "heads do not divide");
    const std::int64_t d = width / kv_heads;
    require(d % 2 == 0 && d <= 1024, "head_dim must be even and at most 1024");
    const IsaScope scope(isa);
    TestCache test(kv_type_of(kv_type), kv_heads, static_cast<int>(d), lengths);
    require(rows == test.key_rows && v.size() == k.size() && q.size() == rows * heads * d &&
                cos.size() == rows * d / 2 && sin.size() == cos.size(),
            "sizes do not match");
    py::array_t<float> q_out({rows, heads * d}), k_out({rows, width}), keys({rows, width}), values({rows, width});
    std::copy_n(q.data(), q.size(), q_out.mutable_data());
    std::copy_n(k.data(), k.size(), k_out.mutable_data());
    const std::vector<SequenceRows> all = test.all_rows();
    float *q_target = q_out.mutable_data(), *k_target = k_out.mutable_data();
    ThreadPool(threads).run([&](Team& team) {
        ops::rope_append(team, q_target, k_target, v.data(), cos.data(), sin.data(), heads, all, test.cache, 1);
    });
    const KvLayout& layout = test.layout;
    const auto read = [&](const std::uint8_t* slab, std::size_t offset, std::int64_t index) {
        if (layout.type == KvType::int8) return static_cast<float>(static_cast<std::int8_t>(slab[offset + index]));
        std::uint16_t half;
        std::memcpy(&half, slab + offset + 2 * index, 2);
        return cpu::half_to_float(half);
    };
    const auto scale = [&](const std::uint8_t* slab, std::size_t offset, std::int64_t slot) {
        if (layout.type != KvType::int8) return 1.0f;
        std::uint16_t half;
        std::memcpy(&half, slab + offset + 2 * slot, 2);
        return cpu::half_to_float(half);
    };
    for (const SequenceRows& s : all)
        for (std::int64_t p = 0; p < s.count; ++p)
            for (int h = 0; h < kv_heads; ++h) {
                const std::uint8_t* slab = test.cache.slab(s.pages[p / KvLayout::kPage], 1, h);
                const std::int64_t slot = p % KvLayout::kPage, padded = layout.padded_dim();
                for (std::int64_t j = 0; j < d; ++j) {
                    keys.mutable_at(s.row + p, h * d + j) = read(slab, 0, (slot / 16 * padded + j) * 16 + slot % 16) *
                                                            scale(slab, layout.k_scale_offset(), slot);
                    values.mutable_at(s.row + p, h * d + j) =
                        read(slab, layout.v_offset(), slot * padded + j) * scale(slab, layout.v_scale_offset(), slot);
                }
            }
    return py::make_tuple(q_out, k_out, keys, values);
}

}  // namespace

void bind_attention(py::module_& module) {
    const auto isa = py::arg("isa") = "";
    const auto threads = py::arg("threads") = 1;
    module.def("rope_append", &rope_append, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cos"), py::arg("sin"),
               py::arg("heads"), py::arg("kv_heads"), py::arg("lengths"), py::arg("kv_type") = "fp16", isa, threads);
    module.def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("heads"), py::arg("kv_heads"),
               py::arg("lengths"), py::arg("kv_type") = "fp16", isa, threads);
    module.def("attention_step", &attention_step, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cos"),
               py::arg("sin"), py::arg("heads"), py::arg("kv_heads"), py::arg("lengths"), py::arg("kv_type") = "fp16",
               isa, threads);
}
