// SPDX-License-Identifier: Apache-2.0
// Runs every op with every instruction set of this machine and compares the results bit for bit with plain C++:
//
//   kernels_test [--isas | PREFIX]      all cases, only the names of the instruction sets, or cases that begin so
//
// One line a case, with a hash of its result. The hashes of two machines must be the same: tests/test_neon.py compares
// those of x86-64 with those of aarch64 under emulation.
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>

#include "check.hpp"
#include "cpu/cpu_info.hpp"

namespace cnl::test {
namespace {

std::string prefix;
int cases = 0, failures = 0;

std::uint64_t hash(const std::vector<std::uint8_t>& bytes) {  // FNV-1a
    std::uint64_t h = 0xcbf29ce484222325u;
    for (const std::uint8_t byte : bytes) h = (h ^ byte) * 0x100000001b3u;
    return h;
}

std::vector<std::uint8_t> compute(const Case& run, const std::string& isa, ThreadPool& pool) {
    cpu::use_isa(isa);
    Output out;
    run(pool, out);
    return out.all();
}

void report(const std::string& isa, int threads, const std::vector<std::uint8_t>& got,
            const std::vector<std::uint8_t>& expected) {
    std::size_t at = 0;
    while (at < got.size() && at < expected.size() && got[at] == expected[at]) ++at;
    std::printf("     %s, %d threads: %zu bytes, %zu expected; they differ from byte %zu on\n", isa.c_str(), threads,
                got.size(), expected.size(), at);
}

}  // namespace

void check(const std::string& name, const Case& run) {
    static ThreadPool one(1), three(3);
    if (name.rfind(prefix, 0) != 0) return;
    const std::vector<std::uint8_t> expected = compute(run, "scalar", one);
    bool good = !expected.empty();
    for (const std::string& isa : cpu::supported_isas())
        for (ThreadPool* pool : {&one, &three}) {
            const std::vector<std::uint8_t> got = compute(run, isa, *pool);
            if (got == expected) continue;
            good = false;
            report(isa, pool->size(), got, expected);
        }
    ++cases;
    failures += good ? 0 : 1;
    std::printf("%-4s %-44s %016llx\n", good ? "ok" : "FAIL", name.c_str(),
                static_cast<unsigned long long>(hash(expected)));
    std::fflush(stdout);
}

Matrix::Matrix(const layout::Scheme& scheme, std::int64_t rows, std::int64_t cols)
    : data(layout::packed_bytes(scheme, rows, cols)), weight{&scheme, rows, cols, data.get()} {
    std::memset(data.get(), 0, static_cast<std::size_t>(layout::packed_bytes(scheme, rows, cols)));
    for (std::int64_t row = 0; row < layout::padded_rows(rows); ++row)
        for (std::int64_t col = 0; col < layout::padded_cols(scheme, cols); ++col) set_value(row, col, scheme.zero());
}

void Matrix::set_scale(std::int64_t row, std::int64_t col, std::uint16_t scale, std::uint16_t minimum) {
    const layout::Position at = layout::locate(*weight.scheme, weight.cols, row, col);
    std::memcpy(data.get() + at.scale, &scale, 2);
    if (weight.scheme->asymmetric) std::memcpy(data.get() + at.scale + at.min_offset, &minimum, 2);
}

void Matrix::set_value(std::int64_t row, std::int64_t col, int q) {
    layout::pack_value(*weight.scheme, data.get(), layout::locate(*weight.scheme, weight.cols, row, col), q);
}

Matrix::Matrix(Random& random, const layout::Scheme& scheme, std::int64_t rows, std::int64_t cols, bool extreme)
    : Matrix(scheme, rows, cols) {
    const int lowest = scheme.bits == 8 ? 1 : 0, highest = (1 << scheme.bits) - 1;
    // Sign and mantissa of any kind, 2^-12 .. 2^-6; extreme ones 2^-8.
    const auto scale = [&] {
        return static_cast<std::uint16_t>(extreme ? 0x1c00 : (random.word() & 0x83ff) | (3 + random.below(7)) << 10);
    };
    for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t col = 0; col < cols; ++col) {
            if (col % scheme.group == 0) {
                const std::uint16_t step = scale();
                set_scale(row, col, step, scale());
            }
            const bool high = (row + col / 64) % 2 != 0;
            set_value(row, col, extreme ? (high ? highest : lowest) : lowest + random.below(highest - lowest + 1));
        }
}

void dump(const ops::Activations& activations, Output& out) {
    const ActivationData& d = activations.data().shared;
    const auto padded = static_cast<std::size_t>(d.m * ActivationData::padded(d.cols));
    const auto sum = [&](std::int32_t stored) {  // each table has a form of its own
        const std::int32_t whole = cpu::kernels().whole_sum(stored);
        out.bytes(&whole, sizeof whole);
    };
    out.bytes(&d.m, sizeof d.m);
    out.bytes(&d.cols, sizeof d.cols);
    out.bytes(d.values.get(), padded);
    for (std::size_t i = 0; i < padded / 32; ++i) sum(d.sums32.get()[i]);
    for (std::size_t i = 0; i < padded / 64; ++i) sum(d.sums64.get()[i]);
    out.floats({d.scales.get(), static_cast<std::size_t>(d.m * ActivationData::spans(d.cols))});
}

}  // namespace cnl::test

int main(int count, char** arguments) {
    using namespace cnl;
    try {
        std::string isas = "isas:";
        for (const std::string& isa : cpu::supported_isas()) isas += " " + isa;
        std::printf("%s\n", isas.c_str());
        if (count > 2) throw std::invalid_argument("usage: kernels_test [--isas | PREFIX]");
        if (count == 2) test::prefix = arguments[1];
        if (test::prefix == "--isas") return 0;
        test::kernel_cases();
        test::op_cases();
        test::attention_cases();
        test::model_case();
        std::printf("%d cases, %d failed\n", test::cases, test::failures);
        return test::failures == 0 && test::cases > 0 ? 0 : 1;
    } catch (const std::exception& error) {
        std::printf("FAIL %s\n", error.what());
        return 1;
    }
}
