// SPDX-License-Identifier: Apache-2.0
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <span>
#include <vector>

#include "sampler.hpp"

namespace py = pybind11;
using cnl::Sampler;

namespace {

using Logits = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Ids = py::array_t<std::int32_t, py::array::c_style | py::array::forcecast>;

py::tuple sample(Sampler& sampler, const Logits& logits, const std::vector<std::int32_t>& banned, std::int64_t top,
                 const std::optional<Ids>& ids) {
    if (logits.ndim() != 1)
        throw py::value_error("the logits have " + std::to_string(logits.ndim()) + " axes, expected 1");
    if (ids && ids->ndim() != 1) throw py::value_error("ids must have one axis");
    const std::span<const float> values(logits.data(), static_cast<std::size_t>(logits.size()));
    const auto known =
        ids ? std::span(ids->data(), static_cast<std::size_t>(ids->size())) : std::span<const std::int32_t>();
    // With the GIL: it takes microseconds, and a sampler changes with every choice.
    const Sampler::Choice choice = sampler.sample(values, banned, top, known);
    return py::make_tuple(choice.token, choice.logprob, choice.top);
}

}  // namespace

void bind_sampler(py::module_& module) {
    py::class_<Sampler>(module, "Sampler")
        .def(py::init([](double temperature, std::int64_t top_k, double top_p, double min_p, double repeat_penalty,
                         std::int64_t repeat_last_n, std::uint64_t seed) {
                 return Sampler({temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed});
             }),
             py::kw_only(), py::arg("temperature") = 0.0, py::arg("top_k") = 0, py::arg("top_p") = 1.0,
             py::arg("min_p") = 0.0, py::arg("repeat_penalty") = 1.0, py::arg("repeat_last_n") = 64,
             py::arg("seed") = 0)
        .def(
            "accept", [](Sampler& sampler, const std::vector<std::int32_t>& tokens) { sampler.accept(tokens); },
            py::arg("tokens"))
        .def("sample", &sample, py::arg("logits"), py::arg("banned") = std::vector<std::int32_t>(),
             py::arg("logprobs") = 0, py::arg("ids") = py::none())
        .def("needed", &Sampler::needed, py::arg("banned"));
}
