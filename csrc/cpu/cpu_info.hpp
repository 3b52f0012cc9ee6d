// SPDX-License-Identifier: Apache-2.0
// What the processor can run, how many threads it should get, and which table of kernels is in use.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "isa.hpp"

namespace cnl::cpu {

struct CpuInfo {
    std::string model;
    int physical_cores = 1;              // of the machine
    int affinity = 1;                    // processors this process may run on
    std::optional<double> cgroup_quota;  // processors' worth of time a second; none: no limit
    int default_threads = 1;             // min(physical cores allowed, floor(quota)), at least 1
};

/// Read afresh on every call.
CpuInfo cpu_info();

/// cpu_info().default_threads
int default_threads();

/// The smallest quota on the way from this process's cgroup to the root, versions 1 and 2. `root` is put before every
/// path: tests give a directory that holds proc/self/cgroup, proc/self/mountinfo and the mounted hierarchies.
std::optional<double> cgroup_quota(const std::string& root = "");

/// How many bytes ahead a kernel that streams weights for so many tokens asks for them on this machine.
std::int64_t stream_ahead(std::int64_t tokens);

/// Names this machine can run, slowest first.
std::vector<std::string> supported_isas();

/// The table in use. The first call takes the best one.
const Kernels& kernels();

/// Switches it. Throws std::invalid_argument that names what there is, for one that is unknown or not supported.
void use_isa(std::string_view name);

}  // namespace cnl::cpu
