// SPDX-License-Identifier: Apache-2.0
// A range of a file's map, moved little by little to memory of the process's own, at the same addresses and with the
// same bytes. Page caches hold a file that was just written in small pages, and reading through their page tables costs
// decoding a fifth of its speed; large pages of the process's own do not.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../threads.hpp"

namespace cnl::cpu {

/// Whoever reads the range meanwhile reads the same bytes, in the old pages or in the new ones. Incomplete large pages
/// at both ends stay where they are. On systems other than Linux nothing is ever moved.
class OwnPages {
 public:
    /// Takes nothing yet. The range must be mapped as long as this lives.
    OwnPages(const void* begin, std::size_t size);
    ~OwnPages();
    OwnPages(const OwnPages&) = delete;
    OwnPages& operator=(const OwnPages&) = delete;

    /// Bytes that have not been moved.
    std::size_t left() const { return static_cast<std::size_t>(end_ - next_); }

    /// Moves at least `bytes` more, or what is left, with all threads of the pool. When the system refuses, the rest
    /// stays in the map for good: left() is 0 then, too, and false is returned.
    bool advance(ThreadPool& pool, std::size_t bytes);

 private:
    bool reserve();
    void fill_again(std::size_t size) const;

    std::uintptr_t next_ = 0, end_ = 0;    // of the range, multiples of the large page
    std::uintptr_t source_ = 0, top_ = 0;  // the new pages from the next one on, until each gets its place
};

}  // namespace cnl::cpu
