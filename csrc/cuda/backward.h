// One pass over dy for dS and dC, and the sums of its parts: fixed order, no atomics.
#pragma once

#include <type_traits>

#include "arithmetic.h"
#include "geometry.h"

namespace adamss {

constexpr int RANK = 4;             // columns of S that one thread sums for at a time
constexpr int BACKWARD_BLOCKS = 6;  // on a multiprocessor: what shared memory lets in at RHO = 30

template <class X>
struct BackwardOperands {
    int64_t M, RHO, r_max, stride_dym, stride_dyn, tiles_m, blocks_rho, stretches, width;
    bool aligned;  // every row of dy starts at a multiple of 16 bytes and is contiguous
    const X* dy;
    const Acc<X>* S;
    const Acc<X>* C;
    X* dS;
    Acc<X>* dS_parts;
    Acc<X>* dC_parts;
    adamss_cuda_layout layout;
};

// A tile of dy in shared memory. A row is 64 words and one more, so that the lanes of a warp, whether on 32 rows of a
// column or on 32 columns of a row, fall on different banks.
template <class X>
struct TileOfDy {
    static constexpr int COLUMNS = int(TILE_BYTES / sizeof(X));
    using Word = std::conditional_t<sizeof(X) == 8, unsigned long long, unsigned>;
    static constexpr int STRIDE = COLUMNS + int(sizeof(Word) / sizeof(X));

    // dy[m0 : m0 + rows, n0 : n0 + COLUMNS], zero beyond the last token and the last row of C.
    __device__ static void stage(const BackwardOperands<X>& p, int64_t m0, int64_t n0, int rows, X* tile) {
        const X* const dy = p.dy + m0 * p.stride_dym + n0 * p.stride_dyn;
        if (p.aligned && n0 + COLUMNS <= p.layout.N) {
            // A warp takes 4 rows of 8 packs: whole cache lines, and 32 different banks for each word.
            constexpr int PACKS = int(TILE_BYTES / 16), WORDS = int(16 / sizeof(Word));
#pragma unroll 4
            for (int e = threadIdx.x; e < BACKWARD_ROWS * PACKS; e += BACKWARD_THREADS) {
                const int square = e / WARP, row = square / 2 * 4 + e % WARP / 8, pack = square % 2 * 8 + e % 8;
                uint4 four = {0, 0, 0, 0};
                if (row < rows) four = reinterpret_cast<const uint4*>(dy + row * p.stride_dym)[pack];
                Word* const to = reinterpret_cast<Word*>(tile + row * STRIDE) + pack * WORDS;
                if constexpr (WORDS == 4) {
                    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
                } else {
                    to[0] = Word(four.y) << 32 | four.x, to[1] = Word(four.w) << 32 | four.z;
                }
            }
            return;
        }
        for (int e = threadIdx.x; e < BACKWARD_ROWS * COLUMNS; e += BACKWARD_THREADS) {
            const int row = e / COLUMNS, i = e % COLUMNS;
            if (row < rows && n0 + i < p.layout.N)
                tile[row * STRIDE + i] = dy[row * p.stride_dym + i * p.stride_dyn];
            else
                store(&tile[row * STRIDE + i], Acc<X>(0));
        }
    }
};

// dS[m, off_k + j] += sum_{i in k} dy[m, i] C[i, j] over one tile: a warp takes a subspace, a lane two tokens.
template <class X>
__device__ void add_dS(const BackwardOperands<X>& p, int64_t n0, int c_begin, int c_end, const X* dy,
                       const int* subspace, Acc<X>* dS) {
    using T = Acc<X>;
    constexpr int STRIDE_DS = int(DS_ROWS);
    const int lane = threadIdx.x % WARP;
    for (int k = threadIdx.x / WARP; k < p.layout.K; k += BACKWARD_THREADS / WARP) {
        const Span s = span_of(p.layout, k, p.layout.active, nullptr);
        const int end = smaller(s.last, c_end);
        for (int c = larger(s.first, c_begin); c < end; c += RANK) {
            T low[RANK] = {}, high[RANK] = {};
            for (int group = 0; group < TileOfDy<X>::COLUMNS; group += WARP) {
                unsigned rows = __ballot_sync(ALL_LANES, subspace[group + lane] == k);
                for (; rows; rows &= rows - 1) {
                    const int i = group + __ffs(int(rows)) - 1;
                    const T dy_low = widen(dy[lane * TileOfDy<X>::STRIDE + i]);
                    const T dy_high = widen(dy[(lane + WARP) * TileOfDy<X>::STRIDE + i]);
                    const T* const C = p.C + (n0 + i) * p.r_max + (c - s.first);
#pragma unroll
                    for (int j = 0; j < RANK; ++j)
                        if (c + j < end) low[j] += dy_low * C[j], high[j] += dy_high * C[j];
                }
            }
#pragma unroll
            for (int j = 0; j < RANK; ++j)
                if (c + j < end) {
                    T* const sum = dS + (c + j - c_begin) * STRIDE_DS + lane;
                    sum[0] += low[j], sum[WARP] += high[j];
                }
        }
    }
}

// dC[i, j] = sum_m dy[m, i] S[m, off_k(i) + j] over the tile's tokens: a thread takes a row of C and a group of tokens.
template <class X>
__device__ void write_dC(const BackwardOperands<X>& p, int64_t tile_m, int64_t n0, int c_begin, int c_end, const X* dy,
                         const int* subspace, const Acc<X>* S) {
    using T = Acc<X>;
    constexpr int GROUPS = BACKWARD_THREADS / TileOfDy<X>::COLUMNS, ROWS = BACKWARD_ROWS / GROUPS;
    const int i = threadIdx.x % TileOfDy<X>::COLUMNS, group = threadIdx.x / TileOfDy<X>::COLUMNS;
    if (subspace[i] < 0) return;
    const Span s = span_of(p.layout, subspace[i], p.layout.active, p.layout.trainable);
    T* const dC = p.dC_parts + ((tile_m * GROUPS + group) * p.layout.N + n0 + i) * p.r_max;
    const int end = smaller(s.last, c_end), columns = c_end - c_begin;
    for (int c = larger(s.first, c_begin); c < end; c += RANK) {
        T total[RANK] = {};
#pragma unroll 4
        for (int m = group * ROWS; m < group * ROWS + ROWS; ++m) {
            const T dy_m = widen(dy[m * TileOfDy<X>::STRIDE + i]);
            const T* const S_m = S + m * columns + (c - c_begin);
#pragma unroll
            for (int j = 0; j < RANK; ++j)
                if (c + j < end) total[j] += dy_m * S_m[j];
        }
#pragma unroll
        for (int j = 0; j < RANK; ++j)
            if (c + j < end) dC[c - s.first + j] = total[j];
    }
}

// dS = dy C and dC = dy^T S at the places of C, in one pass over dy; dy (M, N), S and dS (M, RHO), C (N, r_max).
//
// A block owns BACKWARD_ROWS tokens and a block of columns of S, and walks over a stretch of rows of C: stretch t
// writes its own dS_parts[t], the tile of tokens its own dC_parts.
template <class X>
__global__ void __launch_bounds__(BACKWARD_THREADS, BACKWARD_BLOCKS) delta_bwd_kernel(const BackwardOperands<X> p) {
    using T = Acc<X>;
    constexpr int BLOCK_RHO = int(COLUMN_BYTES / sizeof(T)), STRIDE_DS = int(DS_ROWS);
    const int64_t tile_m = blockIdx.x % p.tiles_m, rest = blockIdx.x / p.tiles_m;
    const int c_begin = int(rest % p.blocks_rho) * BLOCK_RHO, c_end = int(smaller(p.RHO, int64_t(c_begin + BLOCK_RHO)));
    const int64_t stretch = rest / p.blocks_rho, m0 = tile_m * BACKWARD_ROWS;
    const int rows = int(smaller(p.M - m0, int64_t(BACKWARD_ROWS))), columns = c_end - c_begin;

    T* const dS = reinterpret_cast<T*>(shared_memory);          // [columns, STRIDE_DS]
    T* const S = dS + columns * STRIDE_DS;                      // [BACKWARD_ROWS, columns]
    alignas(16) __shared__ X dy[BACKWARD_ROWS * TileOfDy<X>::STRIDE];
    __shared__ int subspace[TileOfDy<X>::COLUMNS];  // -1 beyond N

    for (int e = threadIdx.x; e < columns * STRIDE_DS; e += BACKWARD_THREADS) dS[e] = T(0);
    if (p.dC_parts)
        for (int e = threadIdx.x; e < BACKWARD_ROWS * columns; e += BACKWARD_THREADS) {
            const int m = e / columns, c = e % columns;
            S[e] = m < rows ? p.S[(m0 + m) * p.RHO + c_begin + c] : T(0);
        }
    const int64_t end = smaller(p.layout.N, (stretch + 1) * p.width);
    for (int64_t n0 = stretch * p.width; n0 < end; n0 += TileOfDy<X>::COLUMNS) {
        __syncthreads();  // the last tile has been read
        TileOfDy<X>::stage(p, m0, n0, rows, dy);
        for (int i = threadIdx.x; i < TileOfDy<X>::COLUMNS; i += BACKWARD_THREADS)
            subspace[i] = n0 + i < p.layout.N ? p.layout.row_subspace[n0 + i] : -1;
        __syncthreads();
        if (p.dS) add_dS(p, n0, c_begin, c_end, dy, subspace, dS);
        if (p.dC_parts) write_dC(p, tile_m, n0, c_begin, c_end, dy, subspace, S);
    }
    if (!p.dS) return;
    __syncthreads();
    for (int e = threadIdx.x; e < rows * columns; e += BACKWARD_THREADS) {
        const int m = e / columns, c = e % columns;
        const T total = dS[c * STRIDE_DS + m];
        if (p.stretches == 1)
            store(&p.dS[(m0 + m) * p.RHO + c_begin + c], total);
        else
            p.dS_parts[(stretch * p.M + m0 + m) * p.RHO + c_begin + c] = total;
    }
}

constexpr int SUM_THREADS = 256;

// dS = sum_t parts[t], rounded; parts (T, E), dS (E,).
template <class X>
__global__ void __launch_bounds__(SUM_THREADS)
    sum_dS_kernel(const Acc<X>* parts, X* dS, int64_t stretches, int64_t E) {
    const int64_t e = int64_t(blockIdx.x) * SUM_THREADS + threadIdx.x;
    if (e >= E) return;
    Acc<X> total = 0;
#pragma unroll 4
    for (int64_t t = 0; t < stretches; ++t) total += parts[t * E + e];
    store(&dS[e], total);
}

// dC = sum_t parts[t], zero where the row does not learn and beyond its rank; parts (T, N, r_max), dC (N, r_max).
//
// Entries that no pass wrote are not read. A block takes WARP entries; its warps share the parts, then add in order.
template <class T>
__global__ void __launch_bounds__(SUM_THREADS)
    sum_dC_kernel(const T* parts, T* dC, int64_t count, int64_t r_max, adamss_cuda_layout layout) {
    constexpr int SHARES = SUM_THREADS / WARP;
    __shared__ T shares[SHARES][WARP];
    const int lane = threadIdx.x % WARP, share = threadIdx.x / WARP;
    const int64_t E = layout.N * r_max, e = int64_t(blockIdx.x) * WARP + lane;
    T total = 0;
    if (e < E) {
        const Span s = span_of(layout, layout.row_subspace[e / r_max], layout.active, layout.trainable);
        if (e % r_max < s.last - s.first) {
#pragma unroll 4
            for (int64_t t = share; t < count; t += SHARES) total += parts[t * E + e];
        }
    }
    shares[share][lane] = total;
    __syncthreads();
    if (share != 0 || e >= E) return;
#pragma unroll
    for (int u = 1; u < SHARES; ++u) total += shares[u][lane];
    dC[e] = total;
}

// dB[c] = 0 where the subspace of column c of S is not both active and trainable; dB (RHO, R).
template <class T>
__global__ void __launch_bounds__(SUM_THREADS) mask_rows_kernel(T* dB, int64_t RHO, int64_t R, adamss_cuda_layout l) {
    const int64_t e = int64_t(blockIdx.x) * SUM_THREADS + threadIdx.x;
    if (e >= RHO * R) return;
    const Span s = span_of(l, subspace_of_column(l, e / R), l.active, l.trainable);
    if (s.first == s.last) dB[e] = T(0);
}

}  // namespace adamss
