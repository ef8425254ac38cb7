// The forward update, for blocks of tokens; compiled once per instruction set.
#pragma once

#include "operands.h"

namespace ADAMSS_ISA {

// y[m] = bias + sum_j S[m, index[j]] value[j] for TILE_M tokens.
template <class T, class X, int Registers>
void update_tile(int64_t N, const T* S, int64_t stride_sm, const Coefficients<T>& c, const T* bias,
                 X* const y[TILE_M]) {
    constexpr int W = Vector<T>::width;
    using Held = Row<T, Registers>;
    const Held held[TILE_M] = {Held(S), Held(S + stride_sm), Held(S + 2 * stride_sm), Held(S + 3 * stride_sm)};
    const int64_t whole = N / W * W;
    for (int64_t i = 0; i < whole; i += W) {
        vec<T> total[TILE_M];
        ADAMSS_UNROLL for (int m = 0; m < TILE_M; ++m) total[m] = load(bias + i);
        for (int64_t j = 0; j < c.r_max; ++j) {
            const vec<T> value = load(c.value.data() + j * c.stride + i);
            const int32_t* index = c.index.data() + j * c.stride + i;
            ADAMSS_UNROLL for (int m = 0; m < TILE_M; ++m) total[m] += held[m][index] * value;
        }
        ADAMSS_UNROLL for (int m = 0; m < TILE_M; ++m) store_as(y[m] + i, total[m]);
    }
    for (int64_t i = whole; i < N; ++i)
        for (int m = 0; m < TILE_M; ++m) {
            T total = bias[i];
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

// y[m] = bias + (sum_j S[m, start + j] value[j] for each subspace)[place] for DOT_M tokens; `sorted` (DOT_M, stride) is
// scratch that starts as zeros.
template <class T, class X>
void update_sorted(int64_t N, const T* S, int64_t stride_sm, const SortedCoefficients<T>& c, const T* bias, T* sorted,
                   X* const y[DOT_M]) {
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
    for (int m = 0; m < DOT_M; ++m) {
        const T* const row = sorted + m * c.stride;
        for (int64_t i = 0; i < whole; i += W) store_as(y[m] + i, load(bias + i) + gather<T>(row, c.place.data() + i));
        for (int64_t i = whole; i < N; ++i) store_as(y[m] + i, bias[i] + row[c.place[i]]);
    }
}

// S as the caller wants it: rows of all RHO columns, zero where pruned.
template <class T>
void write_S(const Columns& columns, const T* S, int64_t stride_sm, int64_t M, int64_t rho_full, T* out) {
    if (columns.count < rho_full) std::memset(out, 0, M * rho_full * sizeof(T));
    if (columns.is_all) {
        for (int64_t m = 0; m < M; ++m) std::memcpy(out + m * rho_full, S + m * stride_sm, rho_full * sizeof(T));
        return;
    }
    for (int64_t m = 0; m < M; ++m)
        for (int64_t p = 0; p < columns.count; ++p) out[m * rho_full + columns.column[p]] = S[m * stride_sm + p];
}

template <class T, class X>
adamss_status forward(const adamss_forward_args& args) {
    const adamss_layout& l = args.layout;
    const Columns columns(l);
    const int64_t rho = columns.count, rho_full = l.offsets[l.K], stride_sm = padded_rho<T>(columns);
    const Coefficients<T> coefficients(l, static_cast<const T*>(args.C), args.r_max, columns);
    // From P, Q = B and q = 0.
    const X* const source = static_cast<const X*>(args.P ? args.P : args.x);
    const int64_t stride = args.P ? args.stride_pm : args.stride_xm, D = args.P ? args.R : args.D;
    const Projection<T> projection(columns, static_cast<const T*>(args.B), args.P ? nullptr : args.A,
                                   args.A_is_bfloat16, static_cast<const T*>(args.a), args.R, D);
    Buffer<T> bias(coefficients.stride);
    if (args.bias) to_arithmetic(static_cast<const X*>(args.bias), bias.data(), l.N);
    const auto update = for_rho<T>(rho, [](auto held) { return update_tile<T, X, decltype(held)::value>; });

    const bool is_sorted = !fits_registers<T>(rho);
    const SortedCoefficients<T> sorted(is_sorted ? l : no_rows(l), static_cast<const T*>(args.C), args.r_max, columns);

    parallel_blocks((args.M + BLOCK_M - 1) / BLOCK_M, [&](int64_t block) {
        const int64_t begin = block * BLOCK_M, M = smaller(BLOCK_M, args.M - begin);
        Rows<T, X> x;
        Buffer<T> S(DOT_M * stride_sm), sorted_y(is_sorted ? DOT_M * sorted.stride : 0);
        for (int64_t m = begin; m < begin + M; m += DOT_M) {
            const int64_t tokens = smaller(DOT_M, begin + M - m);
            x.take(source + m * stride, stride, tokens, DOT_M, D);
            Prefetch ahead(dot_tiles<T>(D, larger(rho, 1)));
            ahead.add(source + (m + DOT_M) * stride, stride, smaller(DOT_M, args.M - m - DOT_M));
            ahead.add(static_cast<const X*>(args.y) + m * l.N, l.N, tokens);
            dot_block<T>(D, x.p, x.stride, rho, projection.Q.data(), projection.q.data(), S.data(), stride_sm,
                         ahead);
            if (args.S)
                write_S(columns, S.data(), stride_sm, tokens, rho_full, static_cast<T*>(args.S) + m * rho_full);
            // Rows that pad the last tile are copies of its last real row and write the same values there.
            X* y[DOT_M];
            for (int64_t i = 0; i < DOT_M; ++i)
                y[i] = static_cast<X*>(args.y) + (m + smaller(i, tokens - 1)) * l.N;
            if (is_sorted)
                update_sorted<T, X>(l.N, S.data(), stride_sm, sorted, bias.data(), sorted_y.data(), y);
            for (int64_t tile = 0; tile < tokens && !is_sorted; tile += TILE_M)
                update(l.N, S.data() + tile * stride_sm, stride_sm, coefficients, bias.data(), y + tile);
        }
    });
    return ADAMSS_UPDATE;
}

}  // namespace ADAMSS_ISA
