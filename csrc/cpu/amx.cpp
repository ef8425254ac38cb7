// bfloat16 with AMX: the base product and the update in one pass over x or dy; everything else as with AVX-512's bf16.
//
// Forward and backward are the same pass turned round: S = left U, out = left base + S V + bias. Forward: left = x,
// base = W^T, U = Q^T, V = C^T. Backward: left = dy, base = W, U = C, V = Q. U, S and V meet the tiles rounded to
// bfloat16, as plain PyTorch has them; sums are floats, and S V only makes the base product deeper.
#include "amx_tiles.h"
#include "backward.h"
#include "forward.h"

#ifdef __linux__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace avx512bf16 {
extern const adamss::Kernels kernels;
}

namespace ADAMSS_ISA {

// Whether this machine has AMX for bfloat16 and the kernel lets this process use it.
bool usable() {
#ifdef __linux__
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, AVX512_BF16 = 1u << 5;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (AMX_BF16 | AMX_TILE)) != (AMX_BF16 | AMX_TILE)) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & AVX512_BF16)) return false;
    return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

namespace {

// Where W stays in the second-level cache and there are rows enough to pay for packing it; else the base product is
// left to the caller, and the update to AVX-512.
bool takes_base(const void* W, int64_t M, int64_t D, int64_t N) {
    constexpr int64_t FEWEST_ROWS = 64, MOST_ELEMENTS = 1 << 20;
    return W && M >= FEWEST_ROWS && D * N <= MOST_ELEMENTS;
}

// Adds the bias to the sums of 32 columns, rounds and writes them, some rows at each call. The output is far away, and
// a row of a panel a single line of it: each is asked for a panel ahead.
class Finish {
    const float* bias_;
    const int64_t M_, width_, rows_per_call_;
    bfloat16* const out_;
    Prefetch& ahead_;
    const float* sums_ = nullptr;
    bfloat16* to_ = nullptr;
    int64_t m_, next_ = 0;
    __mmask32 columns_ = 0;
    __m512 bias_0_{}, bias_1_{};

  public:
    // Called `calls` times for every 32 rows.
    Finish(const float* bias, int64_t M, bfloat16* out, int64_t width, int64_t calls, Prefetch& ahead)
        : bias_(bias),
          M_(M),
          width_(width),
          rows_per_call_((PAIR + calls - 1) / calls),
          out_(out),
          ahead_(ahead),
          m_(M) {}

    void start(const float* sums, int64_t n) {
        rows(M_);
        sums_ = sums, to_ = out_ + n, m_ = 0, columns_ = first32(width_ - n);
        next_ = n + PAIR < width_ ? PAIR : M_ * width_ - n;
        if (bias_) bias_0_ = _mm512_loadu_ps(bias_ + n), bias_1_ = _mm512_loadu_ps(bias_ + n + ROWS);
    }
    void rows(int64_t count) {
        for (const int64_t end = smaller(M_, m_ + count); m_ < end; ++m_, to_ += width_) {
            const float* const sum = sums_ + m_ / ROWS * 2 * SUM + m_ % ROWS * ROWS;
            const __m512 y_0 = _mm512_load_ps(sum) + bias_0_, y_1 = _mm512_load_ps(sum + SUM) + bias_1_;
            _mm512_mask_storeu_epi16(to_, columns_, (__m512i)_mm512_cvtne2ps_pbh(y_1, y_0));
            __builtin_prefetch(to_ + next_, 1, 2);
            ahead_.some();
        }
    }
    void operator()() { rows(rows_per_call_); }
};

// One pass over rows (M, depth): S = rows U + u, out (M, width) = rows base + S V + bias.
class Pass {
    int64_t depth_, width_, rho_, steps_, deep_, stride_s_;
    Buffer<bfloat16> skinny_, base_;

  public:
    // U and V are rows of length `depth` and `width`; `pack` packs one pair of column tiles of the base.
    template <class F>
    Pass(int64_t depth, int64_t width, int64_t rho, const float* const* U, const float* const* V, const F& pack)
        : depth_(depth),
          width_(width),
          rho_(rho),
          steps_(steps_for(depth)),
          deep_(steps_ + steps_for(rho)),
          stride_s_(pairs_for(rho) * PAIR),
          skinny_(pairs_for(rho) * 2 * steps_ * TILE, UNINITIALISED),
          base_(pairs_for(width) * 2 * deep_ * TILE, UNINITIALISED) {
        const Rounded u(U, rho, depth), v(V, width ? rho : 0, width);
        for (int64_t pair = 0; pair < pairs_for(rho); ++pair)
            pack_columns(u.rows.data() + pair * PAIR, rho - pair * PAIR, depth,
                         skinny_.data() + pair * 2 * steps_ * TILE);
        parallel_blocks(pairs_for(width), [&](int64_t pair) {
            bfloat16* const tiles = base_.data() + pair * 2 * deep_ * TILE;
            pack(pair, tiles);
            pack_rows(v.rows.data(), rho, pair * PAIR, width - pair * PAIR, tiles + 2 * steps_ * TILE);
        });
    }

    int64_t stride_s() const { return stride_s_; }
    int64_t left_size(int64_t M) const { return pairs_for(M) * 2 * deep_ * TILE; }

    // The left operand and S (whole pairs of rows; columns beyond RHO are zero).
    void skinny(const bfloat16* rows, int64_t stride, int64_t M, const float* u, bfloat16* left, float* S) const {
        const int64_t pairs = pairs_for(M);
        pack_left(rows, stride, M, depth_, deep_, left);
        Buffer<float> sums(pairs * 4 * SUM, UNINITIALISED);
        auto nothing = [] {};
        for (int64_t p = 0; p < rho_; p += PAIR) {
            multiply_panel(left, deep_, pairs, skinny_.data() + p / PAIR * 2 * steps_ * TILE, steps_, sums.data(),
                           nothing);
            for (int64_t j = 0; j < 2; ++j) {
                const int64_t first = p + j * ROWS;
                const __m512 u_p = u ? load_floats(u + first, rho_ - first) : _mm512_setzero_ps();
                for (int64_t m = 0; m < pairs * PAIR; ++m)
                    // Rows of padding stay zero.
                    _mm512_storeu_ps(S + m * stride_s_ + first,
                                     m < M ? sum_row(sums.data() + m / PAIR * 4 * SUM, m % PAIR, j) + u_p
                                           : _mm512_setzero_ps());
            }
        }
    }

    // out = left base + S V + bias.
    void product(int64_t M, const float* S, const float* bias, bfloat16* left, bfloat16* out, Prefetch& ahead) const {
        const int64_t pairs = pairs_for(M);
        // The depth that S adds.
        for (int64_t m = 0; m < pairs * PAIR; ++m) {
            bfloat16* to = left + (m / ROWS * deep_ + steps_) * TILE + m % ROWS * DEPTH;
            const float* const S_m = S + m * stride_s_;
            for (int64_t p = 0; p < rho_; p += DEPTH, to += TILE)
                round_row(_mm512_loadu_ps(S_m + p), _mm512_loadu_ps(S_m + p + ROWS), to);
        }
        // The sums of one panel are rounded and written while the next one is multiplied.
        const int64_t size = pairs * 4 * SUM;
        Buffer<float> sums(2 * size, UNINITIALISED);
        Finish finish(bias, M, out, width_, deep_, ahead);
        for (int64_t panel = 0; panel < pairs_for(width_); ++panel) {
            float* const panel_sums = sums.data() + panel % 2 * size;
            multiply_panel(left, deep_, pairs, base_.data() + panel * 2 * deep_ * TILE, deep_, panel_sums, finish);
            finish.start(panel_sums, panel * PAIR);
        }
        finish.rows(M);
    }
};

// Sums over tokens of S^T rows: S^T is packed once, then meets rows of any width.
class Outer {
    int64_t tokens_, rho_, steps_;
    Buffer<bfloat16> transposed_;

  public:
    Outer(int64_t tokens, int64_t rho)
        : tokens_(tokens),
          rho_(rho),
          steps_(steps_for(tokens)),
          transposed_((rho + ROWS - 1) / ROWS * steps_ * TILE, UNINITIALISED) {}

    // Floats that the sums for `width` columns take: [column / 32][row / 16][2] tiles.
    static int64_t size(int64_t rho, int64_t width) { return pairs_for(width) * ((rho + ROWS - 1) / ROWS) * 2 * SUM; }
    // The sum of row p and column n; those of columns to the next multiple of ROWS follow.
    static const float* from(const float* sums, int64_t rho, int64_t p, int64_t n) {
        const int64_t tiles = (rho + ROWS - 1) / ROWS;
        return sums + ((n / PAIR * tiles + p / ROWS) * 2 + n % PAIR / ROWS) * SUM + p % ROWS * ROWS + n % ROWS;
    }

    void take(const float* S, int64_t stride) { pack_transposed(S, stride, tokens_, rho_, transposed_.data()); }

    // sums = or += S^T rows.
    void multiply(const bfloat16* rows, int64_t stride, int64_t width, bool add, float* sums) const {
        const int64_t tiles = (rho_ + ROWS - 1) / ROWS;
        Buffer<const bfloat16*> row(tokens_);
        for (int64_t m = 0; m < tokens_; ++m) row[m] = rows + m * stride;
        Buffer<bfloat16> right(steps_ * 2 * TILE, UNINITIALISED);
        auto nothing = [] {};
        for (int64_t n = 0; n < width; n += PAIR) {
            pack_rows(row.data(), tokens_, n, width - n, right.data());
            const bfloat16* left = transposed_.data();
            int64_t tile = 0;
            for (; tile + 2 <= tiles; tile += 2, sums += 4 * SUM, left += 2 * steps_ * TILE)
                multiply_pair<2>(left, steps_ * TILE, right.data(), steps_, add, sums, nothing);
            if (tile < tiles) {
                multiply_pair<1>(left, 0, right.data(), steps_, add, sums, nothing);
                sums += 2 * SUM;
            }
        }
    }
};

adamss_status forward_bfloat16(const adamss_forward_args& args) {
    const adamss_layout& l = args.layout;
    const int64_t N = l.N, D = args.D, rho_full = l.offsets[l.K];
    const Columns columns(l);
    const Coefficients<float> coefficients(l, static_cast<const float*>(args.C), args.r_max, columns);
    const DenseCoefficients<float> Ct(coefficients, columns.count, N);
    const Projection<float> projection(columns, static_cast<const float*>(args.B), args.A, args.A_is_bfloat16,
                                       static_cast<const float*>(args.a), args.R, D);
    const bfloat16* const W = static_cast<const bfloat16*>(args.W);
    const Pass pass(D, N, columns.count, projection.Q.data(), Ct.rows.data(), [&](int64_t pair, bfloat16* tiles) {
        const bfloat16* rows[PAIR];
        for (int64_t i = 0; i < PAIR && pair * PAIR + i < N; ++i) rows[i] = W + (pair * PAIR + i) * args.stride_wn;
        pack_columns(rows, N - pair * PAIR, D, tiles);
    });
    Buffer<float> bias(pairs_for(N) * PAIR);
    if (args.bias) to_arithmetic(static_cast<const bfloat16*>(args.bias), bias.data(), N);

    parallel_blocks((args.M + BLOCK_M - 1) / BLOCK_M, [&](int64_t block) {
        const TilesInUse tiles;
        const int64_t begin = block * BLOCK_M, M = smaller(BLOCK_M, args.M - begin);
        const bfloat16* const x = static_cast<const bfloat16*>(args.x) + begin * args.stride_xm;
        Buffer<bfloat16> left(pass.left_size(M), UNINITIALISED);
        Buffer<float> S(pairs_for(M) * PAIR * pass.stride_s(), UNINITIALISED);
        Prefetch ahead(pairs_for(N) * M);
        ahead.add(x + M * args.stride_xm, args.stride_xm, smaller(BLOCK_M, args.M - begin - M));
        pass.skinny(x, args.stride_xm, M, projection.q.data(), left.data(), S.data());
        if (args.S)
            for (int64_t m = 0; m < M; ++m)
                write_S(columns, S.data() + m * pass.stride_s(), rho_full,
                        static_cast<float*>(args.S) + (begin + m) * rho_full);
        pass.product(M, S.data(), bias.data(), left.data(), static_cast<bfloat16*>(args.y) + begin * N, ahead);
    });
    return ADAMSS_WHOLE;
}

adamss_status backward_bfloat16(const adamss_backward_args& args) {
    const adamss_layout& l = args.layout;
    const int64_t N = l.N, D = args.D, rho_full = l.offsets[l.K];
    const Columns columns(l);
    const int64_t rho = args.dx ? columns.count : columns.learning, learning = columns.learning;
    const Coefficients<float> coefficients(l, static_cast<const float*>(args.C), args.r_max, columns);
    const DenseCoefficients<float> Ct(coefficients, rho, N);
    const Columns none(no_rows(l));
    const Projection<float> projection(args.dx ? columns : none, static_cast<const float*>(args.B),
                                       args.A, args.A_is_bfloat16, nullptr, args.R, D);
    const bfloat16* const W = static_cast<const bfloat16*>(args.W);
    Buffer<const bfloat16*> W_rows(N);
    for (int64_t i = 0; i < N; ++i) W_rows[i] = W + i * args.stride_wn;
    const Pass pass(N, args.dx ? D : 0, rho, Ct.rows.data(), projection.Q.data(), [&](int64_t pair, bfloat16* tiles) {
        pack_rows(W_rows.data(), N, pair * PAIR, D - pair * PAIR, tiles);
    });

    const bool masked = !columns.is_all;
    const bfloat16* const source = static_cast<const bfloat16*>(args.P ? args.P : args.x);
    const int64_t width = args.P ? args.R : D, stride = args.P ? args.stride_pm : args.stride_xm;
    const int64_t size_dQ = args.dB ? Outer::size(learning, width) : 0;
    const int64_t size_dC = args.dC ? round_up(N * args.r_max, ROWS) : 0;
    // Whole cache lines, so that no row of a tile straddles two.
    const int64_t size = size_dQ + size_dC + round_up(learning, ROWS);
    const Shares shares(args.M, D, size);
    Buffer<float> partial(shares.count * size, UNINITIALISED);
    parallel_blocks(shares.count, [&](int64_t share) {
        const TilesInUse tiles;
        float* const dQ = partial.data() + share * size;
        float *const dC = dQ + size_dQ, *const dq = dC + size_dC;
        std::memset(dq, 0, learning * sizeof(float));
        const int64_t first = share * shares.tokens, end = smaller(args.M, first + shares.tokens);
        const int64_t block_M = smaller(4 * PAIR, shares.tokens);
        Buffer<bfloat16> left(pass.left_size(block_M), UNINITIALISED);
        Buffer<float> dS(block_M * pass.stride_s(), UNINITIALISED);
        Buffer<float> sums_dC(args.dC ? Outer::size(learning, N) : 0, UNINITIALISED);
        Buffer<float> S_learning(masked ? block_M * learning : 0, UNINITIALISED);
        for (int64_t begin = first; begin < end; begin += block_M) {
            const int64_t M = smaller(block_M, end - begin), next = begin + M, next_M = smaller(block_M, args.M - next);
            const bfloat16* const dy = static_cast<const bfloat16*>(args.dy) + begin * args.stride_dym;
            pass.skinny(dy, args.stride_dym, M, nullptr, left.data(), dS.data());
            Outer outer(M, learning);
            if (args.dC) {
                const float* S = static_cast<const float*>(args.S) + begin * rho_full;
                if (masked) {
                    for (int64_t m = 0; m < M; ++m)
                        for (int64_t p = 0; p < learning; ++p)
                            S_learning[m * learning + p] = S[m * rho_full + columns.column[p]];
                    S = S_learning.data();
                }
                outer.take(S, masked ? learning : rho_full);
                outer.multiply(dy, args.stride_dym, N, begin > first, sums_dC.data());
            }
            if (args.dB) {
                outer.take(dS.data(), pass.stride_s());
                outer.multiply(source + begin * stride, stride, width, begin > first, dQ);
                for (int64_t m = 0; m < M; ++m)
                    for (int64_t p = 0; p < learning; ++p) dq[p] += dS[m * pass.stride_s() + p];
            }
            if (args.dx) {
                Prefetch ahead(pairs_for(D) * M);
                ahead.add(dy + M * args.stride_dym, args.stride_dym, next_M);
                if (args.dB) ahead.add(source + next * stride, stride, next_M);
                pass.product(M, dS.data(), nullptr, left.data(), static_cast<bfloat16*>(args.dx) + begin * D, ahead);
            }
        }
        // Of RHO sums for each row of C, r_k are wanted.
        if (args.dC)
            for_learning(l, columns, [&](int64_t i, int64_t j, int64_t p) {
                dC[i * args.r_max + j] = *Outer::from(sums_dC.data(), learning, p, i);
            });
    });
    add_shares(partial, shares.count, size);
    const float *const total_dQ = partial.data(), *const total_dC = total_dQ + size_dQ;
    if (args.dB) {
        Buffer<float> dQ(learning * width, UNINITIALISED);
        for (int64_t p = 0; p < learning; ++p)
            for (int64_t d = 0; d < width; d += ROWS)
                std::memcpy(dQ.data() + p * width + d, Outer::from(total_dQ, learning, p, d),
                            smaller(ROWS, width - d) * sizeof(float));
        write_dB(args, columns, dQ.data(), width, total_dC + size_dC);
    }
    if (args.dC)
        write_dC<float>(args, columns, [&](int64_t i, int64_t j) { return total_dC[i * args.r_max + j]; });
    return ADAMSS_WHOLE;
}

adamss_status forward_any(const adamss_forward_args& args) {
    if (args.dtype != ADAMSS_BFLOAT16) return avx512bf16::kernels.forward(args);
    if (takes_base(args.W, args.M, args.D, args.layout.N)) return forward_bfloat16(args);
    // From a handful of tokens on PyTorch's own product fills tiles; the pass of dot products was measured without any.
    constexpr int64_t HANDFUL = 8;
    adamss_forward_args update = args;
    if (args.M > HANDFUL) update.W = nullptr;
    return avx512bf16::kernels.forward(update);
}

adamss_status grouped_forward_any(const adamss_forward_args& args, const adamss_groups& groups) {
    return avx512bf16::kernels.grouped_forward(args, groups);
}

adamss_status grouped_backward_any(const adamss_backward_args& args, const adamss_groups& groups) {
    return avx512bf16::kernels.grouped_backward(args, groups);
}

adamss_status backward_any(const adamss_backward_args& args) {
    const bool here = args.dtype == ADAMSS_BFLOAT16 && takes_base(args.W, args.M, args.D, args.layout.N);
    return here ? backward_bfloat16(args) : avx512bf16::kernels.backward(args);
}

}  // namespace

extern const adamss::Kernels kernels;
const adamss::Kernels kernels = {"amx", forward_any, backward_any, grouped_forward_any, grouped_backward_any};

}  // namespace ADAMSS_ISA
