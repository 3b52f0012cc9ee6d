// SPDX-License-Identifier: Apache-2.0
// Bindings of the choice of instruction set, and of all native functions beside the engine and the sampler.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/cpu_info.hpp"
#include "kv_cache.hpp"

namespace py = pybind11;

void bind_kernels(py::module_& module);
void bind_quantize(py::module_& module);

namespace {

using namespace cnl;

py::dict cpu_info() {
    const cpu::CpuInfo info = cpu::cpu_info();
    py::dict out;
    out["model"] = info.model;
    out["isa"] = std::string(cpu::kernels().name);
    out["isas"] = cpu::supported_isas();
    out["physical_cores"] = info.physical_cores;
    out["affinity"] = info.affinity;
    out["cgroup_quota"] = info.cgroup_quota ? py::object(py::float_(*info.cgroup_quota)) : py::none();
    out["default_threads"] = info.default_threads;
    return out;
}

/// CNLLAMA_ISA forces a table; a name this machine lacks ends the import with a sentence.
void choose_isa() {
    const char* forced = std::getenv("CNLLAMA_ISA");
    if (forced == nullptr || *forced == '\0') return;
    try {
        cpu::use_isa(forced);
    } catch (const std::invalid_argument& error) {
        throw py::import_error(std::string("CNLLAMA_ISA: ") + error.what());
    }
}

}  // namespace

void bind_ops(py::module_& module) {
    choose_isa();
    module.attr("PAGE_SIZE") = KvLayout::kPage;
    module.def("isa", [] { return std::string(cpu::kernels().name); });
    module.def("isas", &cpu::supported_isas);
    module.def("use_isa", [](const std::string& name) { cpu::use_isa(name); }, py::arg("name"));
    module.def("cpu_info", &cpu_info);
    bind_quantize(module);
    bind_kernels(module);
}
