// SPDX-License-Identifier: Apache-2.0
// _core.ops: every op on NumPy arrays, for the tests and the benchmark. Not part of the run time's interface.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/activations.hpp"
#include "cpu/cpu_info.hpp"
#include "cpu/half.hpp"
#include "cpu/quantize.hpp"
#include "kv_cache.hpp"
#include "ops.hpp"

namespace py = pybind11;

namespace {

using namespace cnl;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<std::uint8_t, py::array::c_style>;
using Integers = py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>;
/// (packed, scheme, rows, bias or None); the columns come from x.
using PackedMatrix = std::tuple<Bytes, std::string, std::int64_t, std::optional<Floats>>;

/// The instruction set of one call. These bindings keep the GIL, so no two calls are inside at once.
class IsaScope {
 public:
    explicit IsaScope(const std::string& name) : before_(cpu::kernels().name) {
        if (!name.empty()) cpu::use_isa(name);
    }
    ~IsaScope() { cpu::use_isa(before_); }
    IsaScope(const IsaScope&) = delete;
    IsaScope& operator=(const IsaScope&) = delete;

 private:
    std::string before_;
};

void require(bool ok, const std::string& message) {
    if (!ok) throw std::invalid_argument(message);
}

std::pair<std::int64_t, std::int64_t> matrix_shape(const Floats& x, const char* name) {
    require(x.ndim() == 2 && x.shape(0) > 0 && x.shape(1) > 0, std::string(name) + " must be a matrix with values");
    return {x.shape(0), x.shape(1)};
}

const float* vector_of(const std::optional<Floats>& x, std::int64_t size, const char* name) {
    if (!x) return nullptr;
    require(x->size() == size, std::string(name) + " must have " + std::to_string(size) + " values");
    return x->data();
}

/// A copy on a 64-byte boundary, as files have it.
struct AlignedWeight {
    AlignedArray<std::uint8_t> data;
    Weight weight;
    AlignedWeight(const Bytes& packed, const std::string& name, std::int64_t rows, std::int64_t cols)
        : data(packed.size()) {
        const layout::Scheme* scheme = layout::find_scheme(name);
        require(scheme != nullptr, "unknown weight scheme '" + name + "'");
        require(rows > 0 && cols > 0 && packed.size() == layout::packed_bytes(*scheme, rows, cols),
                "the packed bytes do not have the size of the matrix");
        std::memcpy(data.get(), packed.data(), static_cast<std::size_t>(packed.size()));
        weight = {scheme, rows, cols, data.get()};
    }
};

std::vector<std::unique_ptr<AlignedWeight>> align_all(const std::vector<PackedMatrix>& matrices, std::int64_t cols) {
    std::vector<std::unique_ptr<AlignedWeight>> all;
    for (const auto& [packed, scheme, rows, bias] : matrices)
        all.push_back(std::make_unique<AlignedWeight>(packed, scheme, rows, cols));
    return all;
}

/// Activations back in rows: (int8 [m, cols], float [m, spans], int32 [m, ceil(cols / 32)] sums).
py::tuple unpack(const ActivationData& d) {
    const std::int64_t padded = d.padded(d.cols), spans = d.spans(d.cols);
    py::array_t<std::int8_t> values({d.m, padded});
    py::array_t<float> scales({d.m, spans});
    py::array_t<std::int32_t> sums32({d.m, padded / 32}), sums64({d.m, padded / 64});
    const Tiles tiles(d.m);
    const auto whole = [](std::int32_t pair) { return static_cast<std::int16_t>(pair & 0xffff) + (pair >> 16); };
    for (std::int64_t i = 0; i < d.m; ++i) {
        const std::int64_t tile = tiles.of(i), begin = tiles.begin(tile), size = tiles.size(tile), slot = i - begin;
        for (std::int64_t k = 0; k < padded; ++k)
            values.mutable_at(i, k) = d.values.get()[begin * padded + (k / 32 * size + slot) * 32 + k % 32];
        for (std::int64_t s = 0; s < spans; ++s)
            scales.mutable_at(i, s) = d.scales.get()[begin * spans + s * size + slot];
        for (std::int64_t g = 0; g < padded / 32; ++g)
            sums32.mutable_at(i, g) = whole(d.sums32.get()[begin * padded / 32 + g * size + slot]);
        for (std::int64_t g = 0; g < padded / 64; ++g)
            sums64.mutable_at(i, g) = whole(d.sums64.get()[begin * padded / 64 + g * size + slot]);
    }
    return py::make_tuple(values, scales, sums32, sums64);
}

py::tuple quantize_activations(const Floats& x, const std::optional<Floats>& gamma, float eps, const std::string& isa,
                               int threads) {
    const auto [m, cols] = matrix_shape(x, "x");
    const float* weights = vector_of(gamma, cols, "gamma");
    const IsaScope scope(isa);
    ops::Activations out(m, cols, threads);
    ThreadPool(threads).run([&, rows = m, columns = cols](Team& team) {
        if (weights)
            ops::rms_norm(team, x.data(), weights, eps, rows, columns, out);
        else
            ops::quantize(team, x.data(), rows, columns, out);
    });
    return unpack(out.data().own.empty() ? out.data().shared : *out.data().own[0]->current);
}

py::list matmul(const Floats& x, const std::vector<PackedMatrix>& matrices, const std::string& isa, int threads) {
    const auto [m, cols] = matrix_shape(x, "x");
    const IsaScope scope(isa);
    const auto weights = align_all(matrices, cols);
    std::vector<py::array_t<float>> outputs;
    std::vector<ops::Projection> projections;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const Weight& w = weights[i]->weight;
        outputs.emplace_back(std::vector<py::ssize_t>{m, w.rows});
        projections.push_back(
            {&w, vector_of(std::get<3>(matrices[i]), w.rows, "bias"), outputs.back().mutable_data(), w.rows});
    }
    ops::Activations a(m, cols, threads);
    ThreadPool(threads).run([&, rows = m, columns = cols](Team& team) {
        ops::quantize(team, x.data(), rows, columns, a);
        ops::matmul(team, a, projections);
    });
    py::list result;
    for (const auto& output : outputs) result.append(output);
    return result;
}

py::array_t<float> matmul_add(const Floats& x, const PackedMatrix& matrix, const Floats& residual,
                              const std::string& isa, int threads) {
    const auto [m, cols] = matrix_shape(x, "x");
    const IsaScope scope(isa);
    const auto weights = align_all({matrix}, cols);
    const Weight& w = weights[0]->weight;
    require(residual.ndim() == 2 && residual.shape(0) == m && residual.shape(1) == w.rows,
            "residual must be [m, rows]");
    py::array_t<float> out({m, w.rows});
    std::memcpy(out.mutable_data(), residual.data(), static_cast<std::size_t>(out.nbytes()));
    const float* bias = vector_of(std::get<3>(matrix), w.rows, "bias");
    float* target = out.mutable_data();
    ops::Activations a(m, cols, threads);
    ThreadPool(threads).run([&, rows = m, columns = cols](Team& team) {
        ops::quantize(team, x.data(), rows, columns, a);
        ops::matmul_add(team, a, w, bias, target);
    });
    return out;
}

/// (h, quantize(h) as quantize_activations returns it)
py::tuple matmul_swiglu_quantized(const Floats& x, const PackedMatrix& gate, const PackedMatrix& up,
                                  const std::string& isa, int threads) {
    const auto [m, cols] = matrix_shape(x, "x");
    const IsaScope scope(isa);
    const auto weights = align_all({gate, up}, cols);
    const Weight &g = weights[0]->weight, &u = weights[1]->weight;
    require(g.rows == u.rows, "gate and up must have the same rows");
    py::array_t<float> out({m, g.rows});
    const float* gate_bias = vector_of(std::get<3>(gate), g.rows, "gate bias");
    const float* up_bias = vector_of(std::get<3>(up), g.rows, "up bias");
    float* target = out.mutable_data();
    ops::Activations a(m, cols, threads), quantized(m, g.rows);
    ThreadPool(threads).run([&, rows = m, columns = cols](Team& team) {
        ops::quantize(team, x.data(), rows, columns, a);
        ops::matmul_swiglu(team, a, g, gate_bias, u, up_bias, target, &quantized);
    });
    return py::make_tuple(out, unpack(quantized.data().shared));
}

py::object matmul_swiglu(const Floats& x, const PackedMatrix& gate, const PackedMatrix& up, const std::string& isa,
                         int threads) {
    return matmul_swiglu_quantized(x, gate, up, isa, threads)[0];
}

py::array_t<float> embed(const Bytes& packed, const std::string& scheme, std::int64_t rows, std::int64_t cols,
                         const Integers& tokens, int threads) {
    const AlignedWeight table(packed, scheme, rows, cols);
    for (py::ssize_t i = 0; i < tokens.size(); ++i)
        require(tokens.data()[i] >= 0 && tokens.data()[i] < rows, "a token is outside the table");
    require(tokens.size() > 0, "tokens must not be empty");
    const std::int64_t m = tokens.size();
    py::array_t<float> out({m, cols});
    float* target = out.mutable_data();
    ThreadPool(threads).run([&](Team& team) { ops::embed(team, table.weight, tokens.data(), m, target); });
    return out;
}

py::array_t<float> gather_rows(const Floats& x, const Integers& rows, int threads) {
    const auto [m, cols] = matrix_shape(x, "x");
    for (py::ssize_t i = 0; i < rows.size(); ++i)
        require(rows.data()[i] >= 0 && rows.data()[i] < m, "a row is outside x");
    const std::int64_t count = rows.size();
    py::array_t<float> out(std::vector<py::ssize_t>{count, cols});
    float* target = out.mutable_data();
    ThreadPool(threads).run(
        [&, columns = cols](Team& team) { ops::gather_rows(team, x.data(), rows.data(), count, columns, target); });
    return out;
}

template <typename Kernel>
py::array_t<float> elementwise(const Floats& x, Kernel kernel) {
    const std::int64_t n = x.size(), padded = layout::round_up(n, 16);
    std::vector<float> in(static_cast<std::size_t>(padded)), out(static_cast<std::size_t>(padded));
    std::copy_n(x.data(), n, in.data());
    kernel(in.data(), out.data(), padded);
    py::array_t<float> result(n);
    std::copy_n(out.data(), n, result.mutable_data());
    return result;
}

// ---- a cache built from given keys and values

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
    return py::make_tuple(out, unpack(quantized.data().shared), barriers);
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

void bind_bench(py::module_& module);

void bind_kernels(py::module_& core) {
    py::module_ module = core.def_submodule("ops", "Every op on NumPy arrays, for tests and benchmarks.");
    const auto isa = py::arg("isa") = "";
    const auto threads = py::arg("threads") = 1;
    module.def("quantize_activations", &quantize_activations, py::arg("x"), py::arg("gamma") = py::none(),
               py::arg("eps") = 0.0f, isa, threads);
    module.def("matmul", &matmul, py::arg("x"), py::arg("matrices"), isa, threads);
    module.def("matmul_add", &matmul_add, py::arg("x"), py::arg("matrix"), py::arg("residual"), isa, threads);
    module.def("matmul_swiglu", &matmul_swiglu, py::arg("x"), py::arg("gate"), py::arg("up"), isa, threads);
    module.def("matmul_swiglu_quantized", &matmul_swiglu_quantized, py::arg("x"), py::arg("gate"), py::arg("up"), isa,
               threads);
    module.def("embed", &embed, py::arg("packed"), py::arg("scheme"), py::arg("rows"), py::arg("cols"),
               py::arg("tokens"), threads);
    module.def("gather_rows", &gather_rows, py::arg("x"), py::arg("rows"), threads);
    module.def("rope_append", &rope_append, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cos"), py::arg("sin"),
               py::arg("heads"), py::arg("kv_heads"), py::arg("lengths"), py::arg("kv_type") = "fp16", isa, threads);
    module.def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("heads"), py::arg("kv_heads"),
               py::arg("lengths"), py::arg("kv_type") = "fp16", isa, threads);
    module.def("attention_step", &attention_step, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cos"),
               py::arg("sin"), py::arg("heads"), py::arg("kv_heads"), py::arg("lengths"), py::arg("kv_type") = "fp16",
               isa, threads);
    module.def(
        "exp",
        [](const Floats& x, const std::string& name) {
            const IsaScope scope(name);
            return elementwise(x, [](const float* in, float* out, std::int64_t n) { cpu::kernels().exp(in, out, n); });
        },
        py::arg("x"), isa);
    module.def(
        "silu",
        [](const Floats& x, const std::string& name) {
            const IsaScope scope(name);
            return elementwise(x, [](const float* in, float* out, std::int64_t n) {
                const std::vector<float> ones(static_cast<std::size_t>(n), 1.0f);
                cpu::kernels().swiglu(in, ones.data(), out, n);
            });
        },
        py::arg("x"), isa);
    module.def("cgroup_quota", &cpu::cgroup_quota, py::arg("root"));
    module.def("half_to_float", [](int half) { return cpu::half_to_float(static_cast<std::uint16_t>(half)); });
    module.def("float_to_half", [](float value) { return cpu::float_to_half(value); });
    bind_bench(module);
}
