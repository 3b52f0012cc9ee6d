// SPDX-License-Identifier: Apache-2.0
// _core.ops, continued: what bench/ops.py times, and the thread pool's own test.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/activations.hpp"
#include "cpu/cpu_info.hpp"
#include "kv_cache.hpp"
#include "ops.hpp"
#include "threads.hpp"

namespace py = pybind11;

namespace {

using namespace cnl;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// The core's clock from a chain of dependent additions, one a cycle: in a virtual machine no counter tells it.
double clock_hz() {
    constexpr std::int64_t kAdds = 4'000'000;
    double best = 0;
    for (int repeat = 0; repeat < 5; ++repeat) {
        std::uint64_t x = 0;
        const double start = now();
        for (std::int64_t i = 0; i < kAdds; i += 8) {
#if defined(__x86_64__)
            asm volatile(
                "add $1, %0\n\tadd $1, %0\n\tadd $1, %0\n\tadd $1, %0\n\t"
                "add $1, %0\n\tadd $1, %0\n\tadd $1, %0\n\tadd $1, %0"
                : "+r"(x));
#else
            for (int j = 0; j < 8; ++j) {
                ++x;
                asm volatile("" : "+r"(x));
            }
#endif
        }
        best = std::max(best, static_cast<double>(kAdds) / (now() - start));
    }
    return best;
}

/// Multiply-adds a second of `threads` threads at the full rate of the instruction set in use.
double int8_peak(int threads, double seconds) {
    ThreadPool pool(threads);
    std::atomic<std::int64_t> macs{0};
    const double start = now();
    pool.run([&](Team&) {
        std::int64_t mine = 0;
        while (now() - start < seconds) mine += cpu::kernels().int8_peak(20'000);
        macs += mine;
    });
    return static_cast<double>(macs.load()) / (now() - start);
}

/// Random packed matrices [rows, cols] of one scheme, more than the caches hold, and what one op over them costs.
class MatmulBench {
 public:
    MatmulBench(const std::string& scheme, std::int64_t rows, std::int64_t cols, std::int64_t copies, int threads)
        : pool_(threads), rows_(rows), cols_(cols) {
        const layout::Scheme* found = layout::find_scheme(scheme);
        if (!found || rows < 1 || cols < 1 || copies < 1)
            throw std::invalid_argument("MatmulBench needs a known scheme and sizes above 0");
        const std::int64_t bytes = layout::packed_bytes(*found, rows, cols);
        for (std::int64_t i = 0; i < copies; ++i) {
            data_.push_back(std::make_unique<AlignedArray<std::uint8_t>>(bytes));
            weights_.push_back({found, rows, cols, data_.back()->get()});
        }
        fill(bytes);
    }

    py::array_t<std::uint8_t> packed(std::int64_t copy) const {
        const Weight& w = weights_.at(static_cast<std::size_t>(copy));
        return py::array_t<std::uint8_t>(layout::packed_bytes(*w.scheme, rows_, cols_), w.data);
    }

    /// Seconds that one matmul over copy `index` takes, x [m, cols] being quantized already; the result in `out`.
    double run(const py::array_t<float, py::array::c_style>& x, std::int64_t index,
               py::array_t<float, py::array::c_style>& out) {
        if (x.ndim() != 2 || x.shape(1) != cols_ || out.ndim() != 2 || out.shape(0) != x.shape(0) ||
            out.shape(1) != rows_)
            throw std::invalid_argument("x must be [m, cols] and out [m, rows]");
        const std::int64_t m = x.shape(0);
        if (!activations_ || activations_->data().shared.max_tokens < m)
            activations_ = std::make_unique<ops::Activations>(m, cols_, pool_.size());
        const ops::Projection projection{&weights_.at(static_cast<std::size_t>(index)), nullptr, out.mutable_data(),
                                         rows_};
        double start = 0;
        pool_.run([&](Team& team) {
            ops::quantize(team, x.data(), m, cols_, *activations_);
            if (team.index() == 0) start = now();
            team.barrier();
            ops::matmul(team, *activations_, {&projection, 1});
        });
        return now() - start;
    }

    /// Seconds that reading all bytes of copy `index` takes, split over the threads as the matmul splits them.
    double read(std::int64_t index) {
        const Weight& w = weights_.at(static_cast<std::size_t>(index));
        const std::int64_t lines = layout::packed_bytes(*w.scheme, rows_, cols_) / 64;
        std::atomic<std::uint64_t> sum{0};
        double start = 0;
        pool_.run([&](Team& team) {
            if (team.index() == 0) start = now();
            team.barrier();
            team.parallel_for(lines, 4096, [&](std::int64_t begin, std::int64_t end) {
                sum += cpu::kernels().read_lines(w.data + begin * 64, end - begin, cpu::stream_ahead(1));
            });
        });
        return now() - start;
    }

 private:
    /// xorshift bytes; scales and mins are small finite fp16.
    void fill(std::int64_t bytes) {
        std::uint64_t state = 0x9e3779b97f4a7c15u;
        for (const auto& copy : data_) {
            for (std::int64_t i = 0; i < bytes; i += 8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                std::memcpy(copy->get() + i, &state, 8);
            }
            const Weight& w = weights_[0];
            for (std::int64_t row = 0; row < layout::padded_rows(rows_); ++row)
                for (std::int64_t col = 0; col < cols_; col += w.scheme->group) {
                    const layout::Position at = layout::locate(*w.scheme, cols_, row, col);
                    const auto half =
                        static_cast<std::uint16_t>(0x2000u + (static_cast<std::uint32_t>(row * 31 + col) & 0x3ffu));
                    std::memcpy(copy->get() + at.scale, &half, 2);
                    if (w.scheme->asymmetric) std::memcpy(copy->get() + at.scale + at.min_offset, &half, 2);
                }
        }
    }

    ThreadPool pool_;
    std::int64_t rows_, cols_;
    std::vector<std::unique_ptr<AlignedArray<std::uint8_t>>> data_;
    std::vector<Weight> weights_;
    std::unique_ptr<ops::Activations> activations_;
};

/// Multiply-adds a second of `threads` threads at the full rate of the float instructions in use.
double float_peak(int threads, double seconds) {
    ThreadPool pool(threads);
    std::atomic<std::int64_t> macs{0};
    const double start = now();
    pool.run([&](Team&) {
        std::int64_t mine = 0;
        while (now() - start < seconds) mine += cpu::kernels().float_peak(2'000);
        macs += mine;
    });
    return static_cast<double>(macs.load()) / (now() - start);
}

/// A cache of random keys and values of `length` positions for each of some sequences, `copies` layers of it, and what
/// attention over one layer costs.
class AttentionBench {
 public:
    AttentionBench(int heads, int kv_heads, int head_dim, std::int64_t length, int sequences,
                   const std::string& kv_type, int copies, int threads)
        : pool_(threads),
          heads_(heads),
          layout_{kv_type == "int8" ? KvType::int8 : KvType::fp16, copies, kv_heads, head_dim},
          length_(length),
          cache_(layout_, layout::round_up(length, KvLayout::kPage) / KvLayout::kPage * sequences) {
        if (heads < 1 || kv_heads < 1 || heads % kv_heads || head_dim < 2 || head_dim % 2 || length < 1 || copies < 1)
            throw std::invalid_argument("AttentionBench needs sizes above 0 and heads that divide");
        for (int i = 0; i < sequences; ++i) {
            ids_.push_back(cache_.open());
            cache_.extend(ids_.back(), length);
        }
        fill();
    }

    /// Seconds that attention of the last tokens of every sequence takes; q, out [sequences * tokens, heads *
    /// head_dim].
    double run(const py::array_t<float, py::array::c_style>& q, int copy, py::array_t<float, py::array::c_style>& out) {
        const std::int64_t tokens = q.shape(0) / static_cast<std::int64_t>(ids_.size());
        if (q.ndim() != 2 || q.shape(1) != std::int64_t(heads_) * layout_.head_dim || tokens < 1 || tokens > length_ ||
            out.size() != q.size() || copy < 0 || copy >= layout_.layers)
            throw std::invalid_argument("q and out must be [sequences * tokens, heads * head_dim]");
        std::vector<SequenceRows> rows;
        for (std::size_t i = 0; i < ids_.size(); ++i)
            rows.push_back(
                {static_cast<std::int64_t>(i) * tokens, tokens, length_ - tokens, cache_.page_table(ids_[i])});
        std::vector<float> queries(q.data(), q.data() + q.size());
        float* target = out.mutable_data();
        double start = 0;
        pool_.run([&](Team& team) {
            if (team.index() == 0) start = now();
            team.barrier();
            ops::attention(team, queries.data(), heads_, nullptr, rows, cache_, copy, target, nullptr);
        });
        return now() - start;
    }

    /// Seconds that reading the keys and values of layer `copy` takes.
    double read(int copy) {
        const std::int64_t slab = static_cast<std::int64_t>(layout_.slab_bytes());
        std::atomic<std::uint64_t> sum{0};
        double start = 0;
        pool_.run([&](Team& team) {
            if (team.index() == 0) start = now();
            team.barrier();
            team.parallel_for(cache_.pages_total() * layout_.kv_heads, 4, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t i = begin; i < end; ++i) {
                    const auto page = static_cast<std::int32_t>(i / layout_.kv_heads);
                    const auto head = static_cast<int>(i % layout_.kv_heads);
                    sum += cpu::kernels().read_lines(cache_.slab(page, copy, head), slab / 64, cpu::stream_ahead(1));
                }
            });
        });
        return now() - start;
    }

    std::int64_t bytes() const {
        return cache_.pages_total() * layout_.kv_heads * static_cast<std::int64_t>(layout_.slab_bytes());
    }

 private:
    /// fp16 of 0.5 to 1 in size, or any int8 with small scales.
    void fill() {
        const bool int8 = layout_.type == KvType::int8;
        std::uint64_t state = 0x9e3779b97f4a7c15u;
        for (std::int64_t page = 0; page < cache_.pages_total(); ++page) {
            std::uint8_t* data = cache_.slab(static_cast<std::int32_t>(page), 0, 0);
            for (std::size_t slab = 0; slab < layout_.page_bytes(); slab += layout_.slab_bytes()) {
                for (std::size_t i = 0; i < layout_.slab_bytes(); i += 8) {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    std::uint64_t word = state;
                    if (!int8) word = (word & 0x83ff83ff83ff83ffu) | 0x3800380038003800u;
                    if (int8 && i >= layout_.k_scale_offset()) word = 0x2000200020002000u;
                    std::memcpy(data + slab + i, &word, 8);
                }
            }
        }
    }

    ThreadPool pool_;
    int heads_;
    KvLayout layout_;
    std::int64_t length_;
    KvCache cache_;
    std::vector<int> ids_;
};

/// `loops` loops over `count` items on `threads` threads: how often each item was visited, and the barriers passed.
/// fail_at >= 0: the thread that meets this item throws.
py::tuple pool_visits(int threads, std::int64_t count, std::int64_t grain, int loops, std::int64_t fail_at) {
    if (count < 0 || grain < 1) throw std::invalid_argument("count must be >= 0 and grain >= 1");
    std::vector<std::atomic<std::int32_t>> visits(static_cast<std::size_t>(count));
    ThreadPool pool(threads);
    const auto job = [&](Team& team) {
        for (int i = 0; i < loops; ++i)
            team.parallel_for(count, grain, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t j = begin; j < end; ++j) {
                    if (j == fail_at) throw std::runtime_error("item " + std::to_string(j) + " failed");
                    visits[static_cast<std::size_t>(j)] += 1;
                }
            });
    };
    {
        const py::gil_scoped_release released;
        pool.run(job);
    }
    py::array_t<std::int32_t> out(count);
    for (std::int64_t j = 0; j < count; ++j) out.mutable_at(j) = visits[static_cast<std::size_t>(j)];
    return py::make_tuple(out, pool.barriers());
}

}  // namespace

void bind_bench(py::module_& module) {
    module.def("clock_hz", &clock_hz, py::call_guard<py::gil_scoped_release>());
    module.def("int8_peak", &int8_peak, py::arg("threads"), py::arg("seconds") = 0.05,
               py::call_guard<py::gil_scoped_release>());
    module.def("pool_visits", &pool_visits, py::arg("threads"), py::arg("count"), py::arg("grain"),
               py::arg("loops") = 1, py::arg("fail_at") = -1);
    module.def("float_peak", &float_peak, py::arg("threads"), py::arg("seconds") = 0.05,
               py::call_guard<py::gil_scoped_release>());
    py::class_<AttentionBench>(module, "AttentionBench")
        .def(py::init<int, int, int, std::int64_t, int, const std::string&, int, int>(), py::arg("heads"),
             py::arg("kv_heads"), py::arg("head_dim"), py::arg("length"), py::arg("sequences"), py::arg("kv_type"),
             py::arg("copies"), py::arg("threads"))
        .def("run", &AttentionBench::run, py::arg("q"), py::arg("copy"), py::arg("out"))
        .def("read", &AttentionBench::read, py::arg("copy"))
        .def_property_readonly("bytes", &AttentionBench::bytes);
    py::class_<MatmulBench>(module, "MatmulBench")
        .def(py::init<const std::string&, std::int64_t, std::int64_t, std::int64_t, int>(), py::arg("scheme"),
             py::arg("rows"), py::arg("cols"), py::arg("copies"), py::arg("threads"))
        .def("packed", &MatmulBench::packed, py::arg("copy"))
        .def("run", &MatmulBench::run, py::arg("x"), py::arg("copy"), py::arg("out"))
        .def("read", &MatmulBench::read, py::arg("copy"));
}
