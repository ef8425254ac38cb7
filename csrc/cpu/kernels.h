// The forward update and its backward, for blocks of tokens; compiled once per instruction set.
#pragma once

#include <type_traits>

#include "buffer.h"
#include "dispatch.h"
#include "tiles.h"

namespace ADAMSS_ISA {

// Tokens that are worked on while they stay in cache.
constexpr int64_t BLOCK_M = 64;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The columns of S that are not pruned, in order, and where each subspace starts among them (-1: pruned).
struct Columns {
    int64_t count = 0;
    Buffer<int32_t> column;  // (count,): compact -> full
    Buffer<bool> learns;     // (count,): whether B and C get a gradient here
    Buffer<int32_t> start;   // (K,)

    Columns(const adamss_layout& l, bool only_learning) : column(l.offsets[l.K]), learns(l.offsets[l.K]), start(l.K) {
        for (int64_t k = 0; k < l.K; ++k) {
            const bool active = !l.active || l.active[k], learning = active && (!l.trainable || l.trainable[k]);
            start[k] = (only_learning ? learning : active) ? int32_t(count) : -1;
            for (int32_t p = l.offsets[k]; p < l.offsets[k + 1] && start[k] >= 0; ++p, ++count) {
                column[count] = p;
                learns[count] = learning;
            }
        }
    }
};

template <class F>
void parallel_blocks(int64_t blocks, const F& f) {
    auto task = [](int64_t begin, int64_t end, void* context) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(context))(i);
    };
    if (adamss::parallel_for(0, blocks, 1, task, const_cast<F*>(&f)) != 0) throw std::bad_alloc();
}

// Rows of x in arithmetic type: x itself where storage and arithmetic agree, else a converted copy.
template <class T, class X>
struct Rows {
    Buffer<T> copy;
    const T* p = nullptr;
    int64_t stride = 0;

    // Padding repeats the last row, so that whole tiles can be read.
    void take(const X* x, int64_t stride_xm, int64_t M, int64_t padded, int64_t width) {
        if constexpr (std::is_same_v<T, X>) {
            if (M == padded) {
                p = x, stride = stride_xm;
                return;
            }
        }
        copy.resize(padded * width);
        for (int64_t m = 0; m < padded; ++m)
            to_arithmetic(x + smaller(m, M - 1) * stride_xm, copy.data() + m * width, width);
        p = copy.data(), stride = width;
    }
};

// ---------------------------------------------------------------------------------------------------------------------

// C and the columns that it multiplies, transposed to run along N; rows of pruned subspaces get coefficient zero.
template <class T>
struct Coefficients {
    int64_t r_max = 0, stride;
    Buffer<T> value;        // (r_max, stride)
    Buffer<int32_t> index;  // (r_max, stride), compact columns

    Coefficients(const adamss_layout& l, const T* C, int64_t stride_c, const Columns& columns)
        : stride(round_up(l.N, Vector<T>::width)) {
        for (int64_t k = 0; k < l.K; ++k)
            if (columns.start[k] >= 0) r_max = larger(r_max, l.offsets[k + 1] - l.offsets[k]);
        value.resize(r_max * stride);
        index.resize(r_max * stride);
        for (int64_t i = 0; i < l.N; ++i) {
            const int32_t k = l.row_subspace[i];
            if (columns.start[k] < 0) continue;
            for (int32_t j = 0; j < l.offsets[k + 1] - l.offsets[k]; ++j) {
                value[j * stride + i] = C[i * stride_c + j];
                index[j * stride + i] = columns.start[k] + j;
            }
        }
    }
};

// y[m] = bias + sum_j S[m, index[j]] * value[j] for TILE_M tokens.
template <class T, class X, int Registers>
void update_rows(int64_t N, const T* S, int64_t stride_sm, const Coefficients<T>& c, const T* bias, X* const y[TILE_M]) {
    constexpr int W = Vector<T>::width;
    using Held = Row<T, Registers>;
    const Held held[TILE_M] = {Held(S), Held(S + stride_sm), Held(S + 2 * stride_sm), Held(S + 3 * stride_sm)};
    for (int64_t i = 0; i < c.stride; i += W) {
        vec<T> total[TILE_M];
        for (int m = 0; m < TILE_M; ++m) total[m] = load(bias + i);
        for (int64_t j = 0; j < c.r_max; ++j) {
            const vec<T> value = load(c.value.data() + j * c.stride + i);
            const int32_t* index = c.index.data() + j * c.stride + i;
            for (int m = 0; m < TILE_M; ++m) total[m] += held[m][index] * value;
        }
        if (i + W <= N) {
            for (int m = 0; m < TILE_M; ++m) store_as(y[m] + i, total[m]);
        } else {
            for (int m = 0; m < TILE_M; ++m)
                for (int64_t e = i; e < N; ++e) store_as(y[m] + e, total[m][e - i]);
        }
    }
}

template <class T, class X>
void forward(const adamss_forward_args& a) {
    const adamss_layout& l = a.layout;
    const Columns columns(l, false);
    const int64_t rho = columns.count, rho_full = l.offsets[l.K];
    const Coefficients<T> coefficients(l, static_cast<const T*>(a.C), a.r_max, columns);
    // Whole registers are read past the end of each row of S.
    const int64_t stride_sm = round_up(larger(rho, 1), 4 * Vector<T>::width);

    Buffer<const T*> Q(rho);
    Buffer<T> q(rho), bias(coefficients.stride);
    for (int64_t p = 0; p < rho; ++p) {
        Q[p] = static_cast<const T*>(a.Q) + columns.column[p] * a.D;
        if (a.q) q[p] = static_cast<const T*>(a.q)[columns.column[p]];
    }
    if (a.bias) to_arithmetic(static_cast<const X*>(a.bias), bias.data(), l.N);

    auto update = update_rows<T, X, 0>;
    if (rho <= Row<T, 1>::capacity) update = update_rows<T, X, 1>;
    else if (rho <= Row<T, 2>::capacity) update = update_rows<T, X, 2>;
    else if (rho <= Row<T, 4>::capacity) update = update_rows<T, X, 4>;

    parallel_blocks((a.M + BLOCK_M - 1) / BLOCK_M, [&](int64_t block) {
        const int64_t begin = block * BLOCK_M, M = smaller(BLOCK_M, a.M - begin), padded = round_up(M, TILE_M);
        Rows<T, X> x;
        x.take(static_cast<const X*>(a.x) + begin * a.stride_xm, a.stride_xm, M, padded, a.D);
        Buffer<T> S(padded * stride_sm);
        dot_block<T>(padded, a.D, x.p, x.stride, rho, Q.data(), q.data(), S.data(), stride_sm);

        if (a.S) {
            T* out = static_cast<T*>(a.S) + begin * rho_full;
            if (rho < rho_full) std::memset(out, 0, M * rho_full * sizeof(T));
            for (int64_t m = 0; m < M; ++m)
                for (int64_t p = 0; p < rho; ++p) out[m * rho_full + columns.column[p]] = S[m * stride_sm + p];
        }
        X* y = static_cast<X*>(a.y) + begin * l.N;
        for (int64_t m = 0; m < padded; m += TILE_M) {
            // Rows that pad the last tile are copies of its last real row and write the same values there.
            X* rows[TILE_M];
            for (int i = 0; i < TILE_M; ++i) rows[i] = y + smaller(m + i, M - 1) * l.N;
            update(l.N, S.data() + m * stride_sm, stride_sm, coefficients, bias.data(), rows);
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------------

// The rows of each subspace one after the other, padded to whole registers, so that sums over a subspace are
// sums over neighbours; `row` of padding is a valid row, its coefficients are zero.
template <class T>
struct Sorted {
    struct Run {
        int64_t begin, end;  // in sorted positions
        int32_t p, rank;     // first compact column, columns
    };
    Buffer<Run> runs;
    int64_t num_runs = 0, length = 0, r_max = 0;
    Buffer<int32_t> row;  // (length,)
    Buffer<bool> real;    // (length,)
    Buffer<T> value;      // (r_max, length)

    Sorted(const adamss_layout& l, const T* C, int64_t stride_c, const Columns& columns) : runs(l.K) {
        Buffer<int64_t> count(l.K), at(l.K);
        for (int64_t i = 0; i < l.N; ++i) ++count[l.row_subspace[i]];
        for (int64_t k = 0; k < l.K; ++k) {
            if (columns.start[k] < 0) continue;
            const int32_t rank = l.offsets[k + 1] - l.offsets[k];
            at[k] = length;
            length += round_up(count[k], Vector<T>::width);
            runs[num_runs++] = {at[k], length, columns.start[k], rank};
            r_max = larger(r_max, rank);
        }
        row.resize(length);
        real.resize(length);
        value.resize(r_max * length);
        for (int64_t i = 0; i < l.N; ++i) {
            const int32_t k = l.row_subspace[i];
            if (columns.start[k] < 0) continue;
            const int64_t s = at[k]++;
            row[s] = int32_t(i), real[s] = true;
            for (int32_t j = 0; j < l.offsets[k + 1] - l.offsets[k]; ++j) value[j * length + s] = C[i * stride_c + j];
        }
    }
};

// For TILE_M tokens and R columns of one subspace: dS = dy C over its rows and, with Learns, dC += dy^T S.
template <class T, int R, bool Learns>
void subspace_tile(const int32_t* row, int64_t count, const T* const dy[TILE_M], const T* value, const T* S, T* dS,
                   int64_t stride_sm, T* dC, int64_t stride_c) {
    constexpr int W = Vector<T>::width;
    vec<T> total[R][TILE_M] = {};
    T s[R][TILE_M];
    for (int j = 0; j < R; ++j)
        for (int m = 0; m < TILE_M; ++m) s[j][m] = Learns ? S[m * stride_sm + j] : T(0);
    for (int64_t i = 0; i < count; i += W) {
        vec<T> dy_m[TILE_M];
        for (int m = 0; m < TILE_M; ++m) dy_m[m] = gather<T>(dy[m], row + i);
        for (int j = 0; j < R; ++j) {
            const vec<T> value_j = load(value + j * stride_c + i);
            for (int m = 0; m < TILE_M; ++m) total[j][m] += dy_m[m] * value_j;
            if constexpr (Learns) {
                vec<T> grad = load(dC + j * stride_c + i);
                for (int m = 0; m < TILE_M; ++m) grad += dy_m[m] * s[j][m];
                store(dC + j * stride_c + i, grad);
            }
        }
    }
    for (int j = 0; j < R; ++j) {
        T sums[TILE_M];
        sum4<T>(total[j], sums);
        for (int m = 0; m < TILE_M; ++m) dS[m * stride_sm + j] = sums[m];
    }
}

// All columns of one subspace, at most 3 at a time: past that the registers are full and gathering again is cheaper.
template <class T, bool Learns>
void subspace(const Sorted<T>& c, const typename Sorted<T>::Run& run, const T* const dy[TILE_M], const T* S, T* dS,
              int64_t stride_sm, T* dC) {
    const int32_t* row = c.row.data() + run.begin;
    const int64_t count = run.end - run.begin;
    for (int32_t j = 0; j < run.rank;) {
        const int64_t at = j * c.length + run.begin;
        auto tile = subspace_tile<T, 1, Learns>;
        const int32_t columns = int32_t(smaller(run.rank - j, 3));
        if (columns == 2) tile = subspace_tile<T, 2, Learns>;
        if (columns == 3) tile = subspace_tile<T, 3, Learns>;
        tile(row, count, dy, c.value.data() + at, S + run.p + j, dS + run.p + j, stride_sm, dC + at, c.length);
        j += columns;
    }
}

template <class T, class X>
void backward(const adamss_backward_args& a) {
    const adamss_layout& l = a.layout;
    const Columns columns(l, a.dx == nullptr);
    const int64_t rho = columns.count, rho_full = l.offsets[l.K];
    const int64_t stride_sm = round_up(larger(rho, 1), Vector<T>::width);
    const Sorted<T> sorted(l, static_cast<const T*>(a.C), a.r_max, columns);

    Buffer<const T*> Q(rho);
    for (int64_t p = 0; p < rho && a.dx; ++p) Q[p] = static_cast<const T*>(a.Q) + columns.column[p] * a.D_out;

    // Partial sums over fixed shares of the tokens, added in order: the same bits on any number of threads.
    const int64_t shares = larger(1, smaller(a.M / 128, 16));
    const int64_t share_M = round_up((a.M + shares - 1) / shares, BLOCK_M);
    const int64_t size_dQ = a.dQ ? rho * a.D : 0, size_dC = a.dC ? sorted.r_max * sorted.length : 0;
    const int64_t size = size_dQ + rho + size_dC;
    Buffer<T> partial(shares * size);

    parallel_blocks(shares, [&](int64_t share) {
        T* const dQ_share = partial.data() + share * size;
        T* const dq_share = dQ_share + size_dQ;
        T* const dC_share = dq_share + rho;
        Buffer<T*> dQ(rho);
        for (int64_t p = 0; p < rho; ++p) dQ[p] = dQ_share + (a.dQ ? p * a.D : 0);
        Buffer<T> S(TILE_M * stride_sm), dS(BLOCK_M * stride_sm);
        Rows<T, X> dy, x;

        const int64_t end = smaller(a.M, (share + 1) * share_M);
        for (int64_t begin = share * share_M; begin < end; begin += BLOCK_M) {
            const int64_t M = smaller(BLOCK_M, end - begin);
            for (int64_t m = 0; m < M; m += TILE_M) {
                const int64_t tokens = smaller(TILE_M, M - m);
                dy.take(static_cast<const X*>(a.dy) + (begin + m) * a.stride_dym, a.stride_dym, tokens, TILE_M, l.N);
                const T* rows[TILE_M];
                for (int i = 0; i < TILE_M; ++i) {
                    rows[i] = dy.p + i * dy.stride;
                    // A token that only pads the tile must not count in dC.
                    for (int64_t p = 0; p < rho; ++p)
                        S[i * stride_sm + p] =
                            i < tokens && a.dC
                                ? static_cast<const T*>(a.S)[(begin + m + i) * rho_full + columns.column[p]]
                                : T(0);
                }
                for (int64_t k = 0; k < sorted.num_runs; ++k) {
                    const auto& run = sorted.runs[k];
                    auto kernel = a.dC && columns.learns[run.p] ? subspace<T, true> : subspace<T, false>;
                    kernel(sorted, run, rows, S.data(), dS.data() + m * stride_sm, stride_sm, dC_share);
                }
            }
            if (a.dQ) {
                x.take(static_cast<const X*>(a.x) + begin * a.stride_xm, a.stride_xm, M, M, a.D);
                for (int64_t p = 0, next; p < rho; p = next) {
                    // Neighbouring columns that learn go together.
                    for (next = p + 1; next < rho && columns.learns[next] == columns.learns[p];) ++next;
                    if (columns.learns[p])
                        outer_block<T>(M, a.D, x.p, x.stride, next - p, dS.data() + p, stride_sm, dQ.data() + p);
                }
                for (int64_t m = 0; m < M; ++m)
                    for (int64_t p = 0; p < rho; ++p) dq_share[p] += dS[m * stride_sm + p];
            }
            if (a.dx)
                product_block<T, X>(M, a.D_out, rho, dS.data(), stride_sm, Q.data(),
                                    static_cast<X*>(a.dx) + begin * a.D_out, a.D_out);
        }
    });

    auto total = [&](int64_t at) {
        T t = 0;
        for (int64_t share = 0; share < shares; ++share) t += partial[share * size + at];
        return t;
    };
    if (a.dQ) {
        T *const dQ = static_cast<T*>(a.dQ), *const dq = static_cast<T*>(a.dq);
        std::memset(dQ, 0, rho_full * a.D * sizeof(T));
        std::memset(dq, 0, rho_full * sizeof(T));
        parallel_blocks(rho, [&](int64_t p) {
            if (!columns.learns[p]) return;
            T* const out = dQ + columns.column[p] * a.D;
            for (int64_t share = 0; share < shares; ++share) {
                const T* in = partial.data() + share * size + p * a.D;
                for (int64_t d = 0; d < a.D; ++d) out[d] += in[d];
            }
            dq[columns.column[p]] = total(size_dQ + p);
        });
    }
    if (a.dC) {
        T* const dC = static_cast<T*>(a.dC);
        std::memset(dC, 0, l.N * a.r_max * sizeof(T));
        for (int64_t k = 0; k < sorted.num_runs; ++k) {
            const auto& run = sorted.runs[k];
            for (int64_t s = run.begin; s < run.end && columns.learns[run.p]; ++s)
                for (int32_t j = 0; j < run.rank && sorted.real[s]; ++j)
                    dC[sorted.row[s] * a.r_max + j] = total(size_dQ + rho + j * sorted.length + s);
        }
    }
}

}  // namespace ADAMSS_ISA
