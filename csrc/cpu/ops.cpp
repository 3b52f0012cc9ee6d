// SPDX-License-Identifier: Apache-2.0
// The ops around the matmuls: embedding, norms, activation quantization, rotary positions with the cache append.
#include "../ops.hpp"

#include <cstring>

#include "activations.hpp"
#include "cpu_info.hpp"
#include "kv_shape.hpp"
#include "quantize.hpp"

namespace cnl {

SpanWriter SpanWriter::shared(Team& team, ops::Activations::Data& d, std::int64_t m, std::int64_t cols) {
    const auto index = static_cast<std::size_t>(team.index());
    if (index < d.own.size()) d.own[index]->current = &d.shared;
    if (index == 0) {
        d.shared.m = m;
        d.shared.cols = cols;
    }
    return SpanWriter(d.shared, m, cols);
}

void SpanWriter::write(const float* x, const float* gamma, float factor, std::int64_t token, std::int64_t first,
                       std::int64_t last) const {
    const std::int64_t tile = tiles.of(token), begin = tiles.begin(tile), size = tiles.size(tile);
    const std::int64_t slot = token - begin;
    const cpu::Kernels& kernels = cpu::kernels();
    for (std::int64_t span = first; span < last; ++span) {
        cpu::QuantizeSpan s{};
        s.x = x + token * cols + span * cpu::kSpan;
        s.gamma = gamma ? gamma + span * cpu::kSpan : nullptr;
        s.factor = factor;
        s.cols = static_cast<int>(std::min<std::int64_t>(cpu::kSpan, cols - span * cpu::kSpan));
        s.tokens = static_cast<int>(size);
        s.values = data.values.get() + begin * padded + (span * 8 * size + slot) * 32;
        s.sums32 = data.sums32.get() + begin * padded / 32 + span * 8 * size + slot;
        s.sums64 = data.sums64.get() + begin * padded / 64 + span * 4 * size + slot;
        s.whole64 = data.whole64.get() + begin * padded / 64 + span * 4 * size + slot;
        s.scale = data.scales.get() + begin * spans + span * size + slot;
        kernels.quantize_span(s);
    }
}

namespace ops {
namespace {

/// Spans of one token that are worth handing to another thread.
constexpr std::int64_t kSpanGrain = 8;

/// This thread's own copy, which no other sees.
SpanWriter own_copy(Team& team, Activations::Data& d, std::int64_t m, std::int64_t cols) {
    Activations::Data::Own& own = *d.own[static_cast<std::size_t>(team.index())];
    own.data.m = m;
    own.data.cols = cols;
    own.current = &own.data;
    return SpanWriter(own.data, m, cols);
}

}  // namespace

Activations::Activations(std::int64_t max_tokens, std::int64_t max_cols, int threads)
    : data_(new Data(max_tokens, max_cols, threads)) {}
Activations::~Activations() { delete data_; }

void run_step(ThreadPool& pool, const StepInputs&, const std::function<void(Team&)>& forward) { pool.run(forward); }

void embed(Team& team, const Weight& table, const std::int32_t* tokens, std::int64_t m, float* x) {
    team.parallel_for(m, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i)
            dequantize_row(*table.scheme, table.data, table.cols, tokens[i], x + i * table.cols);
    });
}

void rms_norm(Team& team, const float* x, const float* gamma, float eps, std::int64_t m, std::int64_t cols,
              Activations& out) {
    const auto normalize = [&](const SpanWriter& spans, std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i)
            spans.write(x, gamma, cpu::kernels().rms_factor(x + i * cols, cols, eps), i, 0, spans.spans);
    };
    if (out.data().has_own(team, m)) {
        normalize(own_copy(team, out.data(), m, cols), 0, m);
        return;
    }
    const SpanWriter spans = SpanWriter::shared(team, out.data(), m, cols);
    team.parallel_for(m, 1, [&](std::int64_t begin, std::int64_t end) { normalize(spans, begin, end); });
}

void quantize(Team& team, const float* x, std::int64_t m, std::int64_t cols, Activations& out) {
    if (out.data().has_own(team, m)) {
        const SpanWriter spans = own_copy(team, out.data(), m, cols);
        for (std::int64_t i = 0; i < m; ++i) spans.write(x, nullptr, 1.0f, i, 0, spans.spans);
        return;
    }
    const SpanWriter spans = SpanWriter::shared(team, out.data(), m, cols);
    team.parallel_for(m * spans.spans, kSpanGrain, [&](std::int64_t begin, std::int64_t end) {
        while (begin < end) {
            const std::int64_t token = begin / spans.spans, first = begin % spans.spans;
            const std::int64_t last = std::min(spans.spans, first + end - begin);
            spans.write(x, nullptr, 1.0f, token, first, last);
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

}  // namespace ops
}  // namespace cnl
