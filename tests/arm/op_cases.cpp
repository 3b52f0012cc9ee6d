// SPDX-License-Identifier: Apache-2.0
// The ops around the matmuls and the matmuls, over numbers of tokens, rows and columns that fit no tile.
#include <limits>

#include "check.hpp"

namespace cnl::test {
namespace {

std::string shape_name(const std::string& op, std::int64_t m, std::int64_t cols) {
    return op + " m=" + std::to_string(m) + " cols=" + std::to_string(cols);
}

void quantize() {
    const std::int64_t shapes[][2] = {{1, 64}, {1, 5}, {2, 300}, {5, 1000}, {7, 96}, {12, 257}, {13, 513}, {33, 256}};
    for (const auto [m, cols] : shapes) {
        const std::vector<float> x = Random(11).uniforms(m * cols, 5.0f), gamma = Random(12).uniforms(cols);
        check(shape_name("quantize", m, cols), [&, m = m, cols = cols](ThreadPool& pool, Output& out) {
            ops::Activations a(m, cols);
            pool.run([&](Team& team) { ops::quantize(team, x.data(), m, cols, a); });
            dump(a, out);
        });
        check(shape_name("rms_norm", m, cols), [&, m = m, cols = cols](ThreadPool& pool, Output& out) {
            ops::Activations a(m, cols);
            pool.run([&](Team& team) { ops::rms_norm(team, x.data(), gamma.data(), 1e-6f, m, cols, a); });
            dump(a, out);
        });
    }
}

/// Ties between integers, subnormal numbers, nothing but zeros, infinity, NaN: a span of 256 each.
void quantize_special() {
    constexpr std::int64_t kCols = 5 * 256;
    std::vector<float> x(kCols, 0.0f);
    for (int i = 0; i < 256; ++i) x[static_cast<std::size_t>(i)] = static_cast<float>(i - 127) * 0.5f;
    for (int i = 256; i < 512; ++i) x[static_cast<std::size_t>(i)] = static_cast<float>(i) * 1e-43f;
    x[3 * 256 + 17] = std::numeric_limits<float>::infinity();
    x[3 * 256 + 18] = -1.0f;
    x[4 * 256 + 200] = std::numeric_limits<float>::quiet_NaN();
    x[4 * 256 + 201] = 2.0f;
    check("quantize special values", [&](ThreadPool& pool, Output& out) {
        ops::Activations a(1, kCols);
        pool.run([&](Team& team) { ops::quantize(team, x.data(), 1, kCols, a); });
        dump(a, out);
    });
}

/// Two matrices of different rows at once, one with a bias.
void matmul(const layout::Scheme& scheme, std::int64_t m, std::int64_t cols, bool extreme) {
    Random random(static_cast<std::uint64_t>(100 * m + cols));
    const Matrix first(random, scheme, 50, cols, extreme);
    const Matrix second(random, scheme, 33, cols, extreme);
    const std::vector<float> bias = random.uniforms(50);
    std::vector<float> x = random.uniforms(m * cols);
    if (extreme)
        for (float& v : x) v = v < 0 ? -1.0f : 1.0f;
    const std::string op = "matmul " + std::string(scheme.name) + (extreme ? " extreme" : "");
    check(shape_name(op, m, cols), [&](ThreadPool& pool, Output& out) {
        ops::Activations a(m, cols, pool.size());
        std::vector<float> y(static_cast<std::size_t>(m * 50)), z(static_cast<std::size_t>(m * 33));
        const ops::Projection projections[] = {{&first.weight, bias.data(), y.data(), 50},
                                               {&second.weight, nullptr, z.data(), 33}};
        pool.run([&](Team& team) {
            ops::quantize(team, x.data(), m, cols, a);
            ops::matmul(team, a, projections);
        });
        out.floats(y);
        out.floats(z);
    });
}

void matmul_add(const layout::Scheme& scheme, std::int64_t m) {
    constexpr std::int64_t kRows = 70, kCols = 352;
    Random random(21);
    const Matrix w(random, scheme, kRows, kCols);
    const std::vector<float> x = random.uniforms(m * kCols), bias = random.uniforms(kRows);
    const std::vector<float> residual = random.uniforms(m * kRows);
    check(shape_name("matmul_add " + std::string(scheme.name), m, kCols), [&](ThreadPool& pool, Output& out) {
        ops::Activations a(m, kCols, pool.size());
        std::vector<float> y = residual;
        pool.run([&](Team& team) {
            ops::quantize(team, x.data(), m, kCols, a);
            ops::matmul_add(team, a, w.weight, bias.data(), y.data());
        });
        out.floats(y);
    });
}

void matmul_swiglu(const layout::Scheme& scheme, std::int64_t m) {
    constexpr std::int64_t kRows = 300, kCols = 128;
    Random random(31);
    const Matrix gate(random, scheme, kRows, kCols), up(random, scheme, kRows, kCols);
    const std::vector<float> x = random.uniforms(m * kCols, 40.0f), bias = random.uniforms(kRows);
    check(shape_name("matmul_swiglu " + std::string(scheme.name), m, kCols), [&](ThreadPool& pool, Output& out) {
        ops::Activations a(m, kCols, pool.size()), quantized(m, kRows);
        std::vector<float> h(static_cast<std::size_t>(m * kRows));
        pool.run([&](Team& team) {
            ops::quantize(team, x.data(), m, kCols, a);
            ops::matmul_swiglu(team, a, gate.weight, bias.data(), up.weight, nullptr, h.data(), &quantized);
        });
        out.floats(h);
        dump(quantized, out);
    });
}

void rows() {
    constexpr std::int64_t kCols = 300;
    for (const layout::Scheme& scheme : layout::kSchemes) {
        Random random(41);
        const Matrix table(random, scheme, 20, kCols);
        check("embed " + std::string(scheme.name), [&](ThreadPool& pool, Output& out) {
            const std::int32_t tokens[] = {3, 19, 0, 3, 11};
            std::vector<float> x(5 * kCols), last(2 * kCols);
            pool.run([&](Team& team) {
                ops::embed(team, table.weight, tokens, 5, x.data());
                const std::int32_t chosen[] = {4, 1};
                ops::gather_rows(team, x.data(), chosen, 2, kCols, last.data());
            });
            out.floats(x);
            out.floats(last);
        });
    }
}

}  // namespace

void op_cases() {
    quantize();
    quantize_special();
    rows();
    for (const layout::Scheme& scheme : layout::kSchemes) {
        const std::int64_t tail = scheme.group == 32 ? 288 : 300;  // a superblock of one group, one of 44 columns
        matmul(scheme, 13, 1130, false);                           // the columns are cut
        matmul(scheme, 1, 1130, false);
        const bool own_kernels = (scheme.bits == 4 || scheme.bits == 8) && scheme.group < 128;
        if (!own_kernels) {  // what they are expanded to is multiplied as the others
            for (const std::int64_t m : {3, 12, 18}) matmul(scheme, m, tail, false);
            matmul(scheme, 6, 512, true);
            continue;
        }
        for (std::int64_t m = 1; m <= 12; ++m) matmul(scheme, m, tail, false);
        for (const std::int64_t m : {13, 18, 33}) matmul(scheme, m, tail, false);
        for (const std::int64_t m : {1, 2, 6, 13}) matmul(scheme, m, 512, true);
        for (const std::int64_t m : {1, 5, 13}) {
            matmul_add(scheme, m);
            matmul_swiglu(scheme, m);
        }
    }
}

}  // namespace cnl::test
