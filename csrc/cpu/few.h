// The forward of few tokens, as in decoding: reading A, B, C and W is what it costs, so all is done in one pass over the
// rows of A and W. Compiled once per instruction set.
#pragma once

#include "forward.h"

namespace ADAMSS_ISA {

// Tokens that a row of A or W meets at once, and rows that are read side by side: 8 x 3 + 3 of 32 registers, 4 x 2 + 2
// of 16; for one token as many streams as memory serves.
#if defined(__AVX512F__)
constexpr int FEW_M = 8;
constexpr int rows_beside(int M) { return M <= 2 ? 8 : 24 / M; }
#else
constexpr int FEW_M = 4;
constexpr int rows_beside(int M) { return M == 1 ? 6 : 8 / M; }
#endif

// How a register of x meets one of a row of A or W, whose elements are E: both in arithmetic type.
template <class T, class E>
struct Meeting {
    using Element = T;  // of x
    using Register = vec<T>;
    static constexpr int width = Vector<T>::width;

    template <class From>
    static Register of(const From* p) {
        return load_as<T>(p);
    }
};

#if defined(__AVX512BF16__)
// Or both as they are, two products to a lane.
template <>
struct Meeting<float, bfloat16> {
    using Element = bfloat16;
    using Register = vec<Halves>;
    static constexpr int width = 32;

    static Register of(const bfloat16* p) { return (Register)_mm512_loadu_si512(p); }
};
#endif

// The last elements of a row, and zeros.
template <class T, class E, class Element>
typename Meeting<T, E>::Register tail(const Element* p, int64_t count) {
    Element padded[Meeting<T, E>::width] = {};
    std::memcpy(static_cast<void*>(padded), p, count * sizeof(Element));
    return Meeting<T, E>::of(padded);
}

// How many tokens the tile that starts at token m of M has: tiles are as even as can be.
inline int64_t tokens_of_tile(int64_t m, int64_t M) {
    const int64_t tiles = (M - m + FEW_M - 1) / FEW_M;
    return (M - m + tiles - 1) / tiles;
}

// x as its tiles of tokens meet rows of E: a register of each token, then the next of each.
template <class T, class E>
class TokenTiles {
    using Element = typename Meeting<T, E>::Element;
    static constexpr int W = Meeting<T, E>::width;
    Buffer<Element> copy_;
    const Element* p_;

  public:
    const int64_t D, padded;

    template <class X>
    TokenTiles(int64_t M, int64_t D, const X* x, int64_t stride_xm)
        : copy_(std::is_same_v<X, Element> && M == 1 && D % W == 0 ? 0 : M * round_up(D, W)),
          p_(copy_.data()),
          D(D),
          padded(round_up(D, W)) {
        if constexpr (std::is_same_v<X, Element>)
            if (M == 1 && D % W == 0) p_ = x;
        for (int64_t m = 0, tokens; p_ != static_cast<const void*>(x) && m < M; m += tokens) {
            tokens = tokens_of_tile(m, M);
            for (int64_t i = 0; i < tokens; ++i)
                for (int64_t d = 0; d < D; d += W) {
                    Element* const to = copy_.data() + m * padded + d * tokens + i * W;
                    const X* const from = x + (m + i) * stride_xm + d;
                    if constexpr (std::is_same_v<X, Element>)
                        std::memcpy(static_cast<void*>(to), from, smaller(W, D - d) * sizeof(X));
                    else
                        to_arithmetic(from, to, smaller(W, D - d));
                }
        }
    }
    const Element* tile(int64_t m) const { return p_ + m * padded; }
};

// out[m * stride_out + p] += x[m] . rows[p] for M tokens and P rows.
template <class T, class E, int M, int P>
void meet_tile(int64_t D, const typename Meeting<T, E>::Element* x, const E* rows, int64_t stride_row, T* out,
               int64_t stride_out) {
    using By = Meeting<T, E>;
    constexpr int W = By::width;
    constexpr int SUMS = (M * P + 3) / 4 * 4;
    vec<T> total[SUMS] = {};
    int64_t d = 0;
    const auto step = [&](const auto& row) ADAMSS_INLINE {
        typename By::Register row_d[P];
        ADAMSS_UNROLL for (int p = 0; p < P; ++p) row_d[p] = row(p);
        // The rows of the next tile: more streams than the hardware follows by itself.
        ADAMSS_UNROLL for (int p = 0; p < P && M > 2; ++p) __builtin_prefetch(rows + (P + p) * stride_row + d, 0, 3);
        ADAMSS_UNROLL for (int m = 0; m < M; ++m) {
            const typename By::Register x_d = By::of(x + m * W);
            ADAMSS_UNROLL for (int p = 0; p < P; ++p) total[m * P + p] = multiply_add(total[m * P + p], x_d, row_d[p]);
        }
        x += M * W;
    };
    for (; d + W <= D; d += W) step([&](int p) ADAMSS_INLINE { return By::of(rows + p * stride_row + d); });
    if (d < D) step([&](int p) { return tail<T, E>(rows + p * stride_row + d, D - d); });
    T sums[SUMS];
    ADAMSS_UNROLL for (int i = 0; i < SUMS; i += 4) sum4<T>(total + i, sums + i);
    for (int m = 0; m < M; ++m)
        for (int p = 0; p < P; ++p) out[m * stride_out + p] += sums[m * P + p];
}

// out (M, count) += x rows^T. Columns of x that a tile reads stay in the first-level cache for all rows.
template <class T, class E>
void meet(int64_t M, const TokenTiles<T, E>& x, int64_t count, const E* rows, int64_t stride_row, T* out,
          int64_t stride_out) {
    constexpr int64_t L1_BYTES = 24 << 10, W = Meeting<T, E>::width;
    const int64_t span = round_up(L1_BYTES / (tokens_of_tile(0, M) * int64_t(sizeof(E))), W);
    for (int64_t d = 0; d < x.D; d += span)
        for (int64_t m = 0, tokens; m < M; m += tokens) {
            tokens = tokens_of_tile(m, M);
            const int64_t width = smaller(span, x.D - d);
            const auto* const x_d = x.tile(m) + d * tokens;
            T* const to = out + m * stride_out;
            const auto with = [&](auto tile) {
                constexpr int TOKENS = decltype(tile)::value, P = rows_beside(TOKENS);
                const E* row = rows + d;
                int64_t p = 0;
                for (; p + P <= count; p += P, row += P * stride_row)
                    meet_tile<T, E, TOKENS, P>(width, x_d, row, stride_row, to + p, stride_out);
                for (; p < count; ++p, row += stride_row)
                    meet_tile<T, E, TOKENS, 1>(width, x_d, row, stride_row, to + p, stride_out);
            };
            switch (tokens) {
                case 1: with(Tile<1>()); break;
                case 2: with(Tile<2>()); break;
                case 3: with(Tile<3>()); break;
                case 4: with(Tile<4>()); break;
#if defined(__AVX512F__)
                case 5: with(Tile<5>()); break;
                case 6: with(Tile<6>()); break;
                case 7: with(Tile<7>()); break;
                case 8: with(Tile<8>()); break;
#endif
            }
        }
}

// Whether tokens are so few that one pass over W, ours, is faster than another's product.
inline bool are_few(const adamss_forward_args& args) {
    constexpr int64_t FEW = 32;
    return args.M > 0 && args.M <= FEW && (args.A || args.P || !args.layout.active);
}

// y[m] += S C^T, from C as it lies where laying it out does not pay.
template <class T>
void add_few(const adamss_forward_args& args, const Columns& columns, const T* S, int64_t stride_sm, T* y) {
    const adamss_layout& l = args.layout;
    const T* const C = static_cast<const T*>(args.C);
    if (args.M < TILE_M) {
        for (int64_t i = 0; i < l.N; ++i) {
            const int32_t k = l.row_subspace[i], start = columns.start[k], r = l.offsets[k + 1] - l.offsets[k];
            for (int64_t m = 0; start >= 0 && m < args.M; ++m) {
                T total = y[m * l.N + i];
                for (int32_t j = 0; j < r; ++j) total += S[m * stride_sm + start + j] * C[i * args.r_max + j];
                y[m * l.N + i] = total;
            }
        }
        return;
    }
    const Coefficients<T> coefficients(l, C, args.r_max, columns);
    const auto update = for_rho<T>(columns.count, [](auto h) { return update_tile<T, T, decltype(h)::value, TILE_M>; });
    const auto update_one = for_rho<T>(columns.count, [](auto h) { return update_tile<T, T, decltype(h)::value, 1>; });
    int64_t m = 0;
    for (; m < args.M; m += m + TILE_M <= args.M ? TILE_M : 1) {
        T* const rows[TILE_M] = {y + m * l.N, y + (m + 1) * l.N, y + (m + 2) * l.N, y + (m + 3) * l.N};
        (m + TILE_M <= args.M ? update : update_one)(l.N, S + m * stride_sm, stride_sm, coefficients, nullptr, rows);
    }
}

// The rows beside W that x meets: those of A, or of Q where that is less work, or of B where there is no A; none where P
// is there.
template <class T>
struct SkinnyRows {
    const bool gives_S;
    const Columns none_;
    const Projection<T> projection;
    bool is_bfloat16 = false;
    const void* rows = nullptr;
    int64_t count = 0, stride = 0;
    const T* bias = nullptr;  // (count,)

    SkinnyRows(const adamss_forward_args& args, const Columns& columns)
        : gives_S(!args.P && (!args.A || args.M * args.R * (args.D + columns.count) >
                                             columns.count * args.D * (args.R + args.M))),
          none_(no_rows(args.layout)),
          projection(gives_S ? columns : none_, static_cast<const T*>(args.B), gives_S ? args.A : nullptr,
                     args.A_is_bfloat16, static_cast<const T*>(args.a), args.R, args.D) {
        if (args.P) return;
        count = gives_S ? columns.count : args.R;
        if (!gives_S) {
            rows = args.A, stride = args.D, is_bfloat16 = args.A_is_bfloat16, bias = static_cast<const T*>(args.a);
        } else if (args.A) {
            rows = projection.values.data(), stride = projection.stride, bias = projection.q.data();
        } else {
            rows = args.B, stride = args.D;
        }
    }
};

template <class T, class X>
adamss_status forward_few(const adamss_forward_args& args) {
    constexpr bool IS_IN_PLACE = std::is_same_v<T, X>;
    const adamss_layout& l = args.layout;
    const int64_t M = args.M, N = l.N, D = args.D, R = args.R, rho_full = l.offsets[l.K];
    const Columns columns(l);
    const SkinnyRows<T> skinny(args, columns);
    const X* const x = static_cast<const X*>(args.x);
    const TokenTiles<T, X> tokens(M, D, x, args.stride_xm);
    // For skinny rows that are wider than those of W.
    const bool is_narrow = skinny.is_bfloat16 && !IS_IN_PLACE;
    const TokenTiles<T, T> converted(is_narrow || IS_IN_PLACE ? 0 : M, D, x, args.stride_xm);
    const TokenTiles<T, T>& wide_tokens = [&]() -> const TokenTiles<T, T>& {
        if constexpr (IS_IN_PLACE)
            return tokens;
        else
            return converted;
    }();
    X* const y = static_cast<X*>(args.y);
    Buffer<T> z(skinny.gives_S ? 0 : M * R, UNINITIALISED), sums_of_y(IS_IN_PLACE ? 0 : M * N, UNINITIALISED);
    const int64_t stride_sm = padded_rho<T>(columns);
    Buffer<T> S(M * stride_sm);
    T* const skinny_out = skinny.gives_S ? S.data() : z.data();
    const int64_t stride_out = skinny.gives_S ? stride_sm : R;
    T* sums = sums_of_y.data();
    if constexpr (IS_IN_PLACE) sums = y;
    if (!IS_IN_PLACE && args.adds_to_y) to_arithmetic(y, sums, M * N);
    const X* const bias = static_cast<const X*>(args.bias);

    // Rows of a block; elements that are worth a second thread.
    constexpr int64_t ROWS = 24, WORTH_TWO = 1 << 16;
    const int64_t skinny_blocks = (skinny.count + ROWS - 1) / ROWS, y_blocks = (N + ROWS - 1) / ROWS;
    const auto each = [&](int64_t block) {
        const int64_t begin = (block < skinny_blocks ? block : block - skinny_blocks) * ROWS;
        if (block < skinny_blocks) {
            const int64_t count = smaller(ROWS, skinny.count - begin), at = begin * skinny.stride;
            T* const out = skinny_out + begin;
            for (int64_t m = 0; m < M; ++m)
                for (int64_t r = 0; r < count; ++r) out[m * stride_out + r] = skinny.bias ? skinny.bias[begin + r] : T(0);
            if (is_narrow) {
                meet<T, X>(M, tokens, count, static_cast<const X*>(skinny.rows) + at, skinny.stride, out, stride_out);
            } else {
                const BasisRows<T> copy(skinny.rows, skinny.is_bfloat16, skinny.stride, at, count, D);
                meet<T, T>(M, wide_tokens, count, copy.rows[0], skinny.is_bfloat16 ? D : skinny.stride, out, stride_out);
            }
            return;
        }
        const int64_t count = smaller(ROWS, N - begin);
        for (int64_t m = 0; m < M; ++m)
            for (int64_t i = begin; i < begin + count; ++i) sums[m * N + i] = bias ? value_of<T>(bias + i) : T(0);
        if (args.W)
            meet<T, X>(M, tokens, count, static_cast<const X*>(args.W) + begin * args.stride_wn, args.stride_wn,
                       sums + begin, N);
    };
    const int64_t blocks = skinny_blocks + (args.adds_to_y ? 0 : y_blocks);
    if ((skinny.count + N) * D < WORTH_TWO)
        for (int64_t block = 0; block < blocks; ++block) each(block);
    else
        parallel_blocks(blocks, each);

    if (!skinny.gives_S) {
        for (int64_t m = 0; args.P && m < M; ++m)
            to_arithmetic(static_cast<const X*>(args.P) + m * args.stride_pm, z.data() + m * R, R);
        const TokenTiles<T, T> z_tokens(M, R, z.data(), R);
        for (int64_t p = 0; p < columns.count; ++p)
            meet<T, T>(M, z_tokens, 1, static_cast<const T*>(args.B) + columns.column[p] * R, R, S.data() + p,
                       stride_sm);
    }
    for (int64_t m = 0; args.S && m < M; ++m)
        write_S(columns, S.data() + m * stride_sm, rho_full, static_cast<T*>(args.S) + m * rho_full);
    add_few<T>(args, columns, S.data(), stride_sm, sums);
    if constexpr (!IS_IN_PLACE) {
        constexpr int W = Vector<T>::width;
        int64_t i = 0;
        for (; i + W <= M * N; i += W) store_as(y + i, load(sums + i));
        for (; i < M * N; ++i) store_as(y + i, sums[i]);
    }
    return args.W ? ADAMSS_WHOLE : ADAMSS_UPDATE;
}

// Whether tokens are so few that through P the gradients cost less than Q = B A and dB = (dS^T x) A^T, whatever they are
// multiplied with.
inline bool are_few(const adamss_backward_args& args) {
    constexpr int64_t FEW = 8;
    return args.M > 0 && args.M <= FEW && !args.W_updated;
}

// f(begin, width) for spans of D columns, whose rows of A are worth threads or not.
template <class F>
void for_spans(int64_t D, int64_t R, const F& f) {
    const int64_t span = columns_per_block(D, 4 * R, 64);
    parallel_blocks((D + span - 1) / span, [&](int64_t block) { f(block * span, smaller(span, D - block * span)); });
}

// dB = dS^T (x A^T + a), dx = (dS B) A: each token as plain PyTorch has it.
template <class T, class X>
adamss_status backward_few(const adamss_backward_args& args) {
    const adamss_layout& l = args.layout;
    const int64_t M = args.M, N = l.N, D = args.D, R = args.R, rho_full = l.offsets[l.K];
    const Columns columns(l);
    const int64_t rho = columns.count, learning = columns.learning;
    const T *const C = static_cast<const T*>(args.C), *const S = static_cast<const T*>(args.S);
    T *const dB = static_cast<T*>(args.dB), *const dC = static_cast<T*>(args.dC);
    Rows<T, X> dy;
    dy.along(static_cast<const X*>(args.dy), args.stride_dym, {nullptr}, 0, M, M, N);
    if (dC) std::memset(dC, 0, N * args.r_max * sizeof(T));
    // One sum after the other, as rows come: in double they are as good as sums side by side.
    Buffer<double> sums(M * rho);
    for (int64_t i = 0; i < N; ++i) {
        const int32_t k = l.row_subspace[i], first = l.offsets[k], r = l.offsets[k + 1] - first;
        const int64_t start = columns.start[k];
        for (int32_t j = 0; start >= 0 && j < r; ++j) {
            const double value = C[i * args.r_max + j];
            for (int64_t m = 0; m < M; ++m) sums[m * rho + start + j] += value * dy.p[m * dy.stride + i];
            T total = 0;
            for (int64_t m = 0; dC && start < learning && m < M; ++m)
                total += dy.p[m * dy.stride + i] * S[m * rho_full + first + j];
            if (dC) dC[i * args.r_max + j] = total;
        }
    }
    Buffer<T> dS(M * rho, UNINITIALISED), P(M * R, UNINITIALISED);
    for (int64_t i = 0; i < M * rho; ++i) dS[i] = T(sums[i]);

    if (dB) {
        std::memset(dB, 0, rho_full * R * sizeof(T));
        const T* const a = static_cast<const T*>(args.a);
        for (int64_t m = 0; m < M; ++m)
            for (int64_t r = 0; r < R; ++r)
                P[m * R + r] = args.P ? value_of<T>(static_cast<const X*>(args.P) + m * args.stride_pm + r)
                               : a    ? a[r]
                                      : T(0);
        if (!args.P) {
            const X* const x = static_cast<const X*>(args.x);
            const bool is_narrow = args.A_is_bfloat16 && !std::is_same_v<T, X>;
            const TokenTiles<T, X> tokens(is_narrow ? M : 0, D, x, args.stride_xm);
            const TokenTiles<T, T> wide_tokens(is_narrow ? 0 : M, D, x, args.stride_xm);
            for_spans(R, D, [&](int64_t r, int64_t count) {
                if (is_narrow)
                    return meet<T, X>(M, tokens, count, static_cast<const X*>(args.A) + r * D, D, P.data() + r, R);
                const BasisRows<T> A(args.A, args.A_is_bfloat16, D, r * D, count, D);
                meet<T, T>(M, wide_tokens, count, A.rows[0], D, P.data() + r, R);
            });
        }
        for (int64_t p = 0; p < learning; ++p)
            for (int64_t m = 0; m < M; ++m)
                for (int64_t r = 0; r < R; ++r) dB[columns.column[p] * R + r] += dS[m * rho + p] * P[m * R + r];
    }
    if (!args.dx) return ADAMSS_UPDATE;
    X* const dx = static_cast<X*>(args.dx);
    Buffer<const T*> B(rho);
    for (int64_t p = 0; p < rho; ++p) B[p] = static_cast<const T*>(args.B) + columns.column[p] * R;
    if (!args.A) {
        product_block<T, X>(M, D, rho, dS.data(), rho, B.data(), dx, D);
        return ADAMSS_UPDATE;
    }
    T* const dP = P.data();
    product_block<T, T>(M, R, rho, dS.data(), rho, B.data(), dP, R);
    for_spans(D, R, [&](int64_t d, int64_t width) {
        const BasisRows<T> A(args.A, args.A_is_bfloat16, D, d, R, width);
        product_block<T, X>(M, width, R, dP, R, A.rows.data(), dx + d, D);
    });
    return ADAMSS_UPDATE;
}

}  // namespace ADAMSS_ISA
