// SPDX-License-Identifier: Apache-2.0
// One thread at a time in an engine; the others wait. What a fork leaves behind is told in one sentence.
#pragma once

#include <mutex>
#include <new>
#include <stdexcept>

#include "fork.hpp"

namespace cnl {

/// A Lockable. lock() and try_lock() throw std::runtime_error in a forked child that cannot use the engine: when a
/// thread that does not exist there was in the middle of a call, and always when `of_process`, as a GPU's memory is.
class EngineLock final : public ForkAware {
 public:
    explicit EngineLock(bool of_process) : of_process_(of_process) {}

    void lock() {
        refuse_lost();
        mutex_.lock();
        held_ = true;
    }
    bool try_lock() {
        refuse_lost();
        if (!mutex_.try_lock()) return false;
        held_ = true;
        return true;
    }
    void unlock() {
        held_ = false;
        mutex_.unlock();
    }

 private:
    void after_fork() noexcept override {
        lost_ = lost_ || held_ || of_process_;
        held_ = false;
        new (&mutex_) std::mutex;  // may be locked for ever
    }
    void refuse_lost() const {
        if (!lost_) return;
        throw std::runtime_error(
            of_process_
                ? "a forked process cannot use its parent's GPU memory: open the model in the child, or start it "
                  "with spawn"
                : "this process was forked in the middle of a step: open the model again in the child");
    }

    const bool of_process_;
    bool held_ = false, lost_ = false;  // held_ is written under the mutex, lost_ in a process of one thread
    std::mutex mutex_;
};

}  // namespace cnl
