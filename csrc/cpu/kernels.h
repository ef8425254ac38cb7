// The forward update and its backward, for blocks of tokens; compiled once per instruction set.
#pragma once

#include <type_traits>

#include "dispatch.h"
#include "tiles.h"

namespace ADAMSS_ISA {

// Multiply-adds below which waking another thread costs more than it brings.
constexpr int64_t WORTH_A_THREAD = 1 << 20;

// Tokens that are worked on while they stay in cache.
constexpr int64_t BLOCK_M = 64;

// The columns of S that are not pruned, those that learn first, and where each subspace starts among them.
struct Columns {
    int64_t count = 0, learning = 0;
    bool is_all;             // all of them learn: compact is full
    Buffer<int32_t> column;  // (count,): compact -> full
    Buffer<int32_t> start;   // (K,), -1 where pruned

    explicit Columns(const adamss_layout& l) : column(l.offsets[l.K]), start(l.K) {
        for (int64_t k = 0; k < l.K; ++k) start[k] = -1;
        for (int pass = 0; pass < 2; ++pass) {
            for (int64_t k = 0; k < l.K; ++k) {
                const bool learns = !l.trainable || l.trainable[k];
                if ((l.active && !l.active[k]) || learns != (pass == 0)) continue;
                start[k] = int32_t(count);
                for (int32_t p = l.offsets[k]; p < l.offsets[k + 1]; ++p) column[count++] = p;
            }
            if (pass == 0) learning = count;
        }
        is_all = learning == l.offsets[l.K];
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

// C and the compact columns that it multiplies, transposed to run along N; rows of pruned subspaces get zero.
template <class T>
struct Coefficients {
    int64_t r_max = 0, stride;
    Buffer<T> value;        // (r_max, stride)
    Buffer<int32_t> index;  // (r_max, stride)

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

// The first `rho` rows of C^T for the compact columns, dense: a skinny product with it costs less than gathering the
// rows of a subspace.
template <class T>
struct DenseCoefficients {
    int64_t stride;
    Buffer<T> values;
    Buffer<const T*> rows;  // (rho,)

    DenseCoefficients(const Coefficients<T>& c, int64_t rho, int64_t N)
        : stride(row_stride<T>(N)), values(rho * stride), rows(rho) {
        for (int64_t j = 0; j < c.r_max; ++j)
            for (int64_t i = 0; i < N; ++i) {
                const T value = c.value[j * c.stride + i];
                const int64_t p = c.index[j * c.stride + i];
                // Entries without a column are zero and point at column 0.
                if (p < rho && value != T(0)) values[p * stride + i] = value;
            }
        for (int64_t p = 0; p < rho; ++p) rows[p] = values.data() + p * stride;
    }
};

// Rows of Q = B A and entries of q = B a for the compact columns; Q = B where there is no A.
template <class T>
struct Projection {
    int64_t stride;
    Buffer<T> values;
    Buffer<const T*> Q;  // (count,) rows
    Buffer<T> q;         // (count,)

    Projection(const Columns& columns, const T* B, const T* A, const T* a, int64_t R, int64_t D)
        : stride(row_stride<T>(D)),
          values(A ? round_up(columns.count, TILE_M) * stride : 0),
          Q(columns.count),
          q(columns.count) {
        for (int64_t p = 0; p < columns.count; ++p) Q[p] = B + columns.column[p] * R;
        if (!A) return;
        // Whole tiles of rows, the last ones zero.
        const int64_t rho = round_up(columns.count, TILE_M);
        Buffer<T> compact(rho * R);
        for (int64_t p = 0; p < columns.count; ++p) {
            std::memcpy(compact.data() + p * R, Q[p], R * sizeof(T));
            for (int64_t i = 0; a && i < R; ++i) q[p] += Q[p][i] * a[i];
            Q[p] = values.data() + p * stride;
        }
        const int64_t span = round_up(larger(256, WORTH_A_THREAD / (rho * R + 1)), Vector<T>::width);
        parallel_blocks((D + span - 1) / span, [&](int64_t block) {
            const int64_t d = block * span;
            Buffer<const T*> rows(R);
            for (int64_t i = 0; i < R; ++i) rows[i] = A + i * D + d;
            product_block<T, T>(rho, smaller(span, D - d), R, compact.data(), R, rows.data(), values.data() + d, stride);
        });
    }
};

// The form of `kernel` whose `Row` holds `rho` columns, in registers where they suffice.
template <class T, class Kernel>
auto for_rho(int64_t rho, const Kernel& kernel) {
    if (rho <= Row<T, 1>::capacity) return kernel(Tile<1>());
    if (rho <= Row<T, 2>::capacity) return kernel(Tile<2>());
    if (rho <= Row<T, 4>::capacity) return kernel(Tile<4>());
    return kernel(Tile<0>());
}

// A `Row` reads whole registers past the end of a row of S.
template <class T>
int64_t padded_rho(const Columns& columns) {
    return round_up(larger(columns.count, 1), 4 * Vector<T>::width);
}

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
    const Projection<T> projection(columns, static_cast<const T*>(args.B),
                                   args.P ? nullptr : static_cast<const T*>(args.A), static_cast<const T*>(args.a),
                                   args.R, D);
    Buffer<T> bias(coefficients.stride);
    if (args.bias) to_arithmetic(static_cast<const X*>(args.bias), bias.data(), l.N);
    const auto update = for_rho<T>(rho, [](auto held) { return update_tile<T, X, decltype(held)::value>; });

    parallel_blocks((args.M + BLOCK_M - 1) / BLOCK_M, [&](int64_t block) {
        const int64_t begin = block * BLOCK_M, M = smaller(BLOCK_M, args.M - begin);
        Rows<T, X> x;
        Buffer<T> S(DOT_M * stride_sm);
        for (int64_t m = begin; m < begin + M; m += DOT_M) {
            const int64_t tokens = smaller(DOT_M, begin + M - m);
            x.take(source + m * stride, stride, tokens, DOT_M, D);
            Prefetch ahead(dot_tiles(larger(rho, 1)));
            ahead.add(source + (m + DOT_M) * stride, stride, smaller(DOT_M, args.M - m - DOT_M));
            ahead.add(static_cast<const X*>(args.y) + m * l.N, l.N, tokens);
            dot_block<T>(D, x.p, x.stride, rho, projection.Q.data(), projection.q.data(), S.data(), stride_sm,
                         ahead);
            if (args.S)
                write_S(columns, S.data(), stride_sm, tokens, rho_full, static_cast<T*>(args.S) + m * rho_full);
            for (int64_t tile = 0; tile < tokens; tile += TILE_M) {
                // Rows that pad the last tile are copies of its last real row and write the same values there.
                X* rows[TILE_M];
                for (int64_t i = 0; i < TILE_M; ++i)
                    rows[i] = static_cast<X*>(args.y) + (m + smaller(tile + i, tokens - 1)) * l.N;
                update(l.N, S.data() + tile * stride_sm, stride_sm, coefficients, bias.data(), rows);
            }
        }
    });
    return ADAMSS_UPDATE;
}

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
    const T *const A = static_cast<const T*>(args.A), *const a = static_cast<const T*>(args.a);
    const int64_t learning = columns.learning;
    T* const dB = static_cast<T*>(args.dB);
    std::memset(dB, 0, args.layout.offsets[args.layout.K] * args.R * sizeof(T));
    for (int64_t p = 0; p < learning && args.P; ++p)
        std::memcpy(dB + columns.column[p] * args.R, dQ + p * width, args.R * sizeof(T));
    Buffer<const T*> A_rows(args.R);
    for (int64_t r = 0; r < args.R; ++r) A_rows[r] = A + r * args.D;
    const int64_t rows = round_up(larger(1, WORTH_A_THREAD / (learning * args.D + 1)), TILE_P);
    parallel_blocks(args.P ? 0 : (args.R + rows - 1) / rows, [&](int64_t block) {
        for_tiles(smaller(rows, args.R - block * rows), [&](auto tile, int64_t first) {
            constexpr int COLUMNS = decltype(tile)::value;
            const int64_t r = block * rows + first;
            for (int64_t p = 0; p < learning; p += TILE_M) {
                const int64_t count = smaller(TILE_M, learning - p);
                const T* dQ_rows[TILE_M];
                for (int64_t i = 0; i < TILE_M; ++i) dQ_rows[i] = dQ + (p + smaller(i, count - 1)) * width;
                T sums[TILE_M * COLUMNS] = {};
                dot_tile<T, COLUMNS>(0, args.D, dQ_rows, A_rows.data() + r, sums, COLUMNS);
                for (int64_t i = 0; i < count; ++i)
                    for (int j = 0; j < COLUMNS; ++j)
                        dB[columns.column[p + i] * args.R + r + j] =
                            sums[i * COLUMNS + j] + (a ? dq[p + i] * a[r + j] : T(0));
            }
        });
    });
}

// dC at the places of C; `at(p, j, i)` is the gradient of C[i, j], whose compact column is p.
template <class T, class F>
void write_dC(const adamss_backward_args& args, const Columns& columns, const F& at) {
    const adamss_layout& l = args.layout;
    T* const dC = static_cast<T*>(args.dC);
    std::memset(dC, 0, l.N * args.r_max * sizeof(T));
    for (int64_t i = 0; i < l.N; ++i) {
        const int32_t k = l.row_subspace[i];
        if (columns.start[k] < 0 || columns.start[k] >= columns.learning) continue;
        for (int32_t j = 0; j < l.offsets[k + 1] - l.offsets[k]; ++j)
            dC[i * args.r_max + j] = at(columns.start[k] + j, j, i);
    }
}

// Tokens are summed over in fixed shares, so that sums do not depend on the number of threads.
struct Shares {
    int64_t tokens, count;  // none of them is empty, but that of no token
    explicit Shares(int64_t M)
        : tokens(round_up(larger(1, M / larger(1, smaller(M / 128, 16))), BLOCK_M)),
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

    const DenseCoefficients<T> Ct(coefficients, rho, N);
    const Columns none(adamss_layout{0, 0, nullptr, l.offsets, nullptr, nullptr});
    const Projection<T> projection(args.dx ? columns : none, static_cast<const T*>(args.B), static_cast<const T*>(args.A), nullptr,
                                   args.R, args.D);

    const Shares shares(args.M);
    const int64_t width = args.P ? args.R : args.D;
    const int64_t size_dQ = args.dB ? learning * width : 0, size_dC = args.dC ? coefficients.r_max * coefficients.stride : 0;
    const int64_t size = size_dQ + learning + size_dC;
    Buffer<T> partial(shares.count * size);

    parallel_blocks(shares.count, [&](int64_t share) {
        T* const dQ_share = partial.data() + share * size;
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
                Prefetch ahead(dot_tiles(larger(rho, 1)));
                ahead.add(static_cast<const X*>(args.dy) + (begin + m + DOT_M) * args.stride_dym, args.stride_dym,
                          smaller(DOT_M, args.M - begin - m - DOT_M));
                if (args.dB && !args.P)
                    ahead.add(static_cast<const X*>(args.x) + (begin + m) * args.stride_xm, args.stride_xm, tokens);
                if (args.dx) ahead.add(static_cast<const X*>(args.dx) + (begin + m) * args.D, args.D, tokens);
                dot_block<T>(N, dy.p, dy.stride, rho, Ct.rows.data(), nullptr, dS.data() + m * stride_sm, stride_sm,
                             ahead);
                if (!args.dC || !learning) continue;
                for (int64_t i = 0; i < DOT_M; ++i) {
                    // A token that only pads the tile must not count.
                    const T* const from = static_cast<const T*>(args.S) + (begin + m + i) * rho_full;
                    for (int64_t p = 0; p < columns.count; ++p)
                        S[i * stride_sm + p] = i < tokens ? from[columns.column[p]] : T(0);
                }
                for (int64_t tile = 0; tile < tokens; tile += TILE_M) {
                    const T* rows[TILE_M];
                    for (int64_t i = 0; i < TILE_M; ++i) rows[i] = dy.p + (tile + i) * dy.stride;
                    add_dC(N, rows, S.data() + tile * stride_sm, stride_sm, coefficients, dC_share);
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
        write_dC<T>(args, columns, [&](int64_t, int64_t j, int64_t i) { return dC[j * coefficients.stride + i]; });
    }
    return ADAMSS_UPDATE;
}

}  // namespace ADAMSS_ISA
