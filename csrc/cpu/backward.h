// The backward of the update, for shares of the tokens; compiled once per instruction set.
#pragma once

#include "factors.h"

namespace ADAMSS_ISA {

// dC[j] += sum_m dy[m] S[m, index[j]] for TILE_M tokens, laid out like the coefficients.
template <class T, class X, int Registers>
void coefficient_grad_tile(int64_t N, const X* const dy[TILE_M], const T* S, int64_t stride_sm,
                           const Coefficients<T>& c, T* dC) {
    constexpr int W = Vector<T>::width;
    using Held = Row<T, Registers>;
    const Held held[TILE_M] = {Held(S), Held(S + stride_sm), Held(S + 2 * stride_sm), Held(S + 3 * stride_sm)};
    const int64_t whole = N / W * W;
    for (int64_t i = 0; i < whole; i += W) {
        vec<T> dy_m[TILE_M];
        for (int m = 0; m < TILE_M; ++m) dy_m[m] = load_as<T>(dy[m] + i);
        for (int64_t j = 0; j < c.r_max; ++j) {
            const int32_t* index = c.index + j * c.stride + i;
            T* const out = dC + j * c.stride + i;
            vec<T> total = held[0][index] * dy_m[0];
            ADAMSS_UNROLL for (int m = 1; m < TILE_M; ++m) total += held[m][index] * dy_m[m];
            store(out, load(out) + total);
        }
    }
    for (int64_t j = 0; j < c.r_max; ++j)
        for (int64_t i = whole; i < N; ++i)
            for (int m = 0; m < TILE_M; ++m)
                dC[j * c.stride + i] += value_of<T>(dy[m] + i) * S[m * stride_sm + c.index[j * c.stride + i]];
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

// The gradients of M tokens by one adapter, share by share of the tokens.
template <class T, class X>
class Gradients {
    using E = Factor<T, X>;
    const adamss_backward_args args_;
    const Columns columns_;
    // Without dx, only the columns that learn matter; they come first.
    const int64_t rho_, learning_, stride_sm_;
    const Coefficients<T> coefficients_;
    // A row of C costs half a cycle a register and token, as a column of dS does for every register of dy's factors.
    const bool dS_by_subspace_, dC_by_subspace_;
    const CoefficientRows<T> rows_;
    const DenseCoefficients<T> Ct_;
    const Columns none_;
    Factors<T, E> Ct_factors_;
    const Projection<T> projection_;
    Factors<T, E> Q_;
    const int64_t width_, size_dQ_, size_dC_, size_;
    const Shares shares_;
    Buffer<T> partial_;

    const T* C() const { return static_cast<const T*>(args_.C); }
    const adamss_layout& layout() const { return args_.layout; }

  public:
    explicit Gradients(const adamss_backward_args& args)
        : args_(args),
          columns_(args.layout),
          rho_(args.dx ? columns_.count : columns_.learning),
          learning_(columns_.learning),
          stride_sm_(padded_rho<T>(columns_)),
          coefficients_(args.layout, C(), args.r_max, columns_),
          dS_by_subspace_(rho_ > round_up(args.r_max, Vector<T>::width) * VALUES<E> * 5 / 4),
          dC_by_subspace_(!fits_registers<T>(columns_.count)),
          rows_(dS_by_subspace_ || dC_by_subspace_ ? args.layout : no_rows(args.layout), C(), args.r_max, columns_),
          Ct_(coefficients_, dS_by_subspace_ ? 0 : rho_, args.layout.N),
          none_(no_rows(args.layout)),
          projection_(args.dx || args.W_updated ? columns_ : none_, static_cast<const T*>(args.B), args.A,
                      args.A_is_bfloat16, nullptr, args.R, args.D),
          width_(args.P ? args.R : args.D),
          size_dQ_(args.dB ? learning_ * width_ : 0),
          size_dC_(!args.dC          ? 0
                   : dC_by_subspace_ ? rows_.rows.places * rows_.stride
                                     : coefficients_.r_max * coefficients_.stride),
          size_(size_dQ_ + learning_ + size_dC_),
          shares_(args.M, args.D, size_),
          partial_(shares_.count * size_, UNINITIALISED) {
        Ct_factors_.along(Ct_.rows.data(), dS_by_subspace_ ? 0 : rho_, args.layout.N);
        if (args.dx) Q_.across(projection_.Q.data(), rho_, args.D);
    }

    const Columns& columns() const { return columns_; }
    const Projection<T>& projection() const { return projection_; }
    int64_t shares() const { return shares_.count; }

    void share(int64_t share) {
        const Tokens tokens = {args_.tokens};
        const int64_t N = layout().N, rho_full = layout().offsets[layout().K];
        const auto add_dC = for_rho<T>(columns_.count, [](auto held) {
            return coefficient_grad_tile<T, X, decltype(held)::value>;
        });
        const X *const all_dy = static_cast<const X*>(args_.dy), *const all_x = static_cast<const X*>(args_.x);
        T* const dQ_share = partial_.data() + share * size_;
        std::memset(dQ_share, 0, size_ * sizeof(T));
        T* const dq_share = dQ_share + size_dQ_;
        T* const dC_share = dq_share + learning_;
        Buffer<T*> dQ(learning_);
        for (int64_t p = 0; p < learning_; ++p) dQ[p] = dQ_share + (args_.dB ? p * width_ : 0);
        Buffer<T> S(DOT_M * stride_sm_), dS(BLOCK_M * stride_sm_);
        Rows<T, X> dy_values;
        Rows<E, X> dy, x;
        Rows<E, T> dS_along, dS_across;

        const int64_t end = smaller(args_.M, (share + 1) * shares_.tokens);
        for (int64_t begin = share * shares_.tokens; begin < end; begin += BLOCK_M) {
            const int64_t M = smaller(BLOCK_M, end - begin);
            for (int64_t m = begin; m < begin + M; m += DOT_M) {
                const int64_t count = smaller(DOT_M, begin + M - m), after = m + DOT_M;
                T* const dS_m = dS.data() + (m - begin) * stride_sm_;
                if (dS_by_subspace_ || dC_by_subspace_)
                    dy_values.along(all_dy, args_.stride_dym, tokens, m, count, DOT_M, N);
                if (!dS_by_subspace_) dy.along(all_dy, args_.stride_dym, tokens, m, count, DOT_M, N);
                Prefetch ahead(dS_by_subspace_ ? layout().K : dot_tiles<E>(dy.width, larger(rho_, 1)));
                if (after < args_.M)
                    ahead.add(all_dy + tokens[after] * args_.stride_dym, args_.stride_dym,
                              smaller(DOT_M, args_.M - after));
                const int64_t together = tokens.are_together(m, count) ? count : 1;
                if (args_.dB && !args_.P) ahead.add(all_x + tokens[m] * args_.stride_xm, args_.stride_xm, together);
                if (args_.dx) ahead.add(static_cast<const X*>(args_.dx) + tokens[m] * args_.D, args_.D, together);
                if (dS_by_subspace_)
                    dot_by_subspace<T>(dy_values.p, dy_values.stride, rows_, rho_, dS_m, stride_sm_, ahead);
                else
                    dot_block<T>(dy.width, dy.p, dy.stride, rho_, Ct_factors_.rows.data(), nullptr, dS_m, stride_sm_,
                                 ahead);
                if (!args_.dC || !learning_) continue;
                for (int64_t i = 0; i < DOT_M; ++i) {
                    // A token that only pads the tile must not count.
                    const T* const from = static_cast<const T*>(args_.S) + (i < count ? tokens[m + i] * rho_full : 0);
                    for (int64_t p = 0; p < columns_.count; ++p)
                        S[i * stride_sm_ + p] = i < count ? from[columns_.column[p]] : T(0);
                }
                if (dC_by_subspace_)
                    coefficient_grad_by_subspace<T>(dy_values.p, dy_values.stride, S.data(), stride_sm_, rows_,
                                                    learning_, dC_share);
                for (int64_t tile = 0; tile < count && !dC_by_subspace_; tile += TILE_M) {
                    const X* dy_tile[TILE_M];
                    for (int64_t i = 0; i < TILE_M; ++i)
                        dy_tile[i] = all_dy + tokens[m + smaller(tile + i, count - 1)] * args_.stride_dym;
                    add_dC(N, dy_tile, S.data() + tile * stride_sm_, stride_sm_, coefficients_, dC_share);
                }
            }
            if (args_.dB && learning_) {
                if (args_.P)
                    x.across(static_cast<const X*>(args_.P), args_.stride_pm, tokens, begin, M, args_.R);
                else
                    x.across(all_x, args_.stride_xm, tokens, begin, M, args_.D);
                dS_across.across(dS.data(), stride_sm_, {nullptr}, 0, M, learning_);
                outer_block<T>(x.count, width_, x.p, x.stride, learning_, dS_across.p, dS_across.stride, dQ.data());
                for (int64_t m = 0; m < M; ++m)
                    for (int64_t p = 0; p < learning_; ++p) dq_share[p] += dS[m * stride_sm_ + p];
            }
            if (args_.dx) dS_along.along(dS.data(), stride_sm_, {nullptr}, 0, M, M, rho_);
            // Rows of dx that follow one another are written together.
            for (int64_t m = 0, together; args_.dx && m < M; m += together) {
                for (together = 1; m + together < M && tokens.are_together(begin + m, together + 1);) ++together;
                product_block<T, X>(together, args_.D, dS_along.width, dS_along.p + m * dS_along.stride,
                                    dS_along.stride, Q_.rows.data(),
                                    static_cast<X*>(args_.dx) + tokens[begin + m] * args_.D, args_.D);
            }
        }
    }

    void write() {
        add_shares(partial_, shares_.count, size_);
        if (args_.dB) write_dB(args_, columns_, partial_.data(), width_, partial_.data() + size_dQ_);
        if (!args_.dC) return;
        const T* const dC = partial_.data() + size_dQ_ + learning_;
        write_dC<T>(args_, columns_, [&](int64_t i, int64_t j) {
            return dC_by_subspace_ ? dC[rows_.rows.place[i] * rows_.stride + j] : dC[j * coefficients_.stride + i];
        });
    }
};

template <class T, class X>
adamss_status backward(const adamss_backward_args& args) {
    Gradients<T, X> gradients(args);
    if constexpr (std::is_same_v<T, X>)
        if (args.W_updated) write_W_updated<T>(args, gradients.columns(), gradients.projection());
    if (!args.dx && !args.dB && !args.dC) return ADAMSS_UPDATE;
    parallel_blocks(gradients.shares(), [&](int64_t share) { gradients.share(share); });
    gradients.write();
    return ADAMSS_UPDATE;
}

}  // namespace ADAMSS_ISA
