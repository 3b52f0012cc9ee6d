// SPDX-License-Identifier: Apache-2.0
#include "bandwidth.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <vector>

#include "cpu_info.hpp"

namespace cnl::cpu {

double read_once(ThreadPool& pool, const std::uint8_t* data, std::int64_t bytes) {
    const std::int64_t lines = bytes / 64;
    std::atomic<std::uint64_t> sink{0};
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](Team& team) {
        const std::int64_t begin = lines * team.index() / team.size(), end = lines * (team.index() + 1) / team.size();
        sink += kernels().read_lines(data + begin * 64, end - begin, stream_ahead(1));
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double read_bandwidth(int threads, std::int64_t bytes, int rounds) {
    ThreadPool pool(threads);
    void* memory =
        mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(memory, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
#endif
    std::memset(memory, 1, static_cast<std::size_t>(bytes));

    std::vector<double> seconds;
    for (int round = 0; round < rounds; ++round)
        seconds.push_back(read_once(pool, static_cast<const std::uint8_t*>(memory), bytes));
    munmap(memory, static_cast<std::size_t>(bytes));
    std::nth_element(seconds.begin(), seconds.begin() + rounds / 2, seconds.end());
    return double(bytes) / seconds[static_cast<std::size_t>(rounds / 2)];
}

}  // namespace cnl::cpu
