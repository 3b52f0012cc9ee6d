// SPDX-License-Identifier: Apache-2.0
// The memory that ops work in: each back end defines where it is (csrc/cpu/memory.cpp, csrc/cuda/ops_cuda.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace cnl {

namespace memory {

/// `bytes` of zeros, aligned to a page. On the CPU they are taken as they are written. Throws std::runtime_error with
/// the size when the system refuses.
void* reserve(std::size_t bytes);
void release(void* p, std::size_t bytes) noexcept;

}  // namespace memory

/// `count` zeros of T in the back end's memory.
template <typename T>
class Array {
 public:
    explicit Array(std::int64_t count)
        : size_(static_cast<std::size_t>(count)), data_(static_cast<T*>(memory::reserve(size_ * sizeof(T)))) {}
    ~Array() { memory::release(data_, size_ * sizeof(T)); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    T* data() const { return data_; }
    std::size_t size() const { return size_; }

 private:
    std::size_t size_;
    T* data_;
};

}  // namespace cnl
