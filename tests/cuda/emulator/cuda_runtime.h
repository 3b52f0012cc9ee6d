// SPDX-License-Identifier: Apache-2.0
// CUDA on the CPU, for tests: kernels are compiled as C++ and run with every thread a coroutine, so the sources that a
// GPU runs are checked where there is none. It covers what csrc/cuda uses and no more. Slow, deterministic, strict: a
// barrier that not all threads reach is reported, shared memory is filled with NaN before a block starts and lies in an
// allocation of exactly the size asked for, asynchronous copies happen as late as they may, and CNLLAMA_EMULATOR_ORDER
// (forward, reverse, or a number that seeds a shuffle) changes the order in which threads and blocks run.
// CNLLAMA_EMULATOR_FAULT, "CALL N ERROR", makes the N-th call of a function from then on fail with that error; when it
// is one that loses the device, so do all calls after it, until the variable changes.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInitializationError = 3,
    cudaErrorInsufficientDriver = 35,
    cudaErrorDevicesUnavailable = 46,
    cudaErrorNoDevice = 100,
    cudaErrorECCUncorrectable = 214,
    cudaErrorNvlinkUncorrectable = 220,
    cudaErrorIllegalAddress = 700,
    cudaErrorLaunchOutOfResources = 701,
    cudaErrorLaunchTimeout = 702,
    cudaErrorAssert = 710,
    cudaErrorHardwareStackError = 714,
    cudaErrorIllegalInstruction = 715,
    cudaErrorMisalignedAddress = 716,
    cudaErrorInvalidAddressSpace = 717,
    cudaErrorInvalidPc = 718,
    cudaErrorLaunchFailure = 719,
    cudaErrorContained = 721,
    cudaErrorUnknown = 999,
};

namespace emulator {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};
void sync_block();
unsigned char* shared_memory();
int round_to_int(float x);
void submit(struct Stream* stream, std::function<void()> work);
void finish_default_stream();
cudaError_t fault(const char* call);
/// CNLLAMA_EMULATOR_CODE: the architecture that the module was "built" for; 90 without it.
int code_version();
void run_grid(const dim3& grid, const dim3& block, std::size_t shared, const std::function<void()>& kernel);

}  // namespace emulator

extern emulator::Index threadIdx, blockIdx;
extern dim3 gridDim, blockDim;
inline void __syncthreads() { emulator::sync_block(); }
inline int __float2int_rn(float x) { return emulator::round_to_int(x); }

using cudaStream_t = emulator::Stream*;
using cudaEvent_t = struct EmulatedEvent*;
using cudaGraph_t = struct EmulatedGraph*;
using cudaGraphExec_t = struct EmulatedGraphExec*;
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
struct cudaFuncAttributes {
    int ptxVersion, binaryVersion;
};
struct cudaDeviceProp {
    char name[256];
    int major, minor, multiProcessorCount;
};
#define cudaStreamLegacy (reinterpret_cast<cudaStream_t>(1))
constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2, cudaEventDefault = 0,
                   cudaHostAllocDefault = 0;

cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t);
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaRuntimeGetVersion(int*);
cudaError_t cudaDriverGetVersion(int*);
cudaError_t cudaGetDeviceCount(int*);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
cudaError_t cudaMemGetInfo(std::size_t*, std::size_t*);
cudaError_t cudaMalloc(void**, std::size_t);
cudaError_t cudaFree(void*);
cudaError_t cudaHostAlloc(void**, std::size_t, unsigned);
cudaError_t cudaFreeHost(void*);
cudaError_t cudaMemset(void*, int, std::size_t);
cudaError_t cudaMemcpy(void*, const void*, std::size_t, cudaMemcpyKind);
cudaError_t cudaMemcpyAsync(void*, const void*, std::size_t, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned);
cudaError_t cudaStreamDestroy(cudaStream_t);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned);
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode);
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t*, cudaGraph_t, unsigned long long);
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t);
cudaError_t cudaGraphDestroy(cudaGraph_t);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, unsigned);
cudaError_t cudaEventDestroy(cudaEvent_t);
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t);
cudaError_t cudaEventSynchronize(cudaEvent_t);
cudaError_t cudaEventElapsedTime(float*, cudaEvent_t, cudaEvent_t);
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*);

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    constexpr std::size_t kMaxShared = 101376;
    if (config->gridDim.x == 0 || config->gridDim.y == 0 || config->gridDim.y > 65535 || config->gridDim.z == 0 ||
        config->gridDim.z > 65535 || config->blockDim.x > 1024 || config->dynamicSmemBytes > kMaxShared)
        return cudaErrorInvalidValue;
    if (const cudaError_t error = emulator::fault("cudaLaunchKernelEx")) return error;
    if (config->numAttrs && emulator::code_version() < 90) return cudaErrorLaunchFailure;  // nothing in it would wait
    const std::tuple<Parameters...> copies(std::forward<Arguments>(arguments)...);
    const dim3 grid = config->gridDim, block = config->blockDim;
    const std::size_t shared = config->dynamicSmemBytes;
    emulator::submit(config->stream, [=] {
        emulator::run_grid(grid, block, shared, [&] { std::apply(kernel, copies); });
        emulator::finish_default_stream();
    });
    return cudaSuccess;
}
