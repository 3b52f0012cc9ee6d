// SPDX-License-Identifier: Apache-2.0
// A small pool that runs one function on every thread at once (SPMD). A whole forward pass is one such run: the
// threads walk through the layers together and meet at barriers, so an op costs no fork and no join.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>

namespace cnl {

class ThreadPool;

/// What one thread of a run sees of the others. Only valid inside ThreadPool::run.
class Team {
 public:
    int index() const { return index_; }
    int size() const;

    /// Returns when every thread of the team has arrived. Spins for about 100 us, then sleeps.
    void barrier();

    /// Calls body(begin, end) over disjoint pieces of [0, count), each piece once, in pieces of about `grain` (>= 1).
    /// Every thread first walks through its own contiguous part, then helps the others with theirs. Ends with a
    /// barrier. Every thread must call it, in the same order.
    template <typename Body>
    void parallel_for(std::int64_t count, std::int64_t grain, Body&& body) {
        Piece piece;
        for (int victim = 0; claim(count, grain, victim, piece);) body(piece.begin, piece.end);
        barrier();
    }

    /// Memory of at least `bytes`, aligned to 64, that all threads share until the next call. Every thread must call
    /// it with the same size. It grows on demand (then it costs barriers) and is kept with the pool.
    std::byte* scratch(std::size_t bytes);

    /// `count` or more counters that all threads share, every one 0. Who uses them leaves them at 0. Calls as scratch.
    std::atomic<std::uint32_t>* counters(std::size_t count);

 private:
    friend class ThreadPool;
    struct Piece {
        std::int64_t begin = 0, end = 0;
    };
    Team(ThreadPool& pool, int index) : pool_(pool), index_(index) {}
    bool claim(std::int64_t count, std::int64_t grain, int& victim, Piece& piece);
    template <typename Grow>
    void grow_together(bool enough, Grow&& grow);
    ThreadPool& pool_;
    int index_;
};

/// Counts one of `parts` parts as done; true for the caller who did the last one: the results of all are readable to
/// it, and the counter is 0 again. Replaces a barrier where one piece of work follows on a few others.
inline bool last_part(std::atomic<std::uint32_t>& done, std::int64_t parts) {
    if (parts > 1 && done.fetch_add(1, std::memory_order_acq_rel) + 1 != static_cast<std::uint32_t>(parts))
        return false;
    done.store(0, std::memory_order_relaxed);
    return true;
}

/// The system starts no further thread.
struct ThreadError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class ThreadPool {
 public:
    /// `threads` >= 1, the caller's thread included. Throws std::invalid_argument otherwise, and ThreadError.
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const;

    /// Runs job(team) on every thread and returns when all are done. An exception of any thread that leaves its job is
    /// rethrown here; the others give up at their next barrier. In the child of a fork the threads are started again.
    void run(const std::function<void(Team&)>& job);

    /// Barriers passed since construction (one thread's count): the benchmark and a test read it.
    std::int64_t barriers() const;

 private:
    friend class Team;
    friend struct DeviceAccess;  // csrc/cuda
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace cnl
