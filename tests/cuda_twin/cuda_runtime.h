// The part of CUDA's runtime that csrc/cuda uses, as host C++: a block's threads are fibers, and blocks run one by one.
//
// A thread runs until it waits at a barrier; who runs first is drawn from a seed, so that a missing barrier shows as
// results that change with the seed. A barrier that not every thread reaches aborts. Launches are checked as the driver
// checks them.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// One OS thread runs everything: what is local to it is shared by all fibers.
#define __shared__ thread_local

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
typedef void* cudaStream_t;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, blockDim;
constexpr size_t TWIN_SHARED = 48 * 1024;
extern thread_local uint4 shared_memory[];

namespace twin {

struct Launch {
    int64_t blocks, threads, shared;
    int device;
};

// What a test asks for and reads.
struct Control {
    uint64_t seed = 0;
    bool record = false;  // note launches, run none
    int fail = 0;         // the status of the next launch
    int device = 0;       // the current one
    void* stream = nullptr;  // of the last launch
    std::vector<Launch> launches;
};
inline Control control;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool done;
    static constexpr size_t STACK = 128 << 10;
};

// A barrier of `size` threads that also collects a bit from each.
struct Barrier {
    unsigned size, arrived = 0, generation = 0, collecting = 0, result = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Barrier> warps;
    Barrier all;
    ucontext_t scheduler;
    unsigned current = 0;
    bool progress = false;
    void (*body)(void*);
    void* argument;
};
inline Block block;

inline void enter() {
    block.body(block.argument);
    block.fibers[block.current].done = block.progress = true;
    swapcontext(&block.fibers[block.current].context, &block.scheduler);
}

inline unsigned wait(Barrier& barrier, unsigned bit) {
    const unsigned self = block.current, generation = barrier.generation;
    barrier.collecting |= bit;
    if (++barrier.arrived == barrier.size) {
        barrier.result = barrier.collecting;
        barrier.collecting = barrier.arrived = 0;
        ++barrier.generation;
        block.progress = true;
    }
    while (barrier.generation == generation) swapcontext(&block.fibers[self].context, &block.scheduler);
    return barrier.result;
}

inline void run_block(unsigned threads, std::mt19937_64& generator) {
    if (block.fibers.size() < threads) block.fibers.resize(threads);
    block.warps.assign((threads + 31) / 32, Barrier{32});
    block.all = Barrier{threads};
    for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = block.fibers[t];
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = Fiber::STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    for (unsigned left = threads; left > 0;) {
        std::shuffle(order.begin(), order.end(), generator);
        block.progress = false;
        left = 0;
        for (unsigned t : order) {
            if (block.fibers[t].done) continue;
            block.current = threadIdx.x = t;
            swapcontext(&block.scheduler, &block.fibers[t].context);
            left += !block.fibers[t].done;
        }
        if (left && !block.progress) {
            std::fprintf(stderr, "twin: %u threads of block %u wait at a barrier that others never reach\n", left,
                         blockIdx.x);
            std::abort();
        }
    }
}

}  // namespace twin

inline void __syncthreads() { twin::wait(twin::block.all, 0); }
inline unsigned __ballot_sync(unsigned, bool bit) {
    return twin::wait(twin::block.warps[threadIdx.x / 32], unsigned(bit) << threadIdx.x % 32);
}
inline int __ffs(int v) { return __builtin_ffs(v); }

inline cudaError_t cudaSetDevice(int device) {
    twin::control.device = device;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = 2;
    return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    *free = 0, *total = 1;
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t status) {
    return status == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "an error of the twin";
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const dim3 grid = config->gridDim;
    const unsigned threads = config->blockDim.x;
    const bool valid = grid.x > 0 && grid.x <= 0x7fffffffu && grid.y == 1 && grid.z == 1 && threads > 0 &&
                       threads % 32 == 0 && threads <= 1024 && config->dynamicSmemBytes <= TWIN_SHARED;
    if (!valid) return cudaErrorInvalidConfiguration;
    if (const int status = std::exchange(twin::control.fail, 0)) return cudaError_t(status);
    twin::control.launches.push_back({grid.x, threads, int64_t(config->dynamicSmemBytes), twin::control.device});
    twin::control.stream = config->stream;
    if (twin::control.record) return cudaSuccess;

    auto body = [&] { kernel(arguments...); };
    twin::block.body = [](void* f) { (*static_cast<decltype(body)*>(f))(); };
    twin::block.argument = &body;
    blockDim = config->blockDim;
    std::mt19937_64 generator(twin::control.seed);
    std::vector<unsigned> blocks(grid.x);
    std::iota(blocks.begin(), blocks.end(), 0u);
    std::shuffle(blocks.begin(), blocks.end(), generator);
    for (unsigned b : blocks) {
        blockIdx.x = b;
        // NaN in every type, beyond what was asked for too: nobody may read what nobody wrote.
        std::memset(shared_memory, 0xff, TWIN_SHARED);
        twin::run_block(threads, generator);
        const unsigned char* const bytes = reinterpret_cast<const unsigned char*>(shared_memory);
        for (size_t i = config->dynamicSmemBytes; i < TWIN_SHARED; ++i)
            if (bytes[i] != 0xff) {
                std::fprintf(stderr, "twin: byte %zu of %zu bytes of shared memory was written\n", i,
                             config->dynamicSmemBytes);
                std::abort();
            }
    }
    return cudaSuccess;
}
