// SPDX-License-Identifier: Apache-2.0
// Rotary positions, the cache append and attention: fp16 and int8 pages, shared key heads, odd head sizes, prefill and
// decode, several sequences at once. Cache memory that was never written holds NaN, which must not be seen.
#include <sstream>

#include "check.hpp"
#include "kv_cache.hpp"

namespace cnl::test {
namespace {

struct Heads {
    int heads, kv_heads, dim;
};

/// How many positions a sequence has and how many rows follow.
struct Part {
    std::int64_t history, count;
};

/// Some sequences in one cache, with the q, k and v of their rows.
struct Batch {
    Heads h;
    std::vector<Part> parts;
    KvType type;
    std::int64_t rows = 0, longest = 0;

    Batch(const Heads& heads, std::vector<Part> all, KvType kv_type) : h(heads), parts(std::move(all)), type(kv_type) {
        for (const Part& part : parts) {
            rows += part.count;
            longest = std::max(longest, part.history + part.count);
        }
    }
    std::string name(const std::string& op) const {
        std::ostringstream text;
        text << op << (type == KvType::int8 ? " int8 " : " fp16 ") << h.heads << '/' << h.kv_heads << 'x' << h.dim;
        for (const Part& part : parts) text << ' ' << part.history << '+' << part.count;
        return text.str();
    }
    KvLayout layout() const { return {type, 1, h.kv_heads, h.dim}; }
    std::int64_t pages() const {
        return static_cast<std::int64_t>(parts.size()) * ((longest + KvLayout::kPage - 1) / KvLayout::kPage);
    }
};

/// Angles for `count` rows: any numbers will do.
struct Rotation {
    std::vector<float> cos, sin;
    Rotation(Random& random, std::int64_t count, int dim)
        : cos(random.uniforms(count * dim / 2)), sin(random.uniforms(count * dim / 2)) {}
};

/// A cache whose sequences hold their histories, as the kernels in use write them.
class FilledCache {
 public:
    FilledCache(const Batch& batch, ThreadPool& pool) : cache(batch.layout(), batch.pages()) {
        const KvLayout& layout = cache.layout();
        for (std::int64_t page = 0; page < batch.pages(); ++page)
            for (int head = 0; head < layout.kv_heads; ++head)
                std::memset(cache.slab(static_cast<std::int32_t>(page), 0, head), 0xff, layout.slab_bytes());
        Random random(51);
        std::int64_t row = 0;
        for (const Part& part : batch.parts) {
            const int id = cache.open();
            cache.extend(id, part.history + part.count);
            sequences.push_back({row, part.count, part.history, cache.page_table(id)});
            row += part.count;
            if (part.history == 0) continue;
            const std::int64_t n = part.history, kv = batch.h.kv_heads * batch.h.dim;
            std::vector<float> q = random.uniforms(n * batch.h.heads * batch.h.dim), k = random.uniforms(n * kv, 2.0f);
            const std::vector<float> v = random.uniforms(n * kv, 3.0f);
            const Rotation r(random, n, batch.h.dim);
            const SequenceRows before[] = {{0, n, 0, sequences.back().pages}};
            pool.run([&](Team& team) {
                ops::rope_append(team, q.data(), k.data(), v.data(), r.cos.data(), r.sin.data(), batch.h.heads, before,
                                 cache, 0);
            });
        }
    }
    KvCache cache;
    std::vector<SequenceRows> sequences;
};

void rope_append(const Batch& b) {
    check(b.name("rope_append"), [&](ThreadPool& pool, Output& out) {
        FilledCache filled(b, pool);
        Random random(61);
        std::vector<float> q = random.uniforms(b.rows * b.h.heads * b.h.dim);
        std::vector<float> k = random.uniforms(b.rows * b.h.kv_heads * b.h.dim);
        const std::vector<float> v = random.uniforms(b.rows * b.h.kv_heads * b.h.dim);
        const Rotation r(random, b.rows, b.h.dim);
        pool.run([&](Team& team) {
            ops::rope_append(team, q.data(), k.data(), v.data(), r.cos.data(), r.sin.data(), b.h.heads,
                             filled.sequences, filled.cache, 0);
        });
        out.floats(q);
        out.floats(k);
        for (std::int64_t page = 0; page < b.pages(); ++page)
            for (int head = 0; head < b.h.kv_heads; ++head)
                out.bytes(filled.cache.slab(static_cast<std::int32_t>(page), 0, head),
                          filled.cache.layout().slab_bytes());
    });
}

void attention(const Batch& b) {
    check(b.name("attention"), [&](ThreadPool& pool, Output& out) {
        FilledCache filled(b, pool);
        Random random(71);
        const std::int64_t width = b.h.heads * b.h.dim;
        std::vector<float> q = random.uniforms(b.rows * width, 3.0f);
        std::vector<float> k = random.uniforms(b.rows * b.h.kv_heads * b.h.dim);
        const std::vector<float> v = random.uniforms(b.rows * b.h.kv_heads * b.h.dim);
        const Rotation r(random, b.rows, b.h.dim);
        const ops::NewKeys fresh{k.data(), v.data(), r.cos.data(), r.sin.data()};
        std::vector<float> attended(static_cast<std::size_t>(b.rows * width));
        ops::Activations quantized(b.rows, width);
        pool.run([&](Team& team) {
            ops::attention(team, q.data(), b.h.heads, &fresh, filled.sequences, filled.cache, 0, attended.data(),
                           &quantized);
        });
        out.floats(attended);
        dump(quantized, out);
    });
}

}  // namespace

void attention_cases() {
    const Heads shapes[] = {{8, 2, 64}, {3, 3, 80}, {5, 1, 36}, {4, 4, 128}};
    for (const KvType type : {KvType::fp16, KvType::int8})
        for (const Heads& h : shapes) {
            rope_append({h, {{60, 5}, {0, 1}}, type});
            for (const std::vector<Part>& parts : std::vector<std::vector<Part>>{
                     {{0, 1}}, {{0, 70}}, {{255, 3}}, {{600, 1}}, {{250, 20}, {0, 3}, {513, 1}}})
                attention({h, parts, type});
        }
}

}  // namespace cnl::test
