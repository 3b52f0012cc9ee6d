// SPDX-License-Identifier: Apache-2.0
#include "../memory.hpp"

#include <sys/mman.h>

#include <cstdio>
#include <stdexcept>
#include <string>

namespace cnl::memory {

void* reserve(std::size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        char size[32];
        std::snprintf(size, sizeof size, "%.2f GiB", double(bytes) / double(1u << 30));
        throw std::runtime_error(std::string(size) + " of address space are needed, which the system refuses");
    }
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE);  // advice only: a refusal changes speed, not results
#endif
    return p;
}

void release(void* p, std::size_t bytes) noexcept { munmap(p, bytes); }

}  // namespace cnl::memory
