// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

void bind_ops(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_sampler(pybind11::module_& module);

PYBIND11_MODULE(_core, module) {
    module.doc() = "The native engine of cnllama.";
    bind_ops(module);
    bind_engine(module);
    bind_sampler(module);
}
