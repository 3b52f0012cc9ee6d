// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>

#include "threads.hpp"

void bind_ops(pybind11::module_& module);
void bind_engine(pybind11::module_& module);
void bind_sampler(pybind11::module_& module);
void bind_map_guard(pybind11::module_& module);
void bind_signals(pybind11::module_& module);

namespace {

/// The machine is too small, which is no fault of any argument: CnllamaError, wherever it happens.
void translate_thread_error(std::exception_ptr caught) {
    try {
        std::rethrow_exception(caught);
    } catch (const cnl::ThreadError& error) {
        const auto kind = pybind11::module_::import("cnllama.errors").attr("CnllamaError");
        PyErr_SetObject(kind.ptr(), pybind11::str(error.what()).ptr());
    }
}

}  // namespace

PYBIND11_MODULE(_core, module) {
    module.doc() = "The native engine of cnllama.";
    pybind11::register_exception_translator(translate_thread_error);
    bind_ops(module);
    bind_engine(module);
    bind_sampler(module);
    bind_map_guard(module);
    bind_signals(module);
}
