// SPDX-License-Identifier: Apache-2.0
#include "bandwidth.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <vector>

#include "../threads.hpp"

namespace cnl::cpu {

namespace {

// Asks for every line 8 KiB ahead, as the matmul kernels do: left to the hardware alone, a loop reads a third less.
constexpr std::int64_t kAhead = 8192 / 8;

// Four independent sums keep enough loads in flight.
std::uint64_t sum_words(const std::uint64_t* words, std::int64_t count) {
    std::uint64_t a = 0, b = 0, c = 0, d = 0;
    for (std::int64_t i = 0; i + 8 <= count; i += 8) {
        __builtin_prefetch(words + i + kAhead);
        a += words[i] + words[i + 1];
        b += words[i + 2] + words[i + 3];
        c += words[i + 4] + words[i + 5];
        d += words[i + 6] + words[i + 7];
    }
    return a + b + c + d;
}

}  // namespace

double read_bandwidth(int threads, std::int64_t bytes, int rounds) {
    ThreadPool pool(threads);
    void* memory =
        mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(memory, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
#endif
    std::memset(memory, 1, static_cast<std::size_t>(bytes));

    const std::int64_t words = bytes / 8;
    const auto* data = static_cast<const std::uint64_t*>(memory);
    std::atomic<std::uint64_t> sink{0};
    std::vector<double> seconds;
    for (int round = 0; round < rounds; ++round) {
        const auto start = std::chrono::steady_clock::now();
        pool.run([&](Team& team) {
            const std::int64_t begin = words * team.index() / team.size(),
                               end = words * (team.index() + 1) / team.size();
            sink += sum_words(data + begin, end - begin);
        });
        seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    munmap(memory, static_cast<std::size_t>(bytes));
    std::nth_element(seconds.begin(), seconds.begin() + rounds / 2, seconds.end());
    return double(bytes) / seconds[static_cast<std::size_t>(rounds / 2)];
}

}  // namespace cnl::cpu
