// Register tiles of the three skinny products; every operand row is found through a pointer, so that columns of
// pruned subspaces are skipped rather than multiplied. Factors E are T, or Halves: then d, p and m, whichever is summed
// over, counts two at once.
#pragma once

#include "buffer.h"
#include "vector.h"

namespace ADAMSS_ISA {

#if defined(__AVX512F__)
constexpr int TILE_P = 5, TILE_V = 4;  // 4 x 5 + 4 + 1 and 5 x 4 + 4 + 1 of 32 registers
#else
constexpr int TILE_P = 2, TILE_V = 2;  // 4 x 2 + 4 + 1 and 4 x 2 + 2 + 1 of 16 registers
#endif
constexpr int TILE_M = 4;

// S[m, p] += x[m] . Q[p] for TILE_M rows of x and P rows of Q, along columns d to D.
template <class T, int P, class E>
void dot_tile(int64_t d, int64_t D, const E* const x[TILE_M], const E* const* Q, T* S, int64_t stride_sm) {
    constexpr int W = Vector<T>::width;
    vec<T> total[P][TILE_M] = {};
    for (; d + W <= D; d += W) {
        vec<E> x_d[TILE_M];
        for (int m = 0; m < TILE_M; ++m) x_d[m] = load(x[m] + d);
        for (int p = 0; p < P; ++p) {
            const vec<E> Q_d = load(Q[p] + d);
            for (int m = 0; m < TILE_M; ++m) total[p][m] = multiply_add(total[p][m], x_d[m], Q_d);
        }
    }
    ADAMSS_UNROLL for (int p = 0; p < P; ++p) {
        T s[TILE_M];
        sum4<T>(total[p], s);
        ADAMSS_UNROLL for (int m = 0; m < TILE_M; ++m) S[m * stride_sm + p] += s[m];
    }
    for (; d < D; ++d)
        for (int p = 0; p < P; ++p)
            for (int m = 0; m < TILE_M; ++m) S[m * stride_sm + p] += x[m][d] * Q[p][d];
}

// dQ[p, d] += sum_m dS[m, p] x[m, d] for P rows of dQ and V registers of columns, along M.
template <class T, int P, int V, class E>
void outer_tile(int64_t M, const E* x, int64_t stride_xm, const E* dS, int64_t stride_sm, T* const* dQ, int64_t d) {
    constexpr int W = Vector<T>::width;
    // Summed from zero, then added: rounding grows with the block and the number of blocks, not with their product.
    vec<T> total[P][V] = {};
    for (int64_t m = 0; m < M; ++m) {
        vec<E> x_m[V];
        for (int v = 0; v < V; ++v) x_m[v] = load(x + m * stride_xm + d + v * W);
        for (int p = 0; p < P; ++p) {
            const vec<E> s = broadcast(dS[m * stride_sm + p]);
            for (int v = 0; v < V; ++v) total[p][v] = multiply_add(total[p][v], x_m[v], s);
        }
    }
    for (int p = 0; p < P; ++p)
        for (int v = 0; v < V; ++v) store(dQ[p] + d + v * W, load(dQ[p] + d + v * W) + total[p][v]);
}

// dx[m, d] = sum_p dS[m, p] Q[p, d] for M rows of dx and V registers of columns, along RHO.
template <class T, class X, int V, int M = TILE_M, class E>
void product_tile(int64_t rho, const E* dS, int64_t stride_sm, const E* const* Q, int64_t d, X* dx,
                  int64_t stride_dxm) {
    constexpr int W = Vector<T>::width;
    vec<T> total[M][V] = {};
    for (int64_t p = 0; p < rho; ++p) {
        vec<E> Q_p[V];
        for (int v = 0; v < V; ++v) Q_p[v] = load(Q[p] + d + v * W);
        for (int m = 0; m < M; ++m) {
            const vec<E> s = broadcast(dS[m * stride_sm + p]);
            for (int v = 0; v < V; ++v) total[m][v] = multiply_add(total[m][v], Q_p[v], s);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) store_as(dx + m * stride_dxm + d + v * W, total[m][v]);
}

// The products over whole blocks: tiles, then what is left over.

template <int P>
struct Tile {
    static constexpr int value = P;
};

// Cut `rho` columns into tiles of TILE_P and one smaller: f(Tile<columns>, first column).
template <class F>
void for_tiles(int64_t rho, const F& f) {
    int64_t p = 0;
    for (; p + TILE_P <= rho; p += TILE_P) f(Tile<TILE_P>(), p);
    switch (rho - p) {
        case 1: return f(Tile<1>(), p);
        case 2: return f(Tile<2>(), p);
        case 3: return f(Tile<3>(), p);
        case 4: return f(Tile<4>(), p);
    }
}

// Rows that will be wanted soon, fetched into the second-level cache a little at a time while arithmetic runs: the
// large operands come from further away than the hardware's own prefetching hides.
class Prefetch {
    struct Range {
        const char *p, *end;
        int64_t lines;  // at a time
    } ranges_[3];
    int count_ = 0;
    int64_t times_;

  public:
    // To be asked `times` times for some.
    explicit Prefetch(int64_t times) : times_(times) {}
    template <class X>
    void add(const X* rows, int64_t stride, int64_t M) {
        const int64_t bytes = M > 0 ? M * stride * int64_t(sizeof(X)) : 0;
        const char* const p = reinterpret_cast<const char*>(rows);
        ranges_[count_++] = {p, p + bytes, bytes / 64 / times_ + 1};
    }
    void some() {
        for (int r = 0; r < count_; ++r) {
            Range& range = ranges_[r];
            for (int64_t i = 0; i < range.lines && range.p < range.end; ++i, range.p += 64)
                __builtin_prefetch(range.p, 0, 2);
        }
    }
};

// S (DOT_M, rho) = x Q^T + q. A tile of Q and the rows of x stay in the first-level cache while they meet.
constexpr int DOT_M = 2 * TILE_M;
template <class E>
int64_t dot_spans(int64_t D) {
    constexpr int64_t L1_BYTES = 40 << 10;
    return 1 + D * int64_t(sizeof(E)) * (DOT_M + TILE_P) / L1_BYTES;
}
template <class E>
int64_t dot_tiles(int64_t D, int64_t rho) {
    return dot_spans<E>(D) * (DOT_M / TILE_M) * ((rho + TILE_P - 1) / TILE_P);
}
template <class T, class E>
void dot_block(int64_t D, const E* x, int64_t stride_xm, int64_t rho, const E* const* Q, const T* q, T* S,
               int64_t stride_sm, Prefetch& ahead) {
    const int64_t spans = dot_spans<E>(D);
    const int64_t span = round_up((D + spans - 1) / spans, Vector<T>::width);
    for (int64_t m = 0; m < DOT_M; ++m)
        for (int64_t p = 0; p < rho; ++p) S[m * stride_sm + p] = q ? q[p] : T(0);
    for (int64_t d = 0; d < D; d += span)
        for_tiles(rho, [&](auto tile, int64_t p) {
            for (int64_t m = 0; m < DOT_M; m += TILE_M) {
                ahead.some();
                const E* rows[TILE_M];
                for (int i = 0; i < TILE_M; ++i) rows[i] = x + (m + i) * stride_xm;
                dot_tile<T, decltype(tile)::value>(d, smaller(D, d + span), rows, Q + p, S + m * stride_sm + p,
                                                   stride_sm);
            }
        });
}

// dQ (rho, D) += dS^T x over M tokens. The columns of x that a tile reads stay in the first-level cache for all of rho.
template <class T, class E>
void outer_block(int64_t M, int64_t D, const E* x, int64_t stride_xm, int64_t rho, const E* dS, int64_t stride_sm,
                 T* const* dQ) {
    constexpr int W = Vector<T>::width;
    int64_t d = 0;
    for (; d + TILE_V * W <= D; d += TILE_V * W)
        for_tiles(rho, [&](auto tile, int64_t p) {
            outer_tile<T, decltype(tile)::value, TILE_V>(M, x, stride_xm, dS + p, stride_sm, dQ + p, d);
        });
    for (; d + W <= D; d += W)
        for_tiles(rho, [&](auto tile, int64_t p) {
            outer_tile<T, decltype(tile)::value, 1>(M, x, stride_xm, dS + p, stride_sm, dQ + p, d);
        });
    for (int64_t p = 0; p < rho; ++p)
        for (int64_t e = d; e < D; ++e) {
            T total = 0;
            for (int64_t m = 0; m < M; ++m) total += dS[m * stride_sm + p] * x[m * stride_xm + e];
            dQ[p][e] += total;
        }
}

// dx (M, D) = dS Q.
template <class T, class X, class E>
void product_block(int64_t M, int64_t D, int64_t rho, const E* dS, int64_t stride_sm, const E* const* Q, X* dx,
                   int64_t stride_dxm) {
    constexpr int W = Vector<T>::width;
    const int64_t whole_M = M / TILE_M * TILE_M, whole_D = D / W * W;
    // Few rows at a time, so that their writes advance along memory; several, so that a tile of Q serves them all.
    constexpr int64_t ROWS = 4 * TILE_M;
    for (int64_t begin = 0; begin < whole_M; begin += ROWS) {
        const int64_t end = smaller(whole_M, begin + ROWS);
        int64_t d = 0;
        for (; d + TILE_V * W <= D; d += TILE_V * W)
            for (int64_t m = begin; m < end; m += TILE_M)
                product_tile<T, X, TILE_V>(rho, dS + m * stride_sm, stride_sm, Q, d, dx + m * stride_dxm, stride_dxm);
        for (; d < whole_D; d += W)
            for (int64_t m = begin; m < end; m += TILE_M)
                product_tile<T, X, 1>(rho, dS + m * stride_sm, stride_sm, Q, d, dx + m * stride_dxm, stride_dxm);
    }
    for (int64_t m = whole_M; m < M; ++m) {
        int64_t d = 0;
        for (; d + TILE_V * W <= D; d += TILE_V * W)
            product_tile<T, X, TILE_V, 1>(rho, dS + m * stride_sm, stride_sm, Q, d, dx + m * stride_dxm, stride_dxm);
        for (; d < whole_D; d += W)
            product_tile<T, X, 1, 1>(rho, dS + m * stride_sm, stride_sm, Q, d, dx + m * stride_dxm, stride_dxm);
    }
    for (int64_t m = 0; m < M; ++m)
        for (int64_t e = whole_D; e < D; ++e) {
            T total = 0;
            for (int64_t p = 0; p < rho; ++p) total += dS[m * stride_sm + p] * Q[p][e];
            store_as(dx + m * stride_dxm + e, total);
        }
}

}  // namespace ADAMSS_ISA
