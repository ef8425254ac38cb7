// The last steps of backward behind `token_products`: sums of parts, masks, and dB through x.
#pragma once

#include "arithmetic.h"
#include "geometry.h"

namespace adamss {

struct Finish {
    int64_t RHO, RHO_PAD, R, D, r_max, splits;
    int64_t count_dC, count_dB, count_G;  // entries to write of each
    const float* dy_parts;                // (splits, N, RHO_PAD)
    const float* z_parts;                 // (splits, R, RHO_PAD) of P, or (splits, D, RHO_PAD) of x
    const float* sum_parts;               // (splits, RHO_PAD) or null
    float* dC;                            // (N, r_max)
    float* dB;                            // (RHO, R)
    float* G;                             // (D + 1, RHO_PAD): x^T dS, and the sum of dS
    adamss_cuda_layout layout;

    int64_t blocks() const;
};

constexpr int FINISH_THREADS = 256;

inline int64_t Finish::blocks() const { return cdiv(count_dC + count_dB + count_G, FINISH_THREADS); }

// G where dB goes through x, else null.
inline Finish describe_finish(const adamss_cuda_fused_args& args, const float* dy_parts, const float* z_parts,
                              const float* sum_parts, int64_t splits, float* G) {
    Finish p = {};
    p.RHO = args.RHO, p.RHO_PAD = args.RHO_PAD, p.R = args.R, p.D = args.D, p.r_max = args.r_max, p.splits = splits;
    p.count_dC = args.dC ? args.layout.N * args.r_max : 0;
    p.count_dB = args.dB && !G ? args.R * args.RHO_PAD : 0;
    p.count_G = G ? (args.D + 1) * args.RHO_PAD : 0;
    p.dy_parts = dy_parts, p.z_parts = z_parts, p.sum_parts = sum_parts;
    p.dC = static_cast<float*>(args.dC), p.dB = static_cast<float*>(args.dB), p.G = G;
    p.layout = args.layout;
    return p;
}

// sum_t parts[t] at e; parts (splits, size), in the order of t.
__device__ inline float sum_of_parts(const float* parts, int64_t size, int64_t splits, int64_t e) {
    float total = 0;
#pragma unroll 8
    for (int64_t t = 0; t < splits; ++t) total += parts[t * size + e];
    return total;
}

__device__ inline bool learns(const adamss_cuda_layout& l, int64_t c) {
    if (!l.active && !l.trainable) return true;
    const int k = subspace_of_column(l, c);
    return (!l.active || l.active[k]) && (!l.trainable || l.trainable[k]);
}

// dC and dB = (z_parts)^T, zero where not both active and trainable; or G, from which `dB_kernel` goes on.
__global__ void __launch_bounds__(FINISH_THREADS) finish_kernel(const Finish p) {
#ifdef ADAMSS_FOR_HOPPER
    ADAMSS_WAIT_FOR_PREVIOUS_KERNEL;
    int64_t e = int64_t(blockIdx.x) * FINISH_THREADS + threadIdx.x;
    if (e < p.count_dC) {
        const int64_t i = e / p.r_max, j = e % p.r_max;
        const Span s = span_of(p.layout, p.layout.row_subspace[i], p.layout.active, p.layout.trainable);
        const int64_t c = s.first + j;
        p.dC[e] = c < s.last ? sum_of_parts(p.dy_parts, p.layout.N * p.RHO_PAD, p.splits, i * p.RHO_PAD + c) : 0.f;
        return;
    }
    e -= p.count_dC;
    if (e < p.count_dB) {
        const int64_t r = e / p.RHO_PAD, c = e % p.RHO_PAD;
        if (c >= p.RHO) return;
        const float total = sum_of_parts(p.z_parts, p.R * p.RHO_PAD, p.splits, e);
        p.dB[c * p.R + r] = learns(p.layout, c) ? total : 0.f;
        return;
    }
    e -= p.count_dB;
    const int64_t size = p.D * p.RHO_PAD;
    if (e < size && e < p.count_G)
        p.G[e] = sum_of_parts(p.z_parts, size, p.splits, e);
    else if (e < p.count_G)
        p.G[e] = p.sum_parts ? sum_of_parts(p.sum_parts, p.RHO_PAD, p.splits, e - size) : 0.f;
#endif
}

template <class A_t>
struct ThroughInput {
    int64_t RHO, RHO_PAD, R, D, stride_ar, stride_ad, stride_a;
    const float* G;  // (D + 1, RHO_PAD)
    const A_t* A;    // null: dB is the transpose of G
    const A_t* a;
    float* dB;  // (RHO, R)
    adamss_cuda_layout layout;
};

constexpr int THROUGH_WARPS = 32;

// dB = G^T A^T + g a^T, zero where not both active and trainable: a block for a row r of A, a lane for a column of S.
template <class A_t>
__global__ void __launch_bounds__(THROUGH_WARPS* WARP) dB_kernel(const ThroughInput<A_t> p) {
#ifdef ADAMSS_FOR_HOPPER
    float* const shares = reinterpret_cast<float*>(shared_memory);  // [THROUGH_WARPS, RHO_PAD]
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t r = blockIdx.x, own = threadIdx.x;
    const bool on = own < p.RHO && learns(p.layout, own);
    ADAMSS_WAIT_FOR_PREVIOUS_KERNEL;
    for (int64_t c = lane; c < p.RHO_PAD; c += WARP) {
        float total = 0;
        if (p.A) {
#pragma unroll 8
            for (int64_t d = warp; d < p.D; d += THROUGH_WARPS)
                total += p.G[d * p.RHO_PAD + c] * widen(p.A[r * p.stride_ar + d * p.stride_ad]);
        } else if (warp == 0) {
            total = p.G[r * p.RHO_PAD + c];
        }
        if (warp == 0 && p.a) total += p.G[p.D * p.RHO_PAD + c] * widen(p.a[r * p.stride_a]);
        shares[warp * p.RHO_PAD + c] = total;
    }
    __syncthreads();
    if (own >= p.RHO) return;
    float total = 0;
    for (int w = 0; w < THROUGH_WARPS; ++w) total += shares[w * p.RHO_PAD + own];
    p.dB[own * p.R + r] = on ? total : 0.f;
#endif
}

template <class A_t>
ThroughInput<A_t> describe_through_input(const adamss_cuda_fused_args& args, const float* G) {
    ThroughInput<A_t> p = {};
    p.RHO = args.RHO, p.RHO_PAD = args.RHO_PAD, p.R = args.R, p.D = args.D;
    p.stride_ar = args.stride_ar, p.stride_ad = args.stride_ad, p.stride_a = args.stride_a;
    p.G = G;
    p.A = static_cast<const A_t*>(args.A);
    p.a = static_cast<const A_t*>(args.a);
    p.dB = static_cast<float*>(args.dB);
    p.layout = args.layout;
    return p;
}

}  // namespace adamss
