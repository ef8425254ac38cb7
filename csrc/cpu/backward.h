// The backward of the update, for shares of the tokens; compiled once per instruction set.
#pragma once

#include "operands.h"

namespace ADAMSS_ISA {

// dC[j] += sum_m dy[m] S[m, index[j]] for TILE_M tokens, laid out like the coefficients.
template <class T, int Registers>
void coefficient_grad_tile(int64_t N, const T* const dy[TILE_M], const T* S, int64_t stride_sm,
                           const Coefficients<T>& c, T* dC) {
    constexpr int W = Vector<T>::width;
    using Held = Row<T, Registers>;
    const Held held[TILE_M] = {Held(S), Held(S + stride_sm), Held(S + 2 * stride_sm), Held(S + 3 * stride_sm)};
    const int64_t whole = N / W * W;
    for (int64_t i = 0; i < whole; i += W) {
        vec<T> dy_m[TILE_M];
        for (int m = 0; m < TILE_M; ++m) dy_m[m] = load(dy[m] + i);
        for (int64_t j = 0; j < c.r_max; ++j) {
            const int32_t* index = c.index.data() + j * c.stride + i;
            T* const out = dC + j * c.stride + i;
            vec<T> total = held[0][index] * dy_m[0];
            ADAMSS_UNROLL for (int m = 1; m < TILE_M; ++m) total += held[m][index] * dy_m[m];
            store(out, load(out) + total);
        }
    }
    for (int64_t j = 0; j < c.r_max; ++j)
        for (int64_t i = whole; i < N; ++i)
            for (int m = 0; m < TILE_M; ++m)
                dC[j * c.stride + i] += dy[m][i] * S[m * stride_sm + c.index[j * c.stride + i]];
}

// C with the rows of each subspace side by side, entries of a row in whole registers.
template <class T>
struct CoefficientRows {
    RowsBySubspace rows;
    int64_t stride;
    Buffer<T> value;      // (places, stride)
    Buffer<int32_t> row;  // (places,): place -> row

    CoefficientRows(const adamss_layout& l, const T* C, int64_t r_max, const Columns& columns)
        : rows(l, columns, 1),
          stride(round_up(r_max, Vector<T>::width)),
          value(rows.places * stride),
          row(rows.places) {
        for (int64_t i = 0; i < l.N; ++i) {
            const int64_t place = rows.place[i];
            if (place < 0) continue;
            row[place] = int32_t(i);
            const int32_t k = l.row_subspace[i];
            std::memcpy(value.data() + place * stride, C + i * r_max, (l.offsets[k + 1] - l.offsets[k]) * sizeof(T));
        }
    }
};

// dS[m, start + j] = sum_i dy[m, i] C[i, j] over the rows i of each subspace, for DOT_M tokens and subspaces that start
// before `rho`.
template <class T>
void dot_by_subspace(const T* dy, int64_t stride_dym, const CoefficientRows<T>& c, int64_t rho, T* dS,
                     int64_t stride_sm, Prefetch& ahead) {
    constexpr int W = Vector<T>::width;
    for (const RowsBySubspace::Run& run : c.rows.runs)
        for (int64_t j = 0; j < run.rank && run.start < rho; j += W) {
            ahead.some();
            vec<T> total[DOT_M] = {};
            for (int64_t place = run.begin; place < run.end; ++place) {
                const vec<T> value = load(c.value.data() + place * c.stride + j);
                const T* const dy_i = dy + c.row[place];
                ADAMSS_UNROLL for (int m = 0; m < DOT_M; ++m) total[m] += value * dy_i[m * stride_dym];
            }
            // Lanes beyond the rank lie in columns of later subspaces, which are still to come.
            ADAMSS_UNROLL for (int m = 0; m < DOT_M; ++m) store(dS + m * stride_sm + run.start + j, total[m]);
        }
}

// dC[place, j] += sum_m dy[m, row] S[m, start + j] for DOT_M tokens; entries beyond a rank are garbage.
template <class T>
void coefficient_grad_by_subspace(const T* dy, int64_t stride_dym, const T* S, int64_t stride_sm,
                                  const CoefficientRows<T>& c, int64_t learning, T* dC) {
    constexpr int W = Vector<T>::width;
    for (const RowsBySubspace::Run& run : c.rows.runs)
        for (int64_t j = 0; j < run.rank && run.start < learning; j += W) {
            vec<T> S_m[DOT_M];
            ADAMSS_UNROLL for (int m = 0; m < DOT_M; ++m) S_m[m] = load(S + m * stride_sm + run.start + j);
            for (int64_t place = run.begin; place < run.end; ++place) {
                const T* const dy_i = dy + c.row[place];
                T* const out = dC + place * c.stride + j;
                vec<T> total = S_m[0] * dy_i[0];
                ADAMSS_UNROLL for (int m = 1; m < DOT_M; ++m) total += S_m[m] * dy_i[m * stride_dym];
                store(out, load(out) + total);
            }
        }
}

// Sum `shares` blocks of `size` into the first, in order: the same bits on any number of threads.
template <class T>
void add_shares(Buffer<T>& partial, int64_t shares, int64_t size) {
    T* const total = partial.data();
    const int64_t span = WORTH_A_THREAD / 8 / shares;
    parallel_blocks((size + span - 1) / span, [&](int64_t block) {
        const int64_t end = smaller(size, (block + 1) * span);
        for (int64_t share = 1; share < shares; ++share)
            for (int64_t i = block * span; i < end; ++i) total[i] += total[share * size + i];
    });
}

// dB from dQ (learning, width) = dS^T P or dS^T x, and then dB = dQ A^T + dq a^T.
template <class T>
void write_dB(const adamss_backward_args& args, const Columns& columns, const T* dQ, int64_t width, const T* dq) {
    const T* const a = static_cast<const T*>(args.a);
    const int64_t learning = columns.learning;
    T* const dB = static_cast<T*>(args.dB);
    std::memset(dB, 0, args.layout.offsets[args.layout.K] * args.R * sizeof(T));
    for (int64_t p = 0; p < learning && args.P; ++p)
        std::memcpy(dB + columns.column[p] * args.R, dQ + p * width, args.R * sizeof(T));
    const int64_t rows = columns_per_block(args.R, learning * args.D, TILE_P);
    parallel_blocks(args.P ? 0 : (args.R + rows - 1) / rows, [&](int64_t block) {
        const int64_t begin = block * rows, end = smaller(args.R, begin + rows);
        const BasisRows<T> A(args.A, args.A_is_bfloat16, args.D, begin * args.D, end - begin, args.D);
        for_tiles(end - begin, [&](auto tile, int64_t first) {
            constexpr int COLUMNS = decltype(tile)::value;
            const int64_t r = begin + first;
            for (int64_t p = 0; p < learning; p += TILE_M) {
                const int64_t count = smaller(TILE_M, learning - p);
                const T* dQ_rows[TILE_M];
                for (int64_t i = 0; i < TILE_M; ++i) dQ_rows[i] = dQ + (p + smaller(i, count - 1)) * width;
                T sums[TILE_M * COLUMNS] = {};
                dot_tile<T, COLUMNS>(0, args.D, dQ_rows, A.rows.data() + first, sums, COLUMNS);
                for (int64_t i = 0; i < count; ++i)
                    for (int j = 0; j < COLUMNS; ++j)
                        dB[columns.column[p + i] * args.R + r + j] =
                            sums[i * COLUMNS + j] + (a ? dq[p + i] * a[r + j] : T(0));
            }
        });
    });
}

// f(i, j, p) for every C[i, j] that learns; its compact column is p.
template <class F>
void for_learning(const adamss_layout& l, const Columns& columns, const F& f) {
    for (int64_t i = 0; i < l.N; ++i) {
        const int32_t k = l.row_subspace[i];
        if (columns.start[k] < 0 || columns.start[k] >= columns.learning) continue;
        for (int32_t j = 0; j < l.offsets[k + 1] - l.offsets[k]; ++j) f(i, j, columns.start[k] + j);
    }
}

// dC at the places of C; `at(i, j)` is the gradient of C[i, j].
template <class T, class F>
void write_dC(const adamss_backward_args& args, const Columns& columns, const F& at) {
    T* const dC = static_cast<T*>(args.dC);
    std::memset(dC, 0, args.layout.N * args.r_max * sizeof(T));
    for_learning(args.layout, columns, [&](int64_t i, int64_t j, int64_t) { dC[i * args.r_max + j] = at(i, j); });
}

// W' = W + C Q: N D r multiply-adds, where dS Q takes M D RHO and another pass over dx.
template <class T>
void write_W_updated(const adamss_backward_args& args, const Columns& columns, const Projection<T>& projection) {
    constexpr int W = Vector<T>::width;
    constexpr int64_t ROWS = 32;
    const adamss_layout& l = args.layout;
    const int64_t whole = args.D / W * W;
    parallel_blocks((l.N + ROWS - 1) / ROWS, [&](int64_t block) {
        for (int64_t i = block * ROWS; i < smaller(l.N, (block + 1) * ROWS); ++i) {
            const T* const from = static_cast<const T*>(args.W) + i * args.stride_wn;
            const T* const C = static_cast<const T*>(args.C) + i * args.r_max;
            T* const to = static_cast<T*>(args.W_updated) + i * args.D;
            const int32_t k = l.row_subspace[i];
            const int64_t r = columns.start[k] < 0 ? 0 : l.offsets[k + 1] - l.offsets[k];
            const T* const* const Q = projection.Q.data() + larger(0, columns.start[k]);
            for (int64_t d = 0; d < whole; d += W) {
                vec<T> total = load(from + d);
                for (int64_t j = 0; j < r; ++j) total += load(Q[j] + d) * C[j];
                store(to + d, total);
            }
            for (int64_t d = whole; d < args.D; ++d) {
                to[d] = from[d];
                for (int64_t j = 0; j < r; ++j) to[d] += Q[j][d] * C[j];
            }
        }
    });
}

// Tokens are summed over in fixed shares, so that sums do not depend on the number of threads. With many tokens there
// are as many shares as cost, in sums to write and add up, an eighth of a pass over dx.
struct Shares {
    int64_t tokens, count;  // none of them is empty, but that of no token
    Shares(int64_t M, int64_t D, int64_t sums)
        : tokens(round_up(larger(1, M / larger(1, smaller(M / 128, larger(16, M * D / (8 * larger(1, sums)))))),
                          BLOCK_M)),
          count(larger(1, (M + tokens - 1) / tokens)) {}
};

template <class T, class X>
adamss_status backward(const adamss_backward_args& args) {
    const adamss_layout& l = args.layout;
    const Columns columns(l);
    // Without dx, only the columns that learn matter; they come first.
    const int64_t rho = args.dx ? columns.count : columns.learning, learning = columns.learning;
    const int64_t N = l.N, rho_full = l.offsets[l.K], stride_sm = padded_rho<T>(columns);
    const Coefficients<T> coefficients(l, static_cast<const T*>(args.C), args.r_max, columns);
    const auto add_dC = for_rho<T>(columns.count, [](auto held) {
        return coefficient_grad_tile<T, decltype(held)::value>;
    });
    // A row of C costs half a cycle a register and token, as a column of dS does for every register of dy.
    const bool dS_by_subspace = rho > round_up(args.r_max, Vector<T>::width) * 5 / 4;
    const bool dC_by_subspace = !fits_registers<T>(columns.count);
    const CoefficientRows<T> rows(dS_by_subspace || dC_by_subspace ? l : no_rows(l), static_cast<const T*>(args.C),
                                  args.r_max, columns);
    const DenseCoefficients<T> Ct(coefficients, dS_by_subspace ? 0 : rho, N);
    const Columns none(no_rows(l));
    const Projection<T> projection(args.dx || args.W_updated ? columns : none, static_cast<const T*>(args.B),
                                   args.A, args.A_is_bfloat16, nullptr, args.R, args.D);
    if constexpr (std::is_same_v<T, X>)
        if (args.W_updated) write_W_updated<T>(args, columns, projection);
    if (!args.dx && !args.dB && !args.dC) return ADAMSS_UPDATE;

    const int64_t width = args.P ? args.R : args.D;
    const int64_t size_dQ = args.dB ? learning * width : 0;
    const int64_t size_dC = !args.dC         ? 0
                            : dC_by_subspace ? rows.rows.places * rows.stride
                                             : coefficients.r_max * coefficients.stride;
    const int64_t size = size_dQ + learning + size_dC;
    const Shares shares(args.M, args.D, size);
    Buffer<T> partial(shares.count * size, UNINITIALISED);

    parallel_blocks(shares.count, [&](int64_t share) {
        T* const dQ_share = partial.data() + share * size;
        std::memset(dQ_share, 0, size * sizeof(T));
        T* const dq_share = dQ_share + size_dQ;
        T* const dC_share = dq_share + learning;
        Buffer<T*> dQ(learning);
        for (int64_t p = 0; p < learning; ++p) dQ[p] = dQ_share + (args.dB ? p * width : 0);
        Buffer<T> S(DOT_M * stride_sm), dS(BLOCK_M * stride_sm);
        Rows<T, X> dy, x;

        const int64_t end = smaller(args.M, (share + 1) * shares.tokens);
        for (int64_t begin = share * shares.tokens; begin < end; begin += BLOCK_M) {
            const int64_t M = smaller(BLOCK_M, end - begin);
            for (int64_t m = 0; m < M; m += DOT_M) {
                const int64_t tokens = smaller(DOT_M, M - m);
                dy.take(static_cast<const X*>(args.dy) + (begin + m) * args.stride_dym, args.stride_dym, tokens, DOT_M,
                        N);
                Prefetch ahead(dS_by_subspace ? l.K : dot_tiles<T>(N, larger(rho, 1)));
                ahead.add(static_cast<const X*>(args.dy) + (begin + m + DOT_M) * args.stride_dym, args.stride_dym,
                          smaller(DOT_M, args.M - begin - m - DOT_M));
                if (args.dB && !args.P)
                    ahead.add(static_cast<const X*>(args.x) + (begin + m) * args.stride_xm, args.stride_xm, tokens);
                if (args.dx) ahead.add(static_cast<const X*>(args.dx) + (begin + m) * args.D, args.D, tokens);
                if (dS_by_subspace)
                    dot_by_subspace<T>(dy.p, dy.stride, rows, rho, dS.data() + m * stride_sm, stride_sm, ahead);
                else
                    dot_block<T>(N, dy.p, dy.stride, rho, Ct.rows.data(), nullptr, dS.data() + m * stride_sm,
                                 stride_sm, ahead);
                if (!args.dC || !learning) continue;
                for (int64_t i = 0; i < DOT_M; ++i) {
                    // A token that only pads the tile must not count.
                    const T* const from = static_cast<const T*>(args.S) + (begin + m + i) * rho_full;
                    for (int64_t p = 0; p < columns.count; ++p)
                        S[i * stride_sm + p] = i < tokens ? from[columns.column[p]] : T(0);
                }
                if (dC_by_subspace)
                    coefficient_grad_by_subspace<T>(dy.p, dy.stride, S.data(), stride_sm, rows, learning, dC_share);
                for (int64_t tile = 0; tile < tokens && !dC_by_subspace; tile += TILE_M) {
                    const T* dy_tile[TILE_M];
                    for (int64_t i = 0; i < TILE_M; ++i) dy_tile[i] = dy.p + (tile + i) * dy.stride;
                    add_dC(N, dy_tile, S.data() + tile * stride_sm, stride_sm, coefficients, dC_share);
                }
            }
            if (args.dB && learning) {
                if (args.P)
                    x.take(static_cast<const X*>(args.P) + begin * args.stride_pm, args.stride_pm, M, M, args.R);
                else
                    x.take(static_cast<const X*>(args.x) + begin * args.stride_xm, args.stride_xm, M, M, args.D);
                outer_block<T>(M, width, x.p, x.stride, learning, dS.data(), stride_sm, dQ.data());
                for (int64_t m = 0; m < M; ++m)
                    for (int64_t p = 0; p < learning; ++p) dq_share[p] += dS[m * stride_sm + p];
            }
            if (args.dx)
                product_block<T, X>(M, args.D, rho, dS.data(), stride_sm, projection.Q.data(),
                                    static_cast<X*>(args.dx) + begin * args.D, args.D);
        }
    });

    add_shares(partial, shares.count, size);
    if (args.dB) write_dB(args, columns, partial.data(), width, partial.data() + size_dQ);
    if (args.dC) {
        const T* const dC = partial.data() + size_dQ + learning;
        write_dC<T>(args, columns, [&](int64_t i, int64_t j) {
            return dC_by_subspace ? dC[rows.rows.place[i] * rows.stride + j] : dC[j * coefficients.stride + i];
        });
    }
    return ADAMSS_UPDATE;
}

}  // namespace ADAMSS_ISA
