// The forward update in place on y, and the projection Q = B A that gives S.
#pragma once

#include "arithmetic.h"
#include "geometry.h"

namespace adamss {

template <class X>
struct Update {
    int64_t M, RHO, r_max, stride_ym, rows, tiles_n;
    bool aligned;  // every row of y starts at a multiple of 16 bytes
    X* y;
    const Acc<X>* S;
    const Acc<X>* C;
    adamss_cuda_layout layout;
};

// y[m, i] += sum_{j < r_k(i)} S[m, off_k(i) + j] C[i, j]; y (M, N), S (M, RHO), C (N, r_max).
//
// A lane holds PACK columns of y, TOKENS rows at a time; S and C^T of the tile lie in shared memory where STAGED.
// Packs without an active row are neither read nor written.
template <class X, bool STAGED>
__global__ void __launch_bounds__(FORWARD_WARPS* WARP) delta_fwd_kernel(const Update<X> p) {
    using T = Acc<X>;
    constexpr int BLOCK_N = WARP * PACK<X>;
    const int64_t N = p.layout.N, tile_m = blockIdx.x / p.tiles_n, tile_n = blockIdx.x % p.tiles_n;
    const int64_t m0 = tile_m * p.rows, n0 = tile_n * BLOCK_N;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t i0 = n0 + lane * PACK<X>;
    const int columns = int(larger(smaller(N - i0, int64_t(PACK<X>)), int64_t(0)));

    int first[PACK<X>], rank[PACK<X>], longest = 0;
#pragma unroll
    for (int v = 0; v < PACK<X>; ++v) {
        first[v] = rank[v] = 0;
        if (v < columns) {
            const Span s = span_of(p.layout, p.layout.row_subspace[i0 + v], p.layout.active, nullptr);
            first[v] = s.first, rank[v] = s.last - s.first;
            longest = larger(longest, rank[v]);
        }
    }
    // Every warp of the block looks at the same columns, so all of them leave or none.
    if (__ballot_sync(ALL_LANES, longest > 0) == 0) return;

    const int64_t rows = smaller(p.rows, p.M - m0);
    T* const S_tile = reinterpret_cast<T*>(shared_memory);  // [rows, RHO]
    T* const Ct_tile = S_tile + p.rows * p.RHO;             // [r_max, PACK, WARP]: a warp reads 32 words in a row
    if (STAGED) {
        for (int64_t e = threadIdx.x; e < rows * p.RHO; e += blockDim.x) S_tile[e] = p.S[m0 * p.RHO + e];
        const int64_t entries = smaller(N - n0, int64_t(BLOCK_N)) * p.r_max;
        for (int64_t e = threadIdx.x; e < entries; e += blockDim.x) {
            const int i = int(e / p.r_max), j = int(e % p.r_max);
            Ct_tile[(j * PACK<X> + i % PACK<X>)*WARP + i / PACK<X>] = p.C[n0 * p.r_max + e];
        }
        __syncthreads();
    }
    if (longest == 0) return;

    const bool whole = p.aligned && columns == PACK<X>;
    for (int64_t m = warp * TOKENS; m < rows; m += FORWARD_WARPS * TOKENS) {
        X* const y = p.y + (m0 + m) * p.stride_ym + i0;
        T total[TOKENS][PACK<X>] = {};
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            if (m + t >= rows) continue;
            if (whole) {
                const Pack<X> pack = *reinterpret_cast<const Pack<X>*>(y + t * p.stride_ym);
#pragma unroll
                for (int v = 0; v < PACK<X>; ++v) total[t][v] = widen(pack.v[v]);
            } else {
#pragma unroll
                for (int v = 0; v < PACK<X>; ++v)
                    if (v < columns) total[t][v] = widen(y[t * p.stride_ym + v]);
            }
        }
        const T* S[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const int64_t row = smaller(m + t, rows - 1);
            S[t] = STAGED ? S_tile + row * p.RHO : p.S + (m0 + row) * p.RHO;
        }
        for (int j = 0; j < longest; ++j) {
#pragma unroll
            for (int v = 0; v < PACK<X>; ++v) {
                if (j >= rank[v]) continue;
                const T C = STAGED ? Ct_tile[(j * PACK<X> + v) * WARP + lane] : p.C[(i0 + v) * p.r_max + j];
#pragma unroll
                for (int t = 0; t < TOKENS; ++t) total[t][v] += S[t][first[v] + j] * C;
            }
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            if (m + t >= rows) continue;
            if (whole) {
                Pack<X> pack;
#pragma unroll
                for (int v = 0; v < PACK<X>; ++v) store(&pack.v[v], total[t][v]);
                *reinterpret_cast<Pack<X>*>(y + t * p.stride_ym) = pack;
            } else {
#pragma unroll
                for (int v = 0; v < PACK<X>; ++v)
                    if (v < columns) store(&y[t * p.stride_ym + v], total[t][v]);
            }
        }
    }
}

template <class X, class A_t>
struct Projection {
    int64_t RHO, R, D, stride_ar, stride_ad, stride_a, tiles_d;
    const Acc<X>* B;
    const A_t* A;
    const A_t* a;
    X* Q;
    Acc<X>* q;
    adamss_cuda_layout layout;
};

constexpr int PROJECTION_THREADS = 128;
constexpr int PROJECTION_ROWS = 4;

// [Q | q] = B [A | a], zero where the subspace is pruned; B (RHO, R), A (R, D), a (R,), Q (RHO, D), q (RHO,).
//
// A thread owns column d of Q, d = D being q, in PROJECTION_ROWS rows. Without A the columns of B are copied.
template <class X, class A_t>
__global__ void __launch_bounds__(PROJECTION_THREADS) input_projection_kernel(const Projection<X, A_t> p) {
    using T = Acc<X>;
    const int64_t d = int64_t(blockIdx.x % p.tiles_d) * PROJECTION_THREADS + threadIdx.x;
    const int64_t c0 = int64_t(blockIdx.x / p.tiles_d) * PROJECTION_ROWS;
    if (d > p.D || (d == p.D && !p.q)) return;
    const A_t* const column = d < p.D ? p.A + d * p.stride_ad : p.a;
    const int64_t step = d < p.D ? p.stride_ar : p.stride_a;
    T total[PROJECTION_ROWS] = {};
    if (p.A) {
#pragma unroll 4
        for (int64_t r = 0; r < p.R; ++r) {
            const T A = widen(column[r * step]);
#pragma unroll
            for (int u = 0; u < PROJECTION_ROWS; ++u) total[u] += p.B[smaller(c0 + u, p.RHO - 1) * p.R + r] * A;
        }
    } else {
#pragma unroll
        for (int u = 0; u < PROJECTION_ROWS; ++u) total[u] = p.B[smaller(c0 + u, p.RHO - 1) * p.R + d];
    }
#pragma unroll
    for (int u = 0; u < PROJECTION_ROWS; ++u) {
        const int64_t c = c0 + u;
        if (c >= p.RHO) continue;
        const bool on = !p.layout.active || p.layout.active[subspace_of_column(p.layout, c)];
        if (d < p.D)
            store(&p.Q[c * p.D + d], on ? total[u] : T(0));
        else
            p.q[c] = on ? total[u] : T(0);
    }
}

}  // namespace adamss
