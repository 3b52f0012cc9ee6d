// SPDX-License-Identifier: Apache-2.0
// The ops around the matmuls: embedding, norms, activation quantization, rotary positions with the cache append.
#include "../ops.hpp"

#include <cstring>

#include "activations.hpp"
#include "cpu_info.hpp"
#include "kv_shape.hpp"
#include "quantize.hpp"

namespace cnl::ops {
namespace {

/// Spans of one token that are worth handing to another thread.
constexpr std::int64_t kSpanGrain = 8;

/// Threads agree on these without reading `d`, whose sizes one of them is writing.
struct Sizes {
    std::int64_t m, cols, padded, spans;
    Tiles tiles;
    Sizes(std::int64_t tokens, std::int64_t columns)
        : m(tokens),
          cols(columns),
          padded(Activations::Data::padded(columns)),
          spans(Activations::Data::spans(columns)),
          tiles(tokens) {}
};

void set_sizes(Team& team, Activations::Data& d, const Sizes& sizes) {
    if (team.index() != 0) return;
    d.m = sizes.m;
    d.cols = sizes.cols;
}

cpu::QuantizeSpan span_at(Activations::Data& d, const Sizes& z, std::int64_t token, std::int64_t span) {
    const std::int64_t tile = z.tiles.of(token), begin = z.tiles.begin(tile), size = z.tiles.size(tile);
    const std::int64_t slot = token - begin;
    cpu::QuantizeSpan s{};
    s.cols = static_cast<int>(std::min<std::int64_t>(cpu::kSpan, z.cols - span * cpu::kSpan));
    s.tokens = static_cast<int>(size);
    s.values = d.values.get() + begin * z.padded + (span * 8 * size + slot) * 32;
    s.sums32 = d.sums32.get() + begin * z.padded / 32 + span * 8 * size + slot;
    s.sums64 = d.sums64.get() + begin * z.padded / 64 + span * 4 * size + slot;
    s.scale = d.scales.get() + begin * z.spans + span * size + slot;
    return s;
}

void quantize_spans(Activations::Data& d, const Sizes& z, const float* x, const float* gamma, float factor,
                    std::int64_t token, std::int64_t begin, std::int64_t end) {
    const cpu::Kernels& kernels = cpu::kernels();
    for (std::int64_t i = begin; i < end; ++i) {
        cpu::QuantizeSpan s = span_at(d, z, token, i);
        s.x = x + token * z.cols + i * cpu::kSpan;
        s.gamma = gamma ? gamma + i * cpu::kSpan : nullptr;
        s.factor = factor;
        kernels.quantize_span(s);
    }
}

}  // namespace

Activations::Activations(std::int64_t max_tokens, std::int64_t max_cols) : data_(new Data(max_tokens, max_cols)) {}
Activations::~Activations() { delete data_; }

void embed(Team& team, const Weight& table, const std::int32_t* tokens, std::int64_t m, float* x) {
    team.parallel_for(m, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i)
            dequantize_row(*table.scheme, table.data, table.cols, tokens[i], x + i * table.cols);
    });
}

void rms_norm(Team& team, const float* x, const float* gamma, float eps, std::int64_t m, std::int64_t cols,
              Activations& out) {
    Activations::Data& d = out.data();
    const Sizes sizes(m, cols);
    set_sizes(team, d, sizes);
    team.parallel_for(m, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const float factor = cpu::kernels().rms_factor(x + i * cols, cols, eps);
            quantize_spans(d, sizes, x, gamma, factor, i, 0, sizes.spans);
        }
    });
}

void quantize(Team& team, const float* x, std::int64_t m, std::int64_t cols, Activations& out) {
    Activations::Data& d = out.data();
    const Sizes sizes(m, cols);
    set_sizes(team, d, sizes);
    const std::int64_t spans = sizes.spans;
    team.parallel_for(m * spans, kSpanGrain, [&](std::int64_t begin, std::int64_t end) {
        while (begin < end) {
            const std::int64_t token = begin / spans, first = begin % spans;
            const std::int64_t last = std::min(spans, first + end - begin);
            quantize_spans(d, sizes, x, nullptr, 1.0f, token, first, last);
            begin += last - first;
        }
    });
}

void rope_append(Team& team, float* q, float* k, const float* v, const float* cos, const float* sin, int heads,
                 std::span<const SequenceRows> sequences, const KvCache& cache, int layer) {
    const KvLayout& layout = cache.layout();
    const int d = layout.head_dim, half = d / 2, kv_heads = layout.kv_heads;
    const cpu::KvShape shape = kv_shape(layout);
    const cpu::Kernels& kernels = cpu::kernels();
    std::int64_t rows = 0;
    for (const SequenceRows& s : sequences) rows += s.count;
    team.parallel_for(rows, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t n = begin; n < end; ++n) {
            const auto [sequence, i] = find_row(sequences, n);
            const std::int64_t row = sequence->row + i, position = sequence->start + i;
            const float *c = cos + row * half, *s = sin + row * half;
            for (int h = 0; h < heads; ++h) kernels.rope(q + (row * heads + h) * d, c, s, half);
            const std::int32_t page = sequence->pages[position / KvLayout::kPage];
            for (int h = 0; h < kv_heads; ++h) {
                float* key = k + (row * kv_heads + h) * d;
                kernels.rope(key, c, s, half);
                kernels.kv_store(shape, cache.slab(page, layer, h), static_cast<int>(position % KvLayout::kPage), key,
                                 v + (row * kv_heads + h) * d);
            }
        }
    });
}

void gather_rows(Team& team, const float* x, const std::int32_t* rows, std::int64_t count, std::int64_t cols,
                 float* out) {
    team.parallel_for(count, 8, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i)
            std::memcpy(out + i * cols, x + rows[i] * cols, static_cast<std::size_t>(cols) * sizeof(float));
    });
}

}  // namespace cnl::ops
