// SPDX-License-Identifier: Apache-2.0
#include "map_guard.hpp"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

namespace cnl::map_guard {
namespace {

constexpr int kSlots = 4096;  // shards of a checkpoint, its adapters and a few models: some hundred at most

/// Free when end is 0. Written under a mutex, read by the signal handler: atomics that need no lock.
struct Slot {
    std::atomic<std::uintptr_t> begin{0}, end{0};
    std::atomic<bool> damaged{false};

    bool holds(std::uintptr_t address) const {
        return address >= begin.load(std::memory_order_acquire) && address < end.load(std::memory_order_acquire);
    }
};
static_assert(std::atomic<std::uintptr_t>::is_always_lock_free && std::atomic<bool>::is_always_lock_free);

std::array<Slot, kSlots> slots;
std::atomic<int> used{0};  // slots from here on have never been used
std::mutex mutex;
std::uintptr_t page_size;
struct sigaction previous;

Slot* find(std::uintptr_t address) {
    const int count = used.load(std::memory_order_acquire);
    for (int i = 0; i < count; ++i)
        if (slots[static_cast<std::size_t>(i)].holds(address)) return &slots[static_cast<std::size_t>(i)];
    return nullptr;
}

/// In a signal handler: system calls and atomics only. All of the range goes at once: its reader throws everything
/// away anyway, and one signal for each page of a large file would take seconds.
bool mend(Slot& slot) {
    const std::uintptr_t begin = slot.begin.load() / page_size * page_size;
    const std::uintptr_t end = (slot.end.load() + page_size - 1) / page_size * page_size;
    slot.damaged.store(true, std::memory_order_seq_cst);
    return mmap(reinterpret_cast<void*>(begin), end - begin, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != MAP_FAILED;
}

void handle(int signal, siginfo_t* info, void* context) {
    const int saved = errno;
    Slot* slot = info->si_code > 0 ? find(reinterpret_cast<std::uintptr_t>(info->si_addr)) : nullptr;
    const bool mended = slot && mend(*slot);
    errno = saved;
    if (mended) return;
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signal);
    } else {
        sigaction(SIGBUS, &previous, nullptr);  // the instruction runs again, and this time the process ends
        if (info->si_code <= 0) raise(signal);  // sent by a process: no instruction raises it
    }
}

void install() {
    page_size = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    struct sigaction action{};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous);
}

}  // namespace

Watch::Watch(const void* begin, std::size_t size) : slot_(-1) {
    static std::once_flag once;
    std::call_once(once, install);
    const std::scoped_lock lock(mutex);
    int free = 0;
    while (free < kSlots && slots[static_cast<std::size_t>(free)].end.load()) ++free;
    if (free == kSlots)
        throw std::runtime_error("more than " + std::to_string(kSlots) + " files are open: close some models first");
    Slot& slot = slots[static_cast<std::size_t>(free)];
    const auto address = reinterpret_cast<std::uintptr_t>(begin);
    slot.damaged.store(false);
    slot.begin.store(address);
    slot.end.store(address + size, std::memory_order_release);
    if (free == used.load()) used.store(free + 1, std::memory_order_release);
    slot_ = free;
}

Watch::~Watch() {
    const std::scoped_lock lock(mutex);
    slots[static_cast<std::size_t>(slot_)].end.store(0, std::memory_order_release);
}

bool Watch::damaged() const { return slots[static_cast<std::size_t>(slot_)].damaged.load(std::memory_order_acquire); }

const std::atomic<bool>* flag_of(const void* address) {
    const Slot* slot = find(reinterpret_cast<std::uintptr_t>(address));
    return slot ? &slot->damaged : nullptr;
}

}  // namespace cnl::map_guard
