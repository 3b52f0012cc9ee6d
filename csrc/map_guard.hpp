// SPDX-License-Identifier: Apache-2.0
// Maps of files that others may cut off or overwrite. Reading a page that is gone raises SIGBUS; here it becomes a page
// of zeros and a flag, so that whoever reads comes to the end of his work and can say what happened.
#pragma once

#include <atomic>
#include <cstddef>

namespace cnl::map_guard {

/// While it lives, reads of [begin, begin + size) survive. When one finds its page gone, the whole range becomes zeros
/// and damaged() true, in that order of need: nobody sees zeros before the flag. Throws std::runtime_error when more
/// ranges are watched than there is room for.
class Watch {
 public:
    Watch(const void* begin, std::size_t size);
    ~Watch();
    Watch(const Watch&) = delete;
    Watch& operator=(const Watch&) = delete;
    bool damaged() const;

 private:
    int slot_;
};

/// The flag of the range that holds `address`, valid as long as its Watch; null where none does.
const std::atomic<bool>* flag_of(const void* address);

}  // namespace cnl::map_guard
