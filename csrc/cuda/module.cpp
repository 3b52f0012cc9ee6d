// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

void bind_cuda_engine(pybind11::module_& module);
void bind_cuda_ops(pybind11::module_& module);
void bind_cuda_bench(pybind11::module_& module);

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "The native engine of cnllama on an NVIDIA GPU. Importing it needs neither a driver nor a GPU.";
    bind_cuda_engine(module);
    bind_cuda_ops(module);
    bind_cuda_bench(module);
}
