// SPDX-License-Identifier: Apache-2.0
#include "own_pages.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace cnl::cpu {
namespace {

constexpr std::uintptr_t kLarge = std::uintptr_t(1) << 21;

std::uintptr_t up(std::uintptr_t address) { return (address + kLarge - 1) / kLarge * kLarge; }

void* pointer(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace

OwnPages::OwnPages([[maybe_unused]] const void* begin, [[maybe_unused]] std::size_t size) {
#ifdef MREMAP_FIXED
    const auto address = reinterpret_cast<std::uintptr_t>(begin);
    next_ = up(address);
    end_ = std::max(next_, (address + size) / kLarge * kLarge);
#endif
}

OwnPages::~OwnPages() {
    if (top_ > source_) munmap(pointer(source_), top_ - source_);
}

/// All new pages come out of one mapping in order, so that the system joins them to one again where they go.
bool OwnPages::reserve() {
    if (top_) return true;
    const std::size_t room = left() + kLarge;
    void* space = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) return false;
    const auto begin = reinterpret_cast<std::uintptr_t>(space);
    source_ = up(begin);
    top_ = begin + room;
    if (source_ > begin) munmap(space, source_ - begin);
#ifdef MADV_HUGEPAGE
    madvise(pointer(source_), left(), MADV_HUGEPAGE);  // advice only
#endif
    return true;
}

/// After a move that failed nobody knows whether the old pages are still there.
void OwnPages::fill_again(std::size_t size) const {
    void* place = mmap(pointer(next_), size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (place == MAP_FAILED) throw std::bad_alloc();
    std::memcpy(place, pointer(source_), size);
}

bool OwnPages::advance([[maybe_unused]] ThreadPool& pool, std::size_t bytes) {
    const std::size_t size = std::min(left(), up(std::max(bytes, std::size_t(1))));
    if (size == 0) return true;
#ifdef MREMAP_FIXED
    if (!reserve()) {
        end_ = next_;
        return false;
    }
    pool.run([&](Team& team) {
        team.parallel_for(static_cast<std::int64_t>(size / kLarge), 1, [&](std::int64_t first, std::int64_t last) {
            const auto begin = static_cast<std::uintptr_t>(first) * kLarge;
            std::memcpy(pointer(source_ + begin), pointer(next_ + begin),
                        static_cast<std::uintptr_t>(last - first) * kLarge);
        });
    });
    mprotect(pointer(source_), size, PROT_READ);
    // In one call the system takes the old pages away and puts the new ones there: a reader in between waits for it.
    if (mremap(pointer(source_), size, size, MREMAP_MAYMOVE | MREMAP_FIXED, pointer(next_)) == MAP_FAILED) {
        fill_again(size);
        end_ = next_;
        return false;
    }
    next_ += size;
    source_ += size;
#endif
    return true;
}

}  // namespace cnl::cpu
