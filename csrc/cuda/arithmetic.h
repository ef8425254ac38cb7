// Storage and arithmetic types, 16 bytes at a time, and what a row or a column knows of its subspace.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "interface.h"

// Dynamic shared memory; kernels divide it among themselves.
extern __shared__ uint4 shared_memory[];

// Lets the kernel after this one start, up to where it waits for this one to be done and to have written all.
#if __CUDA_ARCH__ >= 900
#define ADAMSS_LET_NEXT_KERNEL_START asm volatile("griddepcontrol.launch_dependents;")
#define ADAMSS_WAIT_FOR_PREVIOUS_KERNEL asm volatile("griddepcontrol.wait;" ::: "memory")
#else
#define ADAMSS_LET_NEXT_KERNEL_START (void)0
#define ADAMSS_WAIT_FOR_PREVIOUS_KERNEL (void)0
#endif

// Kernels that serve Hopper's alone are compiled for it alone, and for the host.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
#define ADAMSS_FOR_HOPPER 1
#endif

namespace adamss {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The type in which sums over X are kept.
template <class X>
struct accumulation {
    using type = float;
};
template <>
struct accumulation<double> {
    using type = double;
};
template <class X>
using Acc = typename accumulation<X>::type;

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void store(float* to, float v) { *to = v; }
__device__ inline void store(double* to, double v) { *to = v; }
__device__ inline void store(__half* to, float v) { *to = __float2half_rn(v); }
__device__ inline void store(__nv_bfloat16* to, float v) { *to = __float2bfloat16_rn(v); }

// What one 16-byte access moves.
template <class X>
constexpr int PACK = 16 / int(sizeof(X));

template <class X>
struct alignas(16) Pack {
    X v[PACK<X>];
};

template <class V>
__host__ __device__ constexpr V smaller(V a, V b) {
    return a < b ? a : b;
}
template <class V>
__host__ __device__ constexpr V larger(V a, V b) {
    return a > b ? a : b;
}

// Columns [first, last) of S, off_k to off_k+1: those that a row of subspace k reads. Empty where a mask is off.
struct Span {
    int first, last;
};

__device__ inline Span span_of(const adamss_cuda_layout& l, int k, const uint8_t* mask, const uint8_t* mask2) {
    const int first = l.offsets[k];
    const bool on = (!mask || mask[k]) && (!mask2 || mask2[k]);
    return {first, on ? l.offsets[k + 1] : first};
}

// The k with off_k <= c < off_k+1.
__device__ inline int subspace_of_column(const adamss_cuda_layout& l, int64_t c) {
    int64_t low = 0, high = l.K - 1;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (l.offsets[middle + 1] <= c)
            low = middle + 1;
        else
            high = middle;
    }
    return int(low);
}

}  // namespace adamss
