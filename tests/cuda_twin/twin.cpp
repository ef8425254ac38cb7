// csrc/cuda's own sources compiled as host C++, with what tests set and read of the pretended device.
#include <cuda_runtime.h>

alignas(16) thread_local uint4 shared_memory[TWIN_SHARED / sizeof(uint4)];

#include "launch.cu"

extern "C" {

void twin_set(uint64_t seed, int32_t record, int32_t fail) {
    twin::control.seed = seed;
    twin::control.record = record;
    twin::control.fail = fail;
    twin::control.launches.clear();
}

// Copies blocks, threads and shared bytes of up to `count` launches; returns how many there were since `twin_set`.
int64_t twin_launches(int64_t* out, int64_t count) {
    const auto& launches = twin::control.launches;
    for (int64_t i = 0; i < int64_t(launches.size()) && i < count; ++i) {
        out[3 * i] = launches[i].blocks;
        out[3 * i + 1] = launches[i].threads;
        out[3 * i + 2] = launches[i].shared;
    }
    return int64_t(launches.size());
}
}
