// SPDX-License-Identifier: Apache-2.0
// What has threads or locks hears of fork(): in the child the other threads are gone, and what they held stays held.
#pragma once

namespace cnl {

class ForkAware {
 public:
    ForkAware();
    virtual ~ForkAware();
    ForkAware(const ForkAware&) = delete;
    ForkAware& operator=(const ForkAware&) = delete;

 protected:
    /// Runs in the child before fork() returns there, when it has one thread. Must not take memory or throw.
    virtual void after_fork() noexcept = 0;

 private:
    friend struct ForkList;
    ForkAware *previous_ = nullptr, *next_ = nullptr;
};

}  // namespace cnl
