// SPDX-License-Identifier: Apache-2.0
// A model's configuration and tensors as Python hands them over, checked: everything here may come from a file. Shared
// by the engines of all back ends.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <tuple>
#include <vector>

#include "model.hpp"

namespace cnl::bind {

using Bytes = pybind11::array_t<std::uint8_t, pybind11::array::c_style>;
using Ids = pybind11::array_t<std::int32_t, pybind11::array::c_style | pybind11::array::forcecast>;
using Batch = std::vector<std::tuple<int, Ids, bool>>;

/// `value`, or ValueError with the name and both limits.
std::int64_t within(const char* name, std::int64_t value, std::int64_t low, std::int64_t high);

/// The .cnl's config. Raises ValueError naming the key, the value found and the one expected.
ModelConfig read_config(const pybind11::dict& config);

/// The tensors of a model by name, each checked against the size it must have. Keeps the arrays alive.
class TensorTable {
 public:
    explicit TensorTable(const pybind11::dict& tensors);

    bool has(const std::string& name) const { return entries_.count(name) != 0; }
    Weight matrix(const std::string& name, std::int64_t rows, std::int64_t cols);
    const float* vector(const std::string& name, std::int64_t size);
    const float* optional_vector(const std::string& name, std::int64_t size) {
        return has(name) ? vector(name, size) : nullptr;
    }
    std::size_t bytes() const { return bytes_; }

 private:
    struct Entry {
        Bytes data;
        std::string scheme;
        std::int64_t rows = 0, cols = 0;
    };
    struct Free {
        void operator()(std::uint8_t* p) const { ::operator delete[](p, std::align_val_t{layout::kLineBytes}); }
    };
    const Entry& at(const std::string& name, std::int64_t rows, std::int64_t cols) const;
    static void expect_bytes(const std::string& name, const Entry& e, std::int64_t bytes);
    const std::uint8_t* aligned(const Bytes& data);

    std::map<std::string, Entry> entries_;
    std::vector<std::unique_ptr<std::uint8_t[], Free>> copies_;
    std::size_t bytes_ = 0;
};

/// A step as Python gives it, with ids of its own: another thread may write into the arrays while it runs.
class StepBatch {
 public:
    /// Raises ValueError for ids of more or fewer axes than one.
    explicit StepBatch(const Batch& batch);
    StepBatch(const StepBatch&) = delete;
    StepBatch& operator=(const StepBatch&) = delete;
    const std::vector<StepEntry>& entries() const { return entries_; }

 private:
    std::vector<std::int32_t> ids_;
    std::vector<StepEntry> entries_;
};

/// work() while no other thread is in the engine. It may not call Python: that could lead back here.
template <typename Lock, typename Work>
auto alone(Lock& lock, Work&& work) {
    std::unique_lock held(lock, std::try_to_lock);
    if (!held) {  // who holds it may need the GIL to come to an end
        const pybind11::gil_scoped_release release;
        held.lock();
    }
    return work();
}

/// All tensors of the model; raises ValueError naming the one that is missing or has a wrong size.
Weights read_weights(TensorTable& table, const ModelConfig& config);

}  // namespace cnl::bind
