// SPDX-License-Identifier: Apache-2.0
// CUDA errors as exceptions, and memory that frees itself.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace cnl::cuda {

/// The device or the driver failed. `sticky`: the device is lost to this process, and no later call can work.
class CudaError : public std::runtime_error {
 public:
    CudaError(const std::string& message, cudaError_t error_code, bool is_sticky)
        : std::runtime_error(message), code(error_code), sticky(is_sticky) {}
    cudaError_t code;
    bool sticky;
};

/// Throws CudaError naming what was tried when `error` is one; the runtime's own memory of it is cleared.
void check(cudaError_t error, const char* what);

/// "12.34 GiB"
std::string gibibytes(std::size_t bytes);

/// Uninitialized device memory of `count` T. Throws CudaError with the size, what is free and what there is in all when
/// the device refuses.
template <typename T>
class DeviceArray {
 public:
    DeviceArray() = default;
    DeviceArray(std::size_t count, const char* what)
        : data_(static_cast<T*>(take(count * sizeof(T), what))), size_(count) {}
    ~DeviceArray() { release(data_); }
    DeviceArray(DeviceArray&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    DeviceArray& operator=(DeviceArray&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    T* get() const { return data_; }
    std::size_t size() const { return size_; }
    std::size_t bytes() const { return size_ * sizeof(T); }

 private:
    static void* take(std::size_t bytes, const char* what);
    static void release(void* p) noexcept;
    T* data_ = nullptr;
    std::size_t size_ = 0;
};

void* take_device_memory(std::size_t bytes, const char* what);
void* take_pinned_memory(std::size_t bytes, const char* what);
void release_device_memory(void* p) noexcept;
void release_pinned_memory(void* p) noexcept;

/// Fill and copy device memory, and return when that has happened. A fill on the default stream happens some time after
/// its call, and so does the arrival of what is copied out of ordinary memory; nothing orders them with the streams of
/// engines, whose kernels would read or write the same memory meanwhile.
void fill_device_memory(void* p, int byte, std::size_t bytes, const char* what);
void copy_to_device(void* to, const void* from, std::size_t bytes, const char* what);

/// Lets a kernel's blocks have so many bytes of dynamic shared memory, over the 48 KB that all may. Never fewer than
/// before: another thread may be about to launch it with more.
void allow_shared_memory(const void* kernel, std::size_t bytes, const char* what);

template <typename T>
void* DeviceArray<T>::take(std::size_t bytes, const char* what) {
    return bytes ? take_device_memory(bytes, what) : nullptr;
}
template <typename T>
void DeviceArray<T>::release(void* p) noexcept {
    release_device_memory(p);
}

/// Host memory that the device copies from at full speed.
class PinnedBytes {
 public:
    PinnedBytes() = default;
    PinnedBytes(std::size_t bytes, const char* what)
        : data_(static_cast<std::byte*>(take_pinned_memory(bytes, what))), size_(bytes) {}
    ~PinnedBytes() { release_pinned_memory(data_); }
    PinnedBytes(PinnedBytes&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    PinnedBytes& operator=(PinnedBytes&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    std::byte* get() const { return data_; }
    std::size_t size() const { return size_; }

 private:
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

class Stream {
 public:
    Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream"); }
    ~Stream() { static_cast<void>(cudaStreamDestroy(stream_)); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    cudaStream_t get() const { return stream_; }
    void wait() const { check(cudaStreamSynchronize(stream_), "waiting for the GPU"); }

 private:
    cudaStream_t stream_ = nullptr;
};

class Event {
 public:
    explicit Event(unsigned flags = cudaEventDisableTiming) {
        check(cudaEventCreateWithFlags(&event_, flags), "creating an event");
    }
    ~Event() { static_cast<void>(cudaEventDestroy(event_)); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    cudaEvent_t get() const { return event_; }
    void record(const Stream& stream) const { check(cudaEventRecord(event_, stream.get()), "recording an event"); }
    void wait() const { check(cudaEventSynchronize(event_), "waiting for the GPU"); }

 private:
    cudaEvent_t event_ = nullptr;
};

}  // namespace cnl::cuda
