// SPDX-License-Identifier: Apache-2.0
#include "check.hpp"

#include <cstdio>

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
    throw CudaError(std::string(what) + ": the GPU answers " + cudaGetErrorName(error) + " (" +
                        cudaGetErrorString(error) + ")" +
                        (sticky ? "; it is lost to this process, start it again" : ""),
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

// Errors of an earlier launch come back here too; there is nobody to tell in a destructor.
void release_device_memory(void* p) noexcept {
    if (p) static_cast<void>(cudaFree(p));
}
void release_pinned_memory(void* p) noexcept {
    if (p) static_cast<void>(cudaFreeHost(p));
}

}  // namespace cnl::cuda
