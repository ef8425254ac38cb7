// What `low_rank_gemm` and `token_products` take besides their large operands, made in one launch.
#pragma once

#include "arithmetic.h"
#include "geometry.h"

namespace adamss {

// `columns` values a row, in rows of `width`: the rest is zero.
template <class From, class To>
struct Padding {
    int64_t rows, columns, width;
    const From* from;
    To* to;
};

template <class X, class A_t>
struct Prepare {
    int64_t RHO, R, D, r_max, stride_ar, stride_ad, stride_a;
    int64_t blocks_Q, blocks_Ct, blocks_S, blocks_P;
    const float* B;
    const A_t* A;
    const A_t* a;
    const float* C;
    const X* bias;
    X* Q;      // (RHO_PAD, D)
    float* q;  // (RHO_PAD,)
    X* Ct;     // (RHO_PAD, N)
    Padding<float, X> S;
    Padding<X, X> P;
    adamss_cuda_layout layout;
};

constexpr int PREPARE_THREADS = 256;
constexpr int PREPARE_WARPS = PREPARE_THREADS / WARP;
constexpr int PREPARE_DEPTH = 128;  // of the sum over R at a time
constexpr int PREPARE_LOADS = 16;   // under way at a time: each alone would wait for memory
constexpr int PREPARE_ROWS = 32;    // of Q that are summed over warps at a time

// In shared memory: B^T with rows of RHO_PAD + 4, or the warps' sums of PREPARE_ROWS rows; then which columns count.
template <int RHO_PAD>
constexpr int PREPARE_FLOATS = larger(PREPARE_DEPTH * (RHO_PAD + 4), PREPARE_WARPS* PREPARE_ROWS* WARP);
template <int RHO_PAD>
constexpr int64_t PREPARE_SHARED = (PREPARE_FLOATS<RHO_PAD> + RHO_PAD) * 4;

// A block has WARP columns of Q; its warps share the sum over R.
template <int RHO_PAD, class X, class A_t>
__device__ void prepare_Q(const Prepare<X, A_t>& p, int64_t block) {
    constexpr int SHARE = PREPARE_DEPTH / PREPARE_WARPS, STRIDE = RHO_PAD + 4;
    float* const Bt = reinterpret_cast<float*>(shared_memory);
    int* const on = reinterpret_cast<int*>(Bt + PREPARE_FLOATS<RHO_PAD>);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t d = block * WARP + lane;  // the column after the last one is q
    for (int k = int(threadIdx.x); k < p.layout.K; k += PREPARE_THREADS)
        for (int c = p.layout.offsets[k]; c < p.layout.offsets[k + 1]; ++c)
            on[c] = !p.layout.active || p.layout.active[k];
    float total[RHO_PAD] = {};
    for (int64_t r0 = 0; p.A && r0 < p.R; r0 += PREPARE_DEPTH) {
        float A[SHARE];
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            const int64_t r = r0 + warp + PREPARE_WARPS * i;
            A[i] = 0;
            if (r < p.R && d < p.D) A[i] = widen(p.A[r * p.stride_ar + d * p.stride_ad]);
            if (r < p.R && d == p.D && p.a) A[i] = widen(p.a[r * p.stride_a]);
        }
        for (int base = int(threadIdx.x); base < RHO_PAD * PREPARE_DEPTH; base += PREPARE_LOADS * PREPARE_THREADS) {
            float B[PREPARE_LOADS];
#pragma unroll
            for (int v = 0; v < PREPARE_LOADS; ++v) {
                const int e = base + v * PREPARE_THREADS, c = e / PREPARE_DEPTH;
                const int64_t r = r0 + e % PREPARE_DEPTH;
                B[v] = c < p.RHO && r < p.R ? p.B[c * p.R + r] : 0.f;
            }
#pragma unroll
            for (int v = 0; v < PREPARE_LOADS; ++v) {
                const int e = base + v * PREPARE_THREADS;
                Bt[e % PREPARE_DEPTH * STRIDE + e / PREPARE_DEPTH] = B[v];
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            const float4* const row = reinterpret_cast<const float4*>(Bt + (warp + PREPARE_WARPS * i) * STRIDE);
#pragma unroll
            for (int c = 0; c < RHO_PAD; c += 4) {
                const float4 b = row[c / 4];
                total[c] += A[i] * b.x, total[c + 1] += A[i] * b.y, total[c + 2] += A[i] * b.z,
                    total[c + 3] += A[i] * b.w;
            }
        }
        __syncthreads();
    }
    ADAMSS_LET_NEXT_KERNEL_START;
    float* const shares = Bt;  // [PREPARE_WARPS, PREPARE_ROWS, WARP]
#pragma unroll
    for (int base = 0; base < RHO_PAD; base += PREPARE_ROWS) {
        constexpr int OWN = PREPARE_ROWS / PREPARE_WARPS;
#pragma unroll
        for (int c = 0; c < PREPARE_ROWS; ++c)
            if (base + c < RHO_PAD) shares[(warp * PREPARE_ROWS + c) * WARP + lane] = total[base + c];
        __syncthreads();
#pragma unroll
        for (int u = 0; u < OWN; ++u) {
            const int row = warp * OWN + u, c = base + row;
            float value = 0;
            for (int w = 0; w < PREPARE_WARPS; ++w) value += shares[(w * PREPARE_ROWS + row) * WARP + lane];
            if (c >= RHO_PAD || d > p.D) continue;
            if (!p.A && c < p.RHO && d < p.D) value = p.B[c * p.R + d];
            if (c >= p.RHO || !on[c]) value = 0;
            // The column of S after the last one is 1 where there is a bias, which is that row of C^T.
            if (d < p.D)
                store(&p.Q[c * p.D + d], value);
            else
                p.q[c] = c == p.RHO && p.bias ? 1.f : value;
        }
        __syncthreads();
    }
}

// A thread has a column of C^T; its first coefficients are loaded before its subspace is known.
template <int RHO_PAD, class X, class A_t>
__device__ void prepare_Ct(const Prepare<X, A_t>& p, int64_t block) {
    constexpr int AHEAD = 4;
    const int64_t N = p.layout.N, i = block * PREPARE_THREADS + threadIdx.x;
    if (i >= N) return;
    const int k = p.layout.row_subspace[i];
    const float bias = p.bias ? widen(p.bias[i]) : 0.f;
    float C[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) C[j] = j < p.r_max ? p.C[i * p.r_max + j] : 0.f;
    const Span s = span_of(p.layout, k, p.layout.active, nullptr);
    ADAMSS_LET_NEXT_KERNEL_START;
#pragma unroll 16
    for (int c = 0; c < RHO_PAD; ++c) {
        const int j = c - s.first;
        float value = c == p.RHO ? bias : 0.f;
        if (j >= 0 && c < s.last) {
            value = j == 0 ? C[0] : j == 1 ? C[1] : j == 2 ? C[2] : C[3];
            if (j >= AHEAD) value = p.C[i * p.r_max + j];
        }
        store(&p.Ct[c * N + i], value);
    }
}

template <class From, class To>
__device__ void pad(const Padding<From, To>& p, int64_t block) {
    const int64_t first = block * PREPARE_LOADS * PREPARE_THREADS, count = p.rows * p.width;
    float value[PREPARE_LOADS];
#pragma unroll
    for (int v = 0; v < PREPARE_LOADS; ++v) {
        const int64_t e = first + v * PREPARE_THREADS + threadIdx.x;
        const int64_t row = e / p.width, column = e % p.width;
        value[v] = e < count && column < p.columns ? widen(p.from[row * p.columns + column]) : 0.f;
    }
    ADAMSS_LET_NEXT_KERNEL_START;
#pragma unroll
    for (int v = 0; v < PREPARE_LOADS; ++v) {
        const int64_t e = first + v * PREPARE_THREADS + threadIdx.x;
        if (e < count) store(&p.to[e], value[v]);
    }
}

// Q = B A and q = B a, zero in the rows of pruned subspaces; C^T, dense, likewise; S and P in rows of whole 16 bytes.
// The next kernel starts once the loads here are done: its own, of megabytes, would come before them.
// Columns of S are padded to RHO_PAD with zeros, but that a bias takes the first of the padding: 1 in q, itself in C^T.
//
// B (RHO, R), A (R, D), or none and Q = B, a (R,), C (N, r_max), S (M, RHO), P (M, R).
template <class X, class A_t, int RHO_PAD>
__global__ void __launch_bounds__(PREPARE_THREADS) prepare_kernel(const Prepare<X, A_t> p) {
    int64_t block = blockIdx.x;
    if (block < p.blocks_Q) return prepare_Q<RHO_PAD>(p, block);
    block -= p.blocks_Q;
    if (block < p.blocks_Ct) return prepare_Ct<RHO_PAD>(p, block);
    block -= p.blocks_Ct;
    if (block < p.blocks_S) return pad(p.S, block);
    pad(p.P, block - p.blocks_S);
}

}  // namespace adamss
