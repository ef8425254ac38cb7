// The forward update, for blocks of tokens; compiled once per instruction set.
#pragma once

#include "factors.h"

namespace ADAMSS_ISA {

// y[m] = bias + sum_j S[m, index[j]] value[j] for ROWS tokens; where there is no bias, y[m] takes its place.
template <class T, class X, int Registers, int ROWS>
void update_tile(int64_t N, const T* S, int64_t stride_sm, const Coefficients<T>& c, const T* bias, X* const* y) {
    constexpr int W = Vector<T>::width;
    using Held = Row<T, Registers>;
    const int64_t whole = N / W * W, last = ROWS - 1;
    const Held held[] = {Held(S), Held(S + smaller(1, last) * stride_sm), Held(S + smaller(2, last) * stride_sm),
                         Held(S + last * stride_sm)};
    static_assert(ROWS == 1 || ROWS == 4, "as many as are held");
    for (int64_t i = 0; i < whole; i += W) {
        vec<T> total[ROWS];
        if (bias)
            ADAMSS_UNROLL for (int m = 0; m < ROWS; ++m) total[m] = load(bias + i);
        else
            ADAMSS_UNROLL for (int m = 0; m < ROWS; ++m) total[m] = load_as<T>(y[m] + i);
        for (int64_t j = 0; j < c.r_max; ++j) {
            const vec<T> value = load(c.value.data() + j * c.stride + i);
            const int32_t* index = c.index + j * c.stride + i;
            ADAMSS_UNROLL for (int m = 0; m < ROWS; ++m) total[m] += held[m][index] * value;
        }
        ADAMSS_UNROLL for (int m = 0; m < ROWS; ++m) store_as(y[m] + i, total[m]);
    }
    for (int64_t i = whole; i < N; ++i)
        for (int m = 0; m < ROWS; ++m) {
            T total = bias ? bias[i] : value_of<T>(y[m] + i);
            for (int64_t j = 0; j < c.r_max; ++j)
                total += S[m * stride_sm + c.index[j * c.stride + i]] * c.value[j * c.stride + i];
            store_as(y[m] + i, total);
        }
}

// For rows of S that do not fit registers: C^T with the rows of each subspace side by side, and where they went.
template <class T>
struct SortedCoefficients {
    RowsBySubspace rows;
    int64_t stride;         // the places of all rows, and a register of zeros
    Buffer<T> value;        // (r_max, stride)
    Buffer<int32_t> place;  // (N,): row -> place, that of zeros where pruned

    SortedCoefficients(const adamss_layout& l, const T* C, int64_t r_max, const Columns& columns)
        : rows(l, columns, Vector<T>::width),
          stride(rows.places + Vector<T>::width),
          value(r_max * stride),
          place(l.N) {
        for (int64_t i = 0; i < l.N; ++i) {
            place[i] = rows.place[i] < 0 ? int32_t(rows.places) : rows.place[i];
            const int32_t k = l.row_subspace[i];
            for (int32_t j = 0; rows.place[i] >= 0 && j < l.offsets[k + 1] - l.offsets[k]; ++j)
                value[j * stride + place[i]] = C[i * r_max + j];
        }
    }
};

// y[m] = bias + (sum_j S[m, start + j] value[j] for each subspace)[place] for `count` of DOT_M tokens, y[m] again in place
// of no bias; `sorted` (DOT_M, stride) is scratch that starts as zeros.
template <class T, class X>
void update_sorted(int64_t N, const T* S, int64_t stride_sm, const SortedCoefficients<T>& c, const T* bias, T* sorted,
                   X* const y[DOT_M], int64_t count) {
    constexpr int W = Vector<T>::width;
    for (const RowsBySubspace::Run& run : c.rows.runs)
        for (int64_t v = run.begin; v < run.end; v += W) {
            vec<T> total[DOT_M] = {};
            for (int64_t j = 0; j < run.rank; ++j) {
                const vec<T> value = load(c.value.data() + j * c.stride + v);
                ADAMSS_UNROLL for (int m = 0; m < DOT_M; ++m) total[m] += value * S[m * stride_sm + run.start + j];
            }
            ADAMSS_UNROLL for (int m = 0; m < DOT_M; ++m) store(sorted + m * c.stride + v, total[m]);
        }
    const int64_t whole = N / W * W;
    for (int m = 0; m < count; ++m) {
        const T* const row = sorted + m * c.stride;
        for (int64_t i = 0; i < whole; i += W) {
            const vec<T> before = bias ? load(bias + i) : load_as<T>(y[m] + i);
            store_as(y[m] + i, before + gather<T>(row, c.place.data() + i));
        }
        for (int64_t i = whole; i < N; ++i) {
            const T before = bias ? bias[i] : value_of<T>(y[m] + i);
            store_as(y[m] + i, before + row[c.place[i]]);
        }
    }
}

// A row of S as the caller wants it: all RHO columns, zero where pruned.
template <class T>
void write_S(const Columns& columns, const T* S, int64_t rho_full, T* out) {
    if (columns.is_all) {
        std::memcpy(out, S, rho_full * sizeof(T));
        return;
    }
    std::memset(out, 0, rho_full * sizeof(T));
    for (int64_t p = 0; p < columns.count; ++p) out[columns.column[p]] = S[p];
}

// The update of M tokens by one adapter, block by block of BLOCK_M.
template <class T, class X>
class Update {
    using E = Factor<T, X>;
    const adamss_forward_args args_;
    const Columns columns_;
    const int64_t rho_, stride_sm_;
    const bool is_sorted_;  // which few tokens do not pay for
    const Coefficients<T> coefficients_;
    // From P, Q = B and q = 0.
    const Projection<T> projection_;
    Factors<T, E> Q_;
    const SortedCoefficients<T> sorted_;
    Buffer<T> bias_;

    const T* C() const { return static_cast<const T*>(args_.C); }
    const adamss_layout& layout() const { return args_.layout; }
    int64_t width() const { return args_.P ? args_.R : args_.D; }

  public:
    // `all` is the index of another adapter with the same layout, all of whose subspaces are active.
    explicit Update(const adamss_forward_args& args, const ColumnIndex* all = nullptr)
        : args_(args),
          columns_(args.layout),
          rho_(columns_.count),
          stride_sm_(padded_rho<T>(columns_)),
          is_sorted_(!fits_registers<T>(rho_) && args.M >= DOT_M),
          coefficients_(is_sorted_ ? no_rows(args.layout) : args.layout, C(), args.r_max, columns_,
                        columns_.is_all && !is_sorted_ ? all : nullptr),
          projection_(columns_, static_cast<const T*>(args.B), args.P ? nullptr : args.A, args.A_is_bfloat16,
                      static_cast<const T*>(args.a), args.R, width()),
          sorted_(is_sorted_ ? args.layout : no_rows(args.layout), C(), args.r_max, columns_),
          bias_(round_up(args.layout.N, Vector<T>::width)) {
        Q_.along(projection_.Q.data(), rho_, width());
        if (args.bias) to_arithmetic(static_cast<const X*>(args.bias), bias_.data(), args.layout.N);
    }

    int64_t blocks() const { return (args_.M + BLOCK_M - 1) / BLOCK_M; }

    void block(int64_t block) const {
        const Tokens tokens = {args_.tokens};
        const int64_t N = layout().N, D = width(), rho_full = layout().offsets[layout().K];
        const int64_t begin = block * BLOCK_M, end = smaller(args_.M, begin + BLOCK_M);
        const X* const source = static_cast<const X*>(args_.P ? args_.P : args_.x);
        const int64_t stride = args_.P ? args_.stride_pm : args_.stride_xm;
        X* const all_y = static_cast<X*>(args_.y);
        const T* const bias = args_.adds_to_y ? nullptr : bias_.data();
        const auto update = for_rho<T>(rho_, [](auto held) { return update_tile<T, X, decltype(held)::value, TILE_M>; });
        const auto update_one = for_rho<T>(rho_, [](auto held) { return update_tile<T, X, decltype(held)::value, 1>; });
        Rows<E, X> x;
        Buffer<T> S(DOT_M * stride_sm_), sorted_y(is_sorted_ ? DOT_M * sorted_.stride : 0);
        for (int64_t m = begin; m < end; m += DOT_M) {
            const int64_t count = smaller(DOT_M, end - m), after = m + DOT_M;
            x.along(source, stride, tokens, m, count, DOT_M, D);
            Prefetch ahead(dot_tiles<E>(x.width, larger(rho_, 1)));
            if (after < args_.M)
                ahead.add(source + tokens[after] * stride, stride, smaller(DOT_M, args_.M - after));
            ahead.add(all_y + tokens[m] * N, N, tokens.are_together(m, count) ? count : 1);
            dot_block<T>(x.width, x.p, x.stride, rho_, Q_.rows.data(), projection_.q.data(), S.data(), stride_sm_,
                         ahead);
            for (int64_t i = 0; args_.S && i < count; ++i)
                write_S(columns_, S.data() + i * stride_sm_, rho_full,
                        static_cast<T*>(args_.S) + tokens[m + i] * rho_full);
            X* y[DOT_M];
            for (int64_t i = 0; i < count; ++i) y[i] = all_y + tokens[m + i] * N;
            if (is_sorted_) {
                update_sorted<T, X>(N, S.data(), stride_sm_, sorted_, bias, sorted_y.data(), y, count);
                continue;
            }
            int64_t i = 0;
            for (; i + TILE_M <= count; i += TILE_M)
                update(N, S.data() + i * stride_sm_, stride_sm_, coefficients_, bias, y + i);
            for (; i < count; ++i)
                update_one(N, S.data() + i * stride_sm_, stride_sm_, coefficients_, bias, y + i);
        }
    }
};

template <class T, class X>
adamss_status forward(const adamss_forward_args& args) {
    const Update<T, X> update(args);
    parallel_blocks(update.blocks(), [&](int64_t block) { update.block(block); });
    return ADAMSS_UPDATE;
}

}  // namespace ADAMSS_ISA
