// SPDX-License-Identifier: Apache-2.0
// Kernels on their own, over the values at which processors differ: exponentials of special values, all halves, floats
// next to and between halves, packing of weights.
#include <cmath>
#include <limits>
#include <stdexcept>

#include "check.hpp"
#include "cpu/cpu_info.hpp"
#include "cpu/half.hpp"
#include "cpu/quantize.hpp"

namespace cnl::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

float as_float(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

/// Zeros, subnormal numbers, the ends of exp's range, infinities, NaN, and enough others for a multiple of 16.
std::vector<float> special_values() {
    std::vector<float> all{0.0f,       -0.0f,   1e-45f,  -1e-45f,  1e-38f,      -1e-38f,   3e38f, -3e38f, kInfinity,
                           -kInfinity, kNan,    -kNan,   88.37f,   88.36f,      88.38f,    89.0f, 500.f,  -87.33f,
                           -87.32f,    -87.34f, -103.0f, 0.34657f, -0.3465736f, 0.693147f, 1.0f,  -1.0f};
    Random random(1);
    while (all.size() < 4096) all.push_back(random.uniform() * 100.0f);
    return all;
}

void element_wise() {
    const std::vector<float> x = special_values();
    const auto n = static_cast<std::int64_t>(x.size());
    check("exp", [&](ThreadPool&, Output& out) {
        std::vector<float> y(x.size());
        cpu::kernels().exp(x.data(), y.data(), n);
        out.floats(y);
    });
    std::vector<float> up = Random(2).uniforms(n);
    up[40] = kInfinity;
    up[41] = kNan;
    check("swiglu", [&](ThreadPool&, Output& out) {
        std::vector<float> y(x.size());
        cpu::kernels().swiglu(x.data(), up.data(), y.data(), n);
        out.floats(y);
    });
    check("rms_factor", [&](ThreadPool&, Output& out) {
        std::vector<float> factors;
        const std::vector<float> row = Random(3).uniforms(300, 3.0f);
        for (std::int64_t cols = 1; cols <= 300; ++cols)
            factors.push_back(cpu::kernels().rms_factor(row.data(), cols, 1e-5f));
        out.floats(factors);
    });
}

/// What `cnllama bench` times: the sum of the lines read, and that the peaks run at all.
void benchmarks() {
    constexpr std::int64_t kLines = 34;
    AlignedArray<std::uint8_t> lines(kLines * layout::kLineBytes);
    Random random(4);
    for (std::int64_t i = 0; i < kLines * layout::kLineBytes; ++i)
        lines.get()[i] = static_cast<std::uint8_t>(random.word());
    check("read_lines and peaks", [&](ThreadPool&, Output& out) {
        const std::uint64_t sum = cpu::kernels().read_lines(lines.get(), kLines, cpu::stream_ahead(1));
        const bool counted = cpu::kernels().int8_peak(7) >= 7 * 16 && cpu::kernels().float_peak(7) >= 7 * 16;
        out.bytes(&sum, sizeof sum);
        out.bytes(&counted, sizeof counted);
    });
}

/// fp16 -> float: every bit pattern once as the scale of a row of ones.
void every_half() {
    const layout::Scheme& scheme = layout::kSchemes[0];
    constexpr std::int64_t kRows = 1 << 16;
    Matrix matrix(scheme, kRows, 64);
    for (std::int64_t row = 0; row < kRows; ++row) {
        matrix.set_scale(row, 0, static_cast<std::uint16_t>(row), 0);
        matrix.set_value(row, 0, 9);
    }
    const std::vector<float> one(64, 1.0f);
    check("half to float, all 65536", [&](ThreadPool& pool, Output& out) {
        ops::Activations x(1, 64);
        std::vector<float> y(kRows);
        const ops::Projection projections[] = {{&matrix.weight, nullptr, y.data(), kRows}};
        pool.run([&](Team& team) {
            ops::quantize(team, one.data(), 1, 64, x);
            ops::matmul(team, x, projections);
        });
        out.floats(y);
    });
}

/// float -> fp16: every half, its neighbours and the ties between halves, as keys of a cache slab.
void floats_to_halves() {
    constexpr int kDim = 1024;
    KvLayout layout;
    layout.head_dim = kDim;
    cpu::KvShape shape{};
    shape.head_dim = shape.padded_dim = kDim;
    shape.v_offset = static_cast<std::int64_t>(layout.v_offset());
    const std::int32_t offsets[] = {0, 1, -1, 0x1000, 0x0fff, 0x1001};  // of the bits of a float
    check("float to half, around all 65536", [&](ThreadPool&, Output& out) {
        std::vector<std::uint16_t> slab(layout.slab_bytes() / 2);
        for (const std::int32_t offset : offsets) {
            for (int position = 0; position < KvLayout::kPage; ++position) {
                std::vector<float> row(kDim);
                for (int j = 0; j < kDim; ++j) {
                    const auto half = static_cast<std::uint32_t>(position * kDim + j);
                    const std::uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u;
                    const float subnormal = static_cast<float>(half & 0x3ffu) * 0x1p-24f;
                    std::uint32_t bits = sign | (exponent + 112) << 23 | (half & 0x3ffu) << 13;
                    if (exponent == 0) std::memcpy(&bits, &subnormal, 4);
                    row[static_cast<std::size_t>(j)] = as_float(bits + static_cast<std::uint32_t>(offset));
                }
                cpu::kernels().kv_store(shape, reinterpret_cast<std::uint8_t*>(slab.data()), position, row.data(),
                                        row.data());
            }
            out.halves(slab.data(), slab.size());
        }
    });
}

/// Whether row `row` as the layout locates every value is what dequantize_row made of it.
bool values_are_where_they_belong(const layout::Scheme& scheme, const std::uint8_t* packed, std::int64_t cols,
                                  std::int64_t row, const std::vector<float>& expected) {
    for (std::int64_t k = 0; k < cols; ++k) {
        const layout::Position at = layout::locate(scheme, cols, row, k);
        std::uint16_t scale, minimum = 0;
        std::memcpy(&scale, packed + at.scale, 2);
        if (scheme.asymmetric) std::memcpy(&minimum, packed + at.scale + at.min_offset, 2);
        const auto q = static_cast<float>(layout::unpack_value(scheme, packed, at) - scheme.zero());
        const float value = std::fma(cpu::half_to_float(scale), q, cpu::half_to_float(minimum));
        if (value != expected[static_cast<std::size_t>(k)]) return false;
    }
    return true;
}

void weights() {
    for (const layout::Scheme& scheme : layout::kSchemes) {
        constexpr std::int64_t kRows = 37, kCols = 300;
        std::vector<float> w = Random(7).uniforms(kRows * kCols);
        for (std::int64_t k = 0; k < kCols; ++k) w[static_cast<std::size_t>(k)] = 0.0f;  // a row of nothing
        w[static_cast<std::size_t>(3 * kCols + 70)] = 900.0f;                            // an outlier
        std::vector<float> importance = Random(8).uniforms(kCols);
        for (float& x : importance) x *= x;
        const float* const choices[] = {nullptr, importance.data()};
        for (const float* weights : choices) {
            const std::string how = weights ? " by importance" : "";
            check("quantize_weights " + std::string(scheme.name) + how, [&](ThreadPool& pool, Output& out) {
                const auto size = static_cast<std::size_t>(layout::packed_bytes(scheme, kRows, kCols));
                std::vector<std::uint8_t> packed(size);
                QuantizeError error;
                pool.run([&](Team& team) {
                    const QuantizeError mine =
                        quantize_weights(team, w.data(), kRows, kCols, scheme, weights, packed.data());
                    if (team.index() == 0) error = mine;
                });
                out.bytes(packed.data(), size);
                out.bytes(&error.squared_error, 8);
                out.bytes(&error.squares, 8);
                std::vector<float> row(kCols);
                dequantize_row(scheme, packed.data(), kCols, 5, row.data());
                out.floats(row);
                const bool found = values_are_where_they_belong(scheme, packed.data(), kCols, 5, row);
                if (!found) throw std::logic_error("locate and dequantize_row disagree");
            });
        }
    }
}

}  // namespace

void kernel_cases() {
    element_wise();
    benchmarks();
    every_half();
    floats_to_halves();
    weights();
}

}  // namespace cnl::test
