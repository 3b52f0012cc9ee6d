// SPDX-License-Identifier: Apache-2.0
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "ptx_emulated.hpp"

struct EmulatedEvent {};
struct EmulatedGraph {
    std::vector<std::function<void()>> nodes;
};
struct EmulatedGraphExec {
    std::vector<std::function<void()>> nodes;
};

emulator::Index threadIdx, blockIdx;
dim3 gridDim, blockDim;

namespace emulator {

struct Stream {
    EmulatedGraph* capture = nullptr;
};

namespace {

constexpr std::size_t kStackBytes = 128 * 1024;

struct Copy {
    void* to;
    const void* from;
};
struct Warp {
    int arrived = 0;
    long generation = 0;
    alignas(16) unsigned char slots[2][kLanes][64];
};
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
    bool done = true;
    int warp = 0, lane = 0;
    std::vector<std::vector<Copy>> groups;  // the last one is open
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
ucontext_t scheduler;
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
std::vector<unsigned char> shared_bytes;
int alive = 0, at_barrier = 0;
long barrier_generation = 0, events = 0;

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "emulator: %s in block (%u, %u, %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z);
    std::abort();
}

void yield() { swapcontext(&current->context, &scheduler); }

void release_barrier_if_full() {
    if (alive == 0 || at_barrier < alive) return;
    at_barrier = 0;
    ++barrier_generation;
    ++events;
}

void run_fiber() {
    (*body)();
    current->done = true;
    --alive;
    ++events;
    release_barrier_if_full();
    yield();
}

void finish(std::vector<Copy>& group) {
    for (const Copy& copy : group) std::memcpy(copy.to, copy.from, 16);
    group.clear();
}

/// 0 .. n - 1 in the order that the environment asks for.
std::vector<int> order_of(int n) {
    std::vector<int> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    const char* text = std::getenv("CNLLAMA_EMULATOR_ORDER");
    const std::string how = text ? text : "forward";
    if (how == "reverse")
        std::reverse(order.begin(), order.end());
    else if (how != "forward")
        std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<unsigned>(std::stoul(how))));
    return order;
}

void run_block(const std::vector<int>& order) {
    const auto n = static_cast<int>(order.size());
    while (static_cast<int>(fibers.size()) < n) fibers.push_back(std::make_unique<Fiber>());
    warps.assign(static_cast<std::size_t>((n + kLanes - 1) / kLanes), Warp{});
    std::fill(shared_bytes.begin(), shared_bytes.end(), static_cast<unsigned char>(0xff));
    alive = n;
    at_barrier = 0;
    for (int i = 0; i < n; ++i) {
        Fiber& f = *fibers[static_cast<std::size_t>(i)];
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = kStackBytes;
        f.context.uc_link = &scheduler;
        f.done = false;
        f.warp = i / kLanes;
        f.lane = i % kLanes;
        f.groups.assign(1, {});
        makecontext(&f.context, run_fiber, 0);
    }
    while (alive > 0) {
        const long before = events;
        for (const int i : order) {
            Fiber& f = *fibers[static_cast<std::size_t>(i)];
            if (f.done) continue;
            current = &f;
            threadIdx = {static_cast<unsigned>(i), 0, 0};
            swapcontext(&scheduler, &f.context);
        }
        if (events == before) fail("threads wait for each other, for good,");
    }
}

}  // namespace

unsigned char* shared_memory() { return shared_bytes.data(); }
int lane() { return current->lane; }

int round_to_int(float x) {
    if (x != x) return 0;
    const float rounded = nearbyintf(x);
    return rounded >= 2147483648.0f   ? 2147483647
           : rounded < -2147483648.0f ? -2147483647 - 1
                                      : static_cast<int>(rounded);
}

void sync_block() {
    const long generation = barrier_generation;
    ++at_barrier;
    ++events;
    release_barrier_if_full();
    while (barrier_generation == generation) yield();
}

const unsigned char* exchange(const void* own, std::size_t bytes) {
    Warp& warp = warps[static_cast<std::size_t>(current->warp)];
    const long generation = warp.generation;
    auto& slots = warp.slots[generation % 2];
    std::memcpy(slots[current->lane], own, bytes);
    ++events;
    if (++warp.arrived == kLanes) {
        warp.arrived = 0;
        ++warp.generation;
    }
    while (warp.generation == generation) yield();
    return slots[0];
}

void queue_copy(void* to, const void* from) {
    if (reinterpret_cast<std::uintptr_t>(to) % 16 || reinterpret_cast<std::uintptr_t>(from) % 16)
        fail("a copy of 16 bytes is not aligned");
    current->groups.back().push_back({to, from});
}
void commit() { current->groups.emplace_back(); }
void wait(int left) {
    auto& groups = current->groups;
    const int committed = static_cast<int>(groups.size()) - 1;
    for (int i = 0; i < committed - left; ++i) finish(groups[static_cast<std::size_t>(i)]);
    if (committed > left) groups.erase(groups.begin(), groups.begin() + (committed - left));
}

/// What was asked of the default stream and has not happened: streams made with cudaStreamNonBlocking do not wait for
/// it. It happens when somebody waits for it, or else at the worst time: after the next kernel of another stream.
std::vector<std::function<void()>> default_stream;
void finish_default_stream() {
    for (const auto& work : std::exchange(default_stream, {})) work();
}

void submit(Stream* stream, std::function<void()> work) {
    if (stream && stream->capture)
        stream->capture->nodes.push_back(std::move(work));
    else
        work();
}

int code_version() {
    const char* text = std::getenv("CNLLAMA_EMULATOR_CODE");
    return text ? std::atoi(text) : 90;
}

cudaError_t fault(const char* call) {
    static std::string known;
    static int calls = 0;
    static cudaError_t lost = cudaSuccess;
    const char* text = std::getenv("CNLLAMA_EMULATOR_FAULT");
    if (known != (text ? text : "")) {
        known = text ? text : "";
        calls = 0;
        lost = cudaSuccess;
    }
    if (known.empty() || lost) return lost;
    std::istringstream words(known);
    std::string wanted;
    int number = 0, code = 0;
    words >> wanted >> number >> code;
    if (wanted != call || ++calls != number) return cudaSuccess;
    const auto error = static_cast<cudaError_t>(code);
    if (code >= 700 && error != cudaErrorLaunchOutOfResources) lost = error;
    return error;
}

void run_grid(const dim3& grid, const dim3& block, std::size_t shared, const std::function<void()>& kernel) {
    gridDim = grid;
    blockDim = block;
    body = &kernel;
    shared_bytes = std::vector<unsigned char>(shared);
    const std::vector<int> threads = order_of(static_cast<int>(block.x));
    for (const int index : order_of(static_cast<int>(grid.x * grid.y * grid.z))) {
        const auto i = static_cast<unsigned>(index);
        blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
        run_block(threads);
    }
}

}  // namespace emulator

// ---- the run time's functions

namespace {

/// What CNLLAMA_EMULATOR_MEMORY leaves, in bytes.
std::size_t device_memory() {
    const char* text = std::getenv("CNLLAMA_EMULATOR_MEMORY");
    return text ? std::stoull(text) : std::size_t(8) << 30;
}
std::size_t taken = 0;
std::map<void*, std::size_t> sizes;

}  // namespace

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaErrorMemoryAllocation:
            return "cudaErrorMemoryAllocation";
        case cudaErrorIllegalAddress:
            return "cudaErrorIllegalAddress";
        case cudaErrorLaunchOutOfResources:
            return "cudaErrorLaunchOutOfResources";
        default:
            return "cudaErrorEmulated";
    }
}
const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
cudaError_t cudaRuntimeGetVersion(int* v) { return *v = 13000, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* v) { return *v = 13000, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    std::strcpy(p->name, "emulator");
    p->major = 9, p->minor = 0, p->multiProcessorCount = 4;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr, int) { return *v = 101376, cudaSuccess; }
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* all) {
    *all = device_memory();
    *free = *all > taken ? *all - taken : 0;
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** p, std::size_t bytes) {
    if (const cudaError_t error = emulator::fault("cudaMalloc")) return error;
    if (taken + bytes > device_memory()) return cudaErrorMemoryAllocation;
    *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(*p, 0xff, bytes);  // NaN
    sizes[*p] = bytes;
    taken += bytes;
    return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
    const auto found = sizes.find(p);
    if (found == sizes.end()) return cudaErrorInvalidValue;
    emulator::finish_default_stream();
    taken -= found->second;
    sizes.erase(found);
    std::free(p);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, std::size_t bytes, unsigned) {
    if (const cudaError_t error = emulator::fault("cudaHostAlloc")) return error;
    *p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) { return std::free(p), cudaSuccess; }
cudaError_t cudaMemset(void* p, int value, std::size_t n) {
    emulator::default_stream.push_back([=] { std::memset(p, value, n); });
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t n, cudaMemcpyKind kind) {
    if (kind == cudaMemcpyHostToDevice) {  // it returns when all is staged, not when it has arrived
        const std::vector<char> staged(static_cast<const char*>(from), static_cast<const char*>(from) + n);
        emulator::default_stream.push_back([=] { std::memcpy(to, staged.data(), n); });
        return cudaSuccess;
    }
    emulator::finish_default_stream();
    return std::memcpy(to, from, n), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t n, cudaMemcpyKind, cudaStream_t stream) {
    if (const cudaError_t error = emulator::fault("cudaMemcpyAsync")) return error;
    emulator::submit(stream, [=] { std::memcpy(to, from, n); });
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return *s = new emulator::Stream, cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return delete s, cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    if (stream == cudaStreamLegacy) emulator::finish_default_stream();
    return emulator::fault("cudaStreamSynchronize");
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode) {
    if (const cudaError_t error = emulator::fault("cudaStreamBeginCapture")) return error;
    return s->capture = new EmulatedGraph, cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* graph) {
    return *graph = std::exchange(s->capture, nullptr), cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
    if (const cudaError_t error = emulator::fault("cudaGraphInstantiate")) return error;
    return *exec = new EmulatedGraphExec{graph->nodes}, cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
    if (const cudaError_t error = emulator::fault("cudaGraphLaunch")) return error;
    for (const auto& node : exec->nodes) node();
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete exec, cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return *e = new EmulatedEvent, cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return delete e, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 1.0f, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    return *attributes = {emulator::code_version(), emulator::code_version()}, cudaSuccess;
}
