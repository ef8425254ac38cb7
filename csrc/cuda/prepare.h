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

    int64_t blocks() const { return blocks_Q + blocks_Ct + blocks_S + blocks_P; }
};

// Where to; S and P may be null.
template <class X>
struct Prepared {
    X *Q, *Ct, *S, *P;
    float* q;
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
    // Loads without a branch between them are all under way at once: what lies outside is read inside, and dropped.
    const bool is_q = d == p.D, valid = d < p.D || (is_q && p.a);
    const A_t* const column = is_q && p.a ? p.a : p.A + smaller(d, p.D - 1) * p.stride_ad;
    const int64_t step = is_q && p.a ? p.stride_a : p.stride_ar;
    float total[RHO_PAD] = {};
    for (int64_t r0 = 0; p.A && r0 < p.R; r0 += PREPARE_DEPTH) {
        A_t raw[SHARE];
#pragma unroll
        for (int i = 0; i < SHARE; ++i) raw[i] = column[smaller(r0 + warp + PREPARE_WARPS * i, p.R - 1) * step];
        for (int base = int(threadIdx.x); base < RHO_PAD * PREPARE_DEPTH; base += PREPARE_LOADS * PREPARE_THREADS) {
            float B[PREPARE_LOADS];
#pragma unroll
            for (int v = 0; v < PREPARE_LOADS; ++v) {
                const int64_t e = base + v * PREPARE_THREADS, c = e / PREPARE_DEPTH, r = r0 + e % PREPARE_DEPTH;
                B[v] = p.B[smaller(c, p.RHO - 1) * p.R + smaller(r, p.R - 1)];
            }
#pragma unroll
            for (int v = 0; v < PREPARE_LOADS; ++v) {
                const int e = base + v * PREPARE_THREADS, c = e / PREPARE_DEPTH, r = e % PREPARE_DEPTH;
                if (c < RHO_PAD) Bt[r * STRIDE + c] = c < p.RHO && r0 + r < p.R ? B[v] : 0.f;
            }
        }
        float A[SHARE];
#pragma unroll
        for (int i = 0; i < SHARE; ++i) A[i] = valid ? widen(raw[i]) : 0.f;
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
    float C[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) C[j] = p.C[i * p.r_max + smaller(int64_t(j), p.r_max - 1)];
    const float bias = p.bias ? widen(p.bias[i]) : 0.f;
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
    const int64_t first = block * PREPARE_LOADS * PREPARE_THREADS, row0 = first / p.width;
    // From the start of that row on, 32 bits suffice, and dividing them takes no branch.
    const unsigned width = unsigned(p.width), begin = unsigned(first % p.width) + threadIdx.x;
    From value[PREPARE_LOADS];
#pragma unroll
    for (int v = 0; v < PREPARE_LOADS; ++v) {
        const unsigned e = begin + v * PREPARE_THREADS;
        const int64_t row = smaller(row0 + e / width, p.rows - 1);
        value[v] = p.from[row * p.columns + smaller(int64_t(e % width), p.columns - 1)];
    }
    ADAMSS_LET_NEXT_KERNEL_START;
#pragma unroll
    for (int v = 0; v < PREPARE_LOADS; ++v) {
        const unsigned e = begin + v * PREPARE_THREADS;
        if (row0 + e / width >= p.rows) continue;
        store(&p.to[row0 * p.width + e], e % width < p.columns ? widen(value[v]) : 0.f);
    }
}

// Q = B A and q = B a, zero in the rows of pruned subspaces; C^T, dense, likewise; S and P in rows of whole 16 bytes.
// The next kernel starts once the loads here are done: its own, of megabytes, would come before them.
// Columns of S are padded to RHO_PAD with zeros, but that a bias takes the first of the padding: 1 in q, itself in C^T.
//
// B (RHO, R), A (R, D), or none and Q = B, a (R,), C (N, r_max), S (M, RHO), P (M, R).
template <class X, class A_t, int RHO_PAD>
__global__ void __launch_bounds__(PREPARE_THREADS, 1) prepare_kernel(const Prepare<X, A_t> p) {
#ifdef ADAMSS_FOR_HOPPER
    int64_t block = blockIdx.x;
    if (block < p.blocks_Q) return prepare_Q<RHO_PAD>(p, block);
    block -= p.blocks_Q;
    if (block < p.blocks_Ct) return prepare_Ct<RHO_PAD>(p, block);
    block -= p.blocks_Ct;
    if (block < p.blocks_S) return pad(p.S, block);
    pad(p.P, block - p.blocks_S);
#endif
}

// Rows of P begin at multiples of 16 bytes.
inline int64_t padded_R(const adamss_cuda_fused_args& args) { return up(args.R, 8); }

template <int RHO_PAD, class X, class A_t>
Prepare<X, A_t> describe_prepare(const adamss_cuda_fused_args& args, const X* bias, const Prepared<X>& to) {
    Prepare<X, A_t> p = {};
    p.RHO = args.RHO, p.R = args.R, p.D = args.D, p.r_max = args.r_max;
    p.stride_ar = args.stride_ar, p.stride_ad = args.stride_ad, p.stride_a = args.stride_a;
    p.B = static_cast<const float*>(args.B);
    p.A = static_cast<const A_t*>(args.A);
    p.a = static_cast<const A_t*>(args.a);
    p.C = static_cast<const float*>(args.C);
    p.bias = bias;
    p.Q = to.Q, p.q = to.q, p.Ct = to.Ct;
    p.S = {to.S ? args.M : 0, args.RHO, RHO_PAD, static_cast<const float*>(args.S), to.S};
    p.P = {to.P ? args.M : 0, args.R, padded_R(args), static_cast<const X*>(args.P), to.P};
    p.layout = args.layout;
    p.blocks_Q = cdiv(args.D + 1, WARP);
    p.blocks_Ct = cdiv(args.layout.N, PREPARE_THREADS);
    p.blocks_S = cdiv(p.S.rows * p.S.width, PREPARE_LOADS * PREPARE_THREADS);
    p.blocks_P = cdiv(p.P.rows * p.P.width, PREPARE_LOADS * PREPARE_THREADS);
    return p;
}

}  // namespace adamss
