// SPDX-License-Identifier: Apache-2.0
#include "cpu_info.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <stdexcept>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sched.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#endif

namespace cnl::cpu {
namespace {

#if defined(__x86_64__)
/// The register state the operating system saves: XCR0.
std::uint64_t saved_state() {
    std::uint32_t low = 0, high = 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<std::uint64_t>(high) << 32 | low;
}

bool has(std::uint32_t word, int bit) { return (word >> bit & 1u) != 0; }

/// The tables that processor and operating system together can run, slowest first.
void detect(std::vector<const Kernels*>& found) {
    std::uint32_t a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = has(c, 12), osxsave = has(c, 27), avx = has(c, 28), f16c = has(c, 29);
    if (!osxsave || !avx || (saved_state() & 0x6) != 0x6) return;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(b, 5) || !fma || !f16c) return;
    const bool avx512 = has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31) && has(c, 11);  // F DQ BW VL VNNI
    found.push_back(&kAvx2Kernels);
#if defined(CNLLAMA_AVX_VNNI)
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, 4)) found.push_back(&kAvxVnniKernels);
#endif
    if (avx512 && (saved_state() & 0xe0) == 0xe0) found.push_back(&kAvx512Kernels);
}

/// Zen 3 and Zen 4.
bool amd_family_19h() {
    std::uint32_t a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(0, &a, &b, &c, &d) || c != 0x444d4163) return false;  // AuthenticAMD
    return __get_cpuid(1, &a, &b, &c, &d) && (a >> 8 & 0xf) == 0xf && (a >> 20 & 0xff) == 0x0a;
}

std::string brand() {
    std::uint32_t words[12] = {};
    for (std::uint32_t i = 0; i < 3; ++i)
        if (!__get_cpuid(0x80000002u + i, &words[4 * i], &words[4 * i + 1], &words[4 * i + 2], &words[4 * i + 3]))
            return "x86-64";
    const std::string text(reinterpret_cast<const char*>(words), sizeof words);
    const std::string name = text.substr(0, text.find('\0'));
    const auto begin = name.find_first_not_of(' ');
    return begin == std::string::npos ? "x86-64" : name.substr(begin, name.find_last_not_of(' ') - begin + 1);
}
#elif defined(__aarch64__) && defined(__linux__)
/// The tables that the kernel says this processor can run, slowest first.
void detect(std::vector<const Kernels*>& found) {
    constexpr unsigned long kDotprod = 1ul << 20, kI8mm = 1ul << 13;  // HWCAP_ASIMDDP and HWCAP2_I8MM
    if (!(getauxval(AT_HWCAP) & kDotprod)) return;
    found.push_back(&kNeonDotprodKernels);
    if (getauxval(AT_HWCAP2) & kI8mm) found.push_back(&kNeonI8mmKernels);
}

/// Arm's processors give numbers, no name.
std::string brand() {
    std::string implementer, part;
    std::ifstream file("/proc/cpuinfo");
    for (std::string line; std::getline(file, line) && part.empty();) {
        const auto colon = line.find(": ");
        if (colon == std::string::npos) continue;
        if (line.rfind("CPU implementer", 0) == 0) implementer = line.substr(colon + 2);
        if (line.rfind("CPU part", 0) == 0) part = line.substr(colon + 2);
    }
    return part.empty() ? "aarch64" : "aarch64, implementer " + implementer + ", part " + part;
}
#else
void detect(std::vector<const Kernels*>&) {}

std::string brand() { return "unknown"; }
#endif

const std::vector<const Kernels*>& tables() {
    static const std::vector<const Kernels*> all = [] {
        std::vector<const Kernels*> found{&kScalarKernels};
        detect(found);
        return found;
    }();
    return all;
}

std::atomic<const Kernels*> active{nullptr};

std::string first_line(const std::filesystem::path& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

/// Processors this process may run on; empty where the system does not say.
std::vector<int> allowed_processors() {
    std::vector<int> allowed;
#if defined(__linux__)
    // The kernel refuses a set smaller than its own, so grow.
    for (int capacity = 1024; capacity <= 1 << 20; capacity *= 4) {
        cpu_set_t* set = CPU_ALLOC(static_cast<std::size_t>(capacity));
        const std::size_t bytes = CPU_ALLOC_SIZE(static_cast<std::size_t>(capacity));
        const bool ok = set && sched_getaffinity(0, bytes, set) == 0;
        for (int i = 0; ok && i < capacity; ++i)
            if (CPU_ISSET_S(static_cast<std::size_t>(i), bytes, set)) allowed.push_back(i);
        CPU_FREE(set);
        if (ok) break;
    }
#endif
    return allowed;
}

/// Distinct (package, core) pairs of these processors; their number where the topology is hidden.
int distinct_cores(const std::vector<int>& processors) {
    std::set<std::string> cores;
    for (const int i : processors) {
        const std::string base = "/sys/devices/system/cpu/cpu" + std::to_string(i) + "/topology/";
        const std::string core = first_line(base + "core_id");
        if (core.empty()) return static_cast<int>(processors.size());
        cores.insert(first_line(base + "physical_package_id") + "/" + first_line(base + "die_id") + "/" + core);
    }
    return static_cast<int>(cores.size());
}

std::vector<int> online_processors() {
    std::vector<int> online;
    std::istringstream ranges(first_line("/sys/devices/system/cpu/online"));  // 0-3,6
    for (std::string range; std::getline(ranges, range, ',');) {
        int first = 0, last = 0;
        char dash = 0;
        std::istringstream text(range);
        if (!(text >> first)) continue;
        if (!(text >> dash >> last)) last = first;
        for (int i = first; i <= last; ++i) online.push_back(i);
    }
    return online;
}

// ---- control groups

struct Mount {
    std::string root, point, type, options;
};

std::vector<Mount> cgroup_mounts(const std::string& prefix) {
    std::vector<Mount> mounts;
    std::ifstream file(prefix + "/proc/self/mountinfo");
    for (std::string line; std::getline(file, line);) {
        // id parent major:minor root point options [optional fields] - type source super-options
        const auto dash = line.find(" - ");
        if (dash == std::string::npos) continue;
        std::istringstream head(line), tail(line.substr(dash + 3));
        std::string skip, source;
        Mount mount;
        head >> skip >> skip >> skip >> mount.root >> mount.point;
        tail >> mount.type >> source >> mount.options;
        if (mount.type == "cgroup" || mount.type == "cgroup2") mounts.push_back(mount);
    }
    return mounts;
}

bool lists(const std::string& names, std::string_view name) {
    std::istringstream list(names);
    for (std::string item; std::getline(list, item, ',');)
        if (item == name) return true;
    return false;
}

std::optional<double> quota_v2(const std::filesystem::path& directory) {
    std::ifstream file(directory / "cpu.max");  // "max 100000" or "150000 100000"
    double quota = 0, period = 0;
    if (file >> quota >> period && quota > 0 && period > 0) return quota / period;
    return std::nullopt;
}

std::optional<double> quota_v1(const std::filesystem::path& directory) {
    double quota = 0, period = 0;  // quota -1: none
    if (std::ifstream(directory / "cpu.cfs_quota_us") >> quota &&
        std::ifstream(directory / "cpu.cfs_period_us") >> period && quota > 0 && period > 0)
        return quota / period;
    return std::nullopt;
}

/// `path` is relative to the hierarchy's root, `mount` may show only a part of it (a container sees its own).
std::optional<double> smallest_quota(const std::string& prefix, const Mount& mount, std::string path) {
    if (mount.root != "/" && path.compare(0, mount.root.size(), mount.root) == 0) path.erase(0, mount.root.size());
    const std::filesystem::path top = prefix + mount.point;
    std::error_code ignored;
    std::filesystem::path directory = (top / std::filesystem::path(path).relative_path()).lexically_normal();
    if (!std::filesystem::is_directory(directory, ignored)) directory = top;
    std::optional<double> smallest;
    for (;;) {
        const auto quota = mount.type == "cgroup2" ? quota_v2(directory) : quota_v1(directory);
        if (quota && (!smallest || *quota < *smallest)) smallest = quota;
        if (directory == top || !directory.has_relative_path() || directory == directory.parent_path()) return smallest;
        directory = directory.parent_path();
    }
}

}  // namespace

std::optional<double> cgroup_quota(const std::string& root) {
    std::optional<double> smallest;
    const std::vector<Mount> mounts = cgroup_mounts(root);
    std::ifstream file(root + "/proc/self/cgroup");
    for (std::string line; std::getline(file, line);) {  // 4:cpu,cpuacct:/path (version 1) or 0::/path (version 2)
        const auto first = line.find(':'), second = line.find(':', first + 1);
        if (second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        for (const Mount& mount : mounts) {
            const bool unified = controllers.empty() && mount.type == "cgroup2";
            const bool legacy = lists(controllers, "cpu") && mount.type == "cgroup" && lists(mount.options, "cpu");
            if (!unified && !legacy) continue;
            const auto quota = smallest_quota(root, mount, line.substr(second + 1));
            if (quota && (!smallest || *quota < *smallest)) smallest = quota;
        }
    }
    return smallest;
}

CpuInfo cpu_info() {
    CpuInfo info;
    info.model = brand();
    const int fallback = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    const std::vector<int> allowed = allowed_processors(), online = online_processors();
    info.affinity = allowed.empty() ? fallback : static_cast<int>(allowed.size());
    info.physical_cores = online.empty() ? fallback : distinct_cores(online);
    info.cgroup_quota = cgroup_quota();
    int threads = allowed.empty() ? info.physical_cores : std::min(distinct_cores(allowed), info.physical_cores);
    if (info.cgroup_quota) threads = std::min(threads, static_cast<int>(std::min(*info.cgroup_quota, 1e6)));
    info.default_threads = std::max(1, threads);
    return info;
}

int default_threads() { return cpu_info().default_threads; }

std::int64_t stream_ahead([[maybe_unused]] std::int64_t tokens) {
#if defined(__x86_64__)
    // Zen 4: what is asked for has its place in the first cache until it comes, and there are few such places. Zen 5
    // wants it twice as far (docs/performance.md).
    static const bool near = amd_family_19h();
    if (near) return tokens < 3 ? 5120 : 3072;
#endif
    return 8192;
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Kernels* table : tables()) names.emplace_back(table->name);
    return names;
}

const Kernels& kernels() {
    const Kernels* table = active.load(std::memory_order_acquire);
    return table ? *table : *tables().back();
}

void use_isa(std::string_view name) {
    std::string known;
    for (const Kernels* table : tables()) {
        if (name == table->name) {
            active.store(table, std::memory_order_release);
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(table->name);
    }
    const bool exists =
        name == "avx2" || name == "avxvnni" || name == "avx512" || name == "neon-dotprod" || name == "neon-i8mm";
    throw std::invalid_argument("instruction set '" + std::string(name) + "' " +
                                (exists ? "is not supported by this machine" : "is unknown") +
                                "; this machine supports: " + known);
}

}  // namespace cnl::cpu
