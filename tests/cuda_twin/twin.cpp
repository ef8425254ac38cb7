// csrc/cuda's own sources compiled as host C++, with what tests set and read of the pretended device.
#include <cuda_runtime.h>

alignas(16) thread_local uint4 shared_memory[TWIN_SHARED / sizeof(uint4)];

#include "launch.cu"

#include "finish.h"
#include "prepare.h"

namespace {

// hopper.cu's kernels around wgmma, which the twin has not; x and A in bfloat16.
using X = __nv_bfloat16;

template <class Kernel, class Parameters>
int32_t launch_fused(Kernel kernel, int64_t blocks, int threads, int64_t shared, const Parameters& p) {
    return launch(kernel, blocks, threads, shared, nullptr, p);
}

template <int RHO_PAD>
int32_t prepare(const adamss_cuda_fused_args& args, const Prepared<X>& to) {
    const auto p = describe_prepare<RHO_PAD, X, X>(args, static_cast<const X*>(args.bias), to);
    return launch_fused(prepare_kernel<X, X, RHO_PAD>, p.blocks(), PREPARE_THREADS, PREPARE_SHARED<RHO_PAD>, p);
}

}  // namespace

extern "C" {

void twin_set(uint64_t seed, int32_t record, int32_t fail) {
    twin::control.seed = seed;
    twin::control.record = record;
    twin::control.fail = fail;
    twin::control.launches.clear();
}

int32_t twin_prepare(const adamss_cuda_fused_args* args, void* Q, void* q, void* Ct, void* S, void* P) {
    const Prepared<X> to = {static_cast<X*>(Q), static_cast<X*>(Ct), static_cast<X*>(S), static_cast<X*>(P),
                            static_cast<float*>(q)};
    return args->RHO_PAD == 32 ? prepare<32>(*args, to) : prepare<64>(*args, to);
}

int32_t twin_finish(const adamss_cuda_fused_args* args, const float* dy_parts, const float* z_parts,
                    const float* sum_parts, int64_t splits, float* G) {
    const Finish p = describe_finish(*args, dy_parts, z_parts, sum_parts, splits, G);
    if (const int32_t status = launch_fused(finish_kernel, p.blocks(), FINISH_THREADS, 0, p)) return status;
    if (!G) return 0;
    return launch_fused(dB_kernel<X>, args->R, THROUGH_WARPS * WARP, THROUGH_WARPS * args->RHO_PAD * 4,
                        describe_through_input<X>(*args, G));
}

// The other kernels of hopper.cu need a GPU.
int32_t adamss_cuda_fused(const adamss_cuda_fused_args*) { return cudaErrorInvalidValue; }
int64_t adamss_cuda_fused_workspace(const adamss_cuda_fused_args*) { return 0; }

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
