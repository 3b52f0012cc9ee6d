// SPDX-License-Identifier: Apache-2.0
// The frame of the stand-alone kernel test: numbers that are the same on every machine, and a check that runs one case
// on every instruction set and number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "cpu/activations.hpp"
#include "layout.hpp"
#include "ops.hpp"
#include "threads.hpp"

namespace cnl::test {

/// splitmix64. Only integers and exact float operations, so every machine draws the same numbers.
class Random {
 public:
    explicit Random(std::uint64_t seed) : state_(seed) {}
    std::uint32_t word() {
        std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        return static_cast<std::uint32_t>((z ^ z >> 31) >> 32);
    }
    int below(int n) { return static_cast<int>(word() % static_cast<std::uint32_t>(n)); }
    /// In [-1, 1), a multiple of 2^-23.
    float uniform() { return static_cast<float>(static_cast<std::int32_t>(word() >> 8) - (1 << 23)) * 0x1p-23f; }
    std::vector<float> uniforms(std::int64_t count, float scale = 1.0f) {
        std::vector<float> all(static_cast<std::size_t>(count));
        for (float& x : all) x = uniform() * scale;
        return all;
    }

 private:
    std::uint64_t state_;
};

/// What a case computed. Every NaN is stored as one and the same: its bits are the processor's business.
class Output {
 public:
    void floats(std::span<const float> values) {
        for (const float x : values) {
            std::uint32_t bits = 0x7fc00000;
            if (x == x) std::memcpy(&bits, &x, 4);
            append(&bits, 4);
        }
    }
    /// fp16 values among others that are not: NaN is not looked for.
    void bytes(const void* data, std::size_t count) { append(data, count); }
    void halves(const std::uint16_t* values, std::size_t count) {
        for (std::size_t i = 0; i < count; ++i) {
            const bool nan = (values[i] & 0x7c00) == 0x7c00 && (values[i] & 0x3ff) != 0;
            const std::uint16_t bits = nan ? 0x7e00 : values[i];
            append(&bits, 2);
        }
    }
    const std::vector<std::uint8_t>& all() const { return bytes_; }

 private:
    void append(const void* data, std::size_t count) {
        const auto* p = static_cast<const std::uint8_t*>(data);
        bytes_.insert(bytes_.end(), p, p + count);
    }
    std::vector<std::uint8_t> bytes_;
};

/// Computes a case with the kernels in use.
using Case = std::function<void(ThreadPool&, Output&)>;

/// Runs the case with every table of kernels and 1 and 3 threads, compares with scalar and 1 thread, and prints
/// "ok" or "FAIL", the name and a hash of the scalar result.
void check(const std::string& name, const Case& run);

/// A packed matrix and the Weight that points to it.
struct Matrix {
    /// Stands for zeros.
    Matrix(const layout::Scheme& scheme, std::int64_t rows, std::int64_t cols);
    /// All values and scales drawn at random; or, with `extreme`, the smallest and the largest value in turn.
    Matrix(Random& random, const layout::Scheme& scheme, std::int64_t rows, std::int64_t cols, bool extreme = false);
    AlignedArray<std::uint8_t> data;
    Weight weight;

    void set_scale(std::int64_t row, std::int64_t col, std::uint16_t scale, std::uint16_t minimum);
    void set_value(std::int64_t row, std::int64_t col, int q);
};

/// Everything that later ops read of the activations.
void dump(const ops::Activations& activations, Output& out);

void kernel_cases();
void op_cases();
void attention_cases();
void model_case();

}  // namespace cnl::test
