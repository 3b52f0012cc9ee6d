// SPDX-License-Identifier: Apache-2.0
#include "check.hpp"

#include <cstdio>
#include <map>
#include <mutex>

namespace cnl::cuda {

namespace {

/// Errors after which nothing works any more in this process, as CUDA's documentation lists them.
bool ends_the_context(cudaError_t error) {
    switch (error) {
        case cudaErrorIllegalAddress:
        case cudaErrorMisalignedAddress:
        case cudaErrorInvalidAddressSpace:
        case cudaErrorInvalidPc:
        case cudaErrorIllegalInstruction:
        case cudaErrorHardwareStackError:
        case cudaErrorLaunchTimeout:
        case cudaErrorLaunchFailure:
        case cudaErrorECCUncorrectable:
        case cudaErrorAssert:
        case cudaErrorDevicesUnavailable:
        case cudaErrorNvlinkUncorrectable:
        case cudaErrorContained:
        case cudaErrorInitializationError:
        case cudaErrorUnknown:
            return true;
        default:
            return false;
    }
}

}  // namespace

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    static_cast<void>(cudaGetLastError());
    const bool sticky = ends_the_context(error);
    const char* mend = "";
    if (error == cudaErrorInitializationError)  // what a child gets that was forked after its parent used CUDA
        mend = "; a forked process cannot use the GPU: start processes with spawn";
    else if (sticky)
        mend = "; it is lost to this process, start it again";
    throw CudaError(std::string(what) + ": the GPU answers " + cudaGetErrorName(error) + " (" +
                        cudaGetErrorString(error) + ")" + mend,
                    error, sticky);
}

std::string gibibytes(std::size_t bytes) {
    char text[32];
    std::snprintf(text, sizeof text, "%.2f GiB", double(bytes) / double(1u << 30));
    return text;
}

void* take_device_memory(std::size_t bytes, const char* what) {
    void* p = nullptr;
    const cudaError_t error = cudaMalloc(&p, bytes);
    if (error == cudaErrorMemoryAllocation) {
        static_cast<void>(cudaGetLastError());
        std::size_t free = 0, all = 0;
        static_cast<void>(cudaMemGetInfo(&free, &all));
        throw CudaError(std::string(what) + " needs " + gibibytes(bytes) + " of GPU memory and " + gibibytes(free) +
                            " of " + gibibytes(all) + " are free; use a smaller context or fewer sequences",
                        error, false);
    }
    check(error, what);
    return p;
}

void* take_pinned_memory(std::size_t bytes, const char* what) {
    void* p = nullptr;
    if (!bytes) return p;
    const cudaError_t error = cudaHostAlloc(&p, bytes, cudaHostAllocDefault);
    if (error == cudaErrorMemoryAllocation) {
        static_cast<void>(cudaGetLastError());
        throw CudaError(std::string(what) + " needs " + gibibytes(bytes) +
                            " of pinned host memory, which the system refuses; free some or raise the limit",
                        error, false);
    }
    check(error, what);
    return p;
}

void fill_device_memory(void* p, int byte, std::size_t bytes, const char* what) {
    if (!bytes) return;
    check(cudaMemset(p, byte, bytes), what);
    check(cudaStreamSynchronize(cudaStreamLegacy), what);
}

void copy_to_device(void* to, const void* from, std::size_t bytes, const char* what) {
    if (!bytes) return;
    check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), what);
    check(cudaStreamSynchronize(cudaStreamLegacy), what);
}

void allow_shared_memory(const void* kernel, std::size_t bytes, const char* what) {
    static std::mutex mutex;
    static std::map<const void*, std::size_t> allowed;
    const std::scoped_lock lock(mutex);
    std::size_t& most = allowed[kernel];
    if (bytes <= most) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), what);
    most = bytes;
}

// Errors of an earlier launch come back here too; there is nobody to tell in a destructor.
void release_device_memory(void* p) noexcept {
    if (p) static_cast<void>(cudaFree(p));
}
void release_pinned_memory(void* p) noexcept {
    if (p) static_cast<void>(cudaFreeHost(p));
}

}  // namespace cnl::cuda
