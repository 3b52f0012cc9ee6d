// SPDX-License-Identifier: Apache-2.0
// One way to launch a kernel: on the queue's stream, allowed to start while its predecessor ends, and checked.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "check.hpp"

namespace cnl::cuda {

/// Where kernels go and what the device can do.
struct Queue {
    cudaStream_t stream = nullptr;
    int processors = 1;                // SMs
    std::size_t shared_limit = 49152;  // bytes of dynamic shared memory a block may ask for
    bool early_start = false;          // programmatic dependent launch: Hopper and later
    bool wait_each = false;            // wait after every launch, so that an error is found where it happens
};

struct Shape {
    dim3 grid, block;
    std::size_t shared = 0;
};

template <typename... Parameters, typename... Arguments>
void launch(const Queue& queue, const char* name, void (*kernel)(Parameters...), const Shape& shape,
            Arguments&&... arguments) {
    if (shape.shared > 49152) allow_shared_memory(reinterpret_cast<const void*>(kernel), shape.shared, name);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared;
    config.stream = queue.stream;
    config.attrs = &attribute;
    config.numAttrs = queue.early_start ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
    if (queue.wait_each) check(cudaStreamSynchronize(queue.stream), name);
}

}  // namespace cnl::cuda
