// SPDX-License-Identifier: Apache-2.0
#include "threads.hpp"

#include <atomic>
#include <chrono>
#include <exception>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "../fork.hpp"

namespace cnl {
namespace {

constexpr auto kSpinTime = std::chrono::microseconds(100);
constexpr std::align_val_t kAlign{64};

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

/// Returns once `word` differs from `old`: spins first, because the others are usually microseconds away, then sleeps,
/// because on a busy machine spinning would take the time from the very thread that is waited for.
void wait_change(const std::atomic<std::uint32_t>& word, std::uint32_t old) {
    const auto stop = std::chrono::steady_clock::now() + kSpinTime;
    do {
        for (int i = 0; i < 64; ++i) {
            if (word.load(std::memory_order_acquire) != old) return;
            pause();
        }
    } while (std::chrono::steady_clock::now() < stop);
    word.wait(old, std::memory_order_acquire);
}

/// Thrown at the barriers of a run in which another thread has failed; never leaves the pool.
struct Abandoned {};

struct alignas(64) Cursor {
    std::atomic<std::int64_t> next{0};
};

}  // namespace

struct ThreadPool::State final : ForkAware {
    int size = 1;
    std::vector<std::thread> workers;
    std::mutex one_run;

    alignas(64) std::atomic<std::uint32_t> epoch{0};  // a new number: a new job, or the end
    alignas(64) std::atomic<std::uint32_t> running{0};
    alignas(64) std::atomic<std::uint32_t> arrived{0};
    alignas(64) std::atomic<std::uint32_t> generation{0};
    std::unique_ptr<Cursor[]> cursors;

    const std::function<void(Team&)>* job = nullptr;
    bool stopping = false;
    std::atomic<bool> failed{false};
    std::mutex failure_mutex;
    std::exception_ptr failure;
    std::atomic<std::int64_t> barriers{0};

    std::byte* scratch = nullptr;
    std::size_t scratch_bytes = 0;
    std::vector<std::atomic<std::uint32_t>> counters;

    ~State() override { ::operator delete(scratch, kAlign); }

    void execute(ThreadPool& pool, int index) {
        Team team(pool, index);
        try {
            (*job)(team);
        } catch (const Abandoned&) {
        } catch (...) {
            const std::scoped_lock lock(failure_mutex);
            if (!failure) failure = std::current_exception();
            failed.store(true, std::memory_order_release);
            generation.fetch_add(1, std::memory_order_release);
            generation.notify_all();
        }
    }

    void work(ThreadPool& pool, int index) {
        for (std::uint32_t seen = 0;;) {
            wait_change(epoch, seen);
            seen = epoch.load(std::memory_order_acquire);
            if (stopping) return;
            execute(pool, index);
            if (running.fetch_sub(1, std::memory_order_acq_rel) == 1) running.notify_all();
        }
    }

    void start(ThreadPool& pool) {
        stopping = false;
        epoch.store(0, std::memory_order_relaxed);
        try {
            while (static_cast<int>(workers.size()) + 1 < size) {
                const int index = static_cast<int>(workers.size()) + 1;
                workers.emplace_back([this, &pool, index] { work(pool, index); });
            }
        } catch (const std::system_error& error) {
            stop();
            throw ThreadError(std::to_string(size) + " threads cannot be started (" + error.code().message() +
                              "): use fewer, or raise the limit of processes (ulimit -u)");
        } catch (...) {
            stop();
            throw;
        }
    }

    void stop() {
        stopping = true;
        epoch.fetch_add(1, std::memory_order_release);
        epoch.notify_all();
        for (std::thread& worker : workers) worker.join();
        workers.clear();
    }

    /// The workers do not exist here: they can be neither joined nor told. What a run has not cleared in a parent that
    /// was in the middle of one is cleared here.
    void after_fork() noexcept override {
        new (&workers) std::vector<std::thread>;
        new (&one_run) std::mutex;
        new (&failure_mutex) std::mutex;
        new (&failure) std::exception_ptr;
        for (auto& counter : counters) counter.store(0, std::memory_order_relaxed);
    }
};

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>()) {
    if (threads < 1)
        throw std::invalid_argument("a thread pool needs at least 1 thread, not " + std::to_string(threads));
    state_->size = threads;
    state_->cursors = std::make_unique<Cursor[]>(static_cast<std::size_t>(threads));
    state_->start(*this);
}

ThreadPool::~ThreadPool() { state_->stop(); }

int ThreadPool::size() const { return state_->size; }

std::int64_t ThreadPool::barriers() const { return state_->barriers.load(std::memory_order_relaxed); }

void ThreadPool::run(const std::function<void(Team&)>& job) {
    State& s = *state_;
    const std::scoped_lock lock(s.one_run);
    if (static_cast<int>(s.workers.size()) + 1 < s.size) s.start(*this);
    s.job = &job;
    s.failed.store(false, std::memory_order_relaxed);
    s.arrived.store(0, std::memory_order_relaxed);
    for (int i = 0; i < s.size; ++i) s.cursors[static_cast<std::size_t>(i)].next.store(0, std::memory_order_relaxed);
    const auto others = static_cast<std::uint32_t>(s.size - 1);
    s.running.store(others, std::memory_order_relaxed);
    if (others > 0) {
        s.epoch.fetch_add(1, std::memory_order_release);
        s.epoch.notify_all();
    }
    s.execute(*this, 0);
    for (std::uint32_t left; (left = s.running.load(std::memory_order_acquire)) != 0;) wait_change(s.running, left);
    if (!s.failure) return;
    for (auto& counter : s.counters) counter.store(0, std::memory_order_relaxed);  // left in the middle of an op
    std::rethrow_exception(std::exchange(s.failure, nullptr));
}

int Team::size() const { return pool_.state_->size; }

void Team::barrier() {
    ThreadPool::State& s = *pool_.state_;
    const std::uint32_t generation = s.generation.load(std::memory_order_acquire);
    if (s.failed.load(std::memory_order_acquire)) throw Abandoned();
    if (s.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<std::uint32_t>(s.size)) {
        s.arrived.store(0, std::memory_order_relaxed);
        for (int i = 0; i < s.size; ++i)
            s.cursors[static_cast<std::size_t>(i)].next.store(0, std::memory_order_relaxed);
        s.barriers.fetch_add(1, std::memory_order_relaxed);
        s.generation.fetch_add(1, std::memory_order_release);
        s.generation.notify_all();
        return;
    }
    wait_change(s.generation, generation);
    if (s.failed.load(std::memory_order_acquire)) throw Abandoned();
}

/// Parts are the count split evenly; `victim` counts how many parts this thread has seen the end of.
bool Team::claim(std::int64_t count, std::int64_t grain, int& victim, Piece& piece) {
    ThreadPool::State& s = *pool_.state_;
    for (; victim < s.size; ++victim) {
        const std::int64_t part = (index_ + victim) % s.size;
        const std::int64_t begin = count * part / s.size, end = count * (part + 1) / s.size;
        const std::int64_t offset =
            s.cursors[static_cast<std::size_t>(part)].next.fetch_add(grain, std::memory_order_relaxed);
        if (offset >= end - begin) continue;
        piece.begin = begin + offset;
        piece.end = piece.begin + grain < end ? piece.begin + grain : end;
        return true;
    }
    return false;
}

template <typename Grow>
void Team::grow_together(bool enough, Grow&& grow) {
    if (enough) return;
    barrier();  // all have seen that it is too small
    if (index_ == 0) grow();
    barrier();
}

std::byte* Team::scratch(std::size_t bytes) {
    ThreadPool::State& s = *pool_.state_;
    grow_together(bytes <= s.scratch_bytes, [&] {
        const std::size_t size = bytes + bytes / 2;  // it grows with the context: not at every step
        std::byte* larger = static_cast<std::byte*>(::operator new(size, kAlign));
        ::operator delete(s.scratch, kAlign);
        s.scratch = larger;
        s.scratch_bytes = size;
    });
    return s.scratch;
}

std::atomic<std::uint32_t>* Team::counters(std::size_t count) {
    ThreadPool::State& s = *pool_.state_;
    grow_together(count <= s.counters.size(),
                  [&] { s.counters = std::vector<std::atomic<std::uint32_t>>(count + count / 2); });
    return s.counters.data();
}

}  // namespace cnl
