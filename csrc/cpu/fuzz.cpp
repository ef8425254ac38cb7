// Random shapes, strides, ranks and masks against scalar loops in double: `adamss_fuzz SECONDS [SEED]`.
// Built on demand (-DADAMSS_FUZZ=ON), with sanitizers; every instruction set that the machine can run is tried.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "interface.h"

namespace {

int32_t run_serially(int64_t begin, int64_t end, int64_t, adamss_task task, void* context) {
    // In pieces, out of order: no task may depend on another.
    const int64_t middle = (begin + end) / 2;
    if (middle < end) task(middle, end, context);
    if (begin < middle) task(begin, middle, context);
    return 0;
}

std::mt19937_64 generator;
int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
bool coin() { return integer(0, 1); }
double normal() { return std::normal_distribution<double>()(generator); }

// Storage types; values are rounded to them before either side computes.
struct bfloat16 {
    uint16_t bits;
};
double widen(float v) { return v; }
double widen(double v) { return v; }
double widen(bfloat16 v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
void set(float& to, double v) { to = float(v); }
void set(double& to, double v) { to = v; }
void set(bfloat16& to, double v) {
    const float f = float(v);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    to.bits = uint16_t(bits >> 16);
}

// A matrix with exactly the memory its rows need, so that a sanitizer sees any access past it.
template <class T>
struct Matrix {
    int64_t rows, columns, stride;
    std::vector<T> values;
    Matrix(int64_t rows, int64_t columns, int64_t stride, bool random)
        : rows(rows), columns(columns), stride(stride), values(rows ? (rows - 1) * stride + columns : 0) {
        for (T& v : values) set(v, random ? normal() : std::nan(""));
    }
    double operator()(int64_t i, int64_t j) const { return widen(values[i * stride + j]); }
    T* data() { return values.data(); }
};

// The largest error, in units of what rounding explains, that any output of any case has shown.
double worst = 0;

template <class T>
void compare(const char* what, const std::string& shape, const Matrix<T>& got, const std::vector<double>& expected,
             const std::vector<double>& magnitude, double unit, int64_t terms) {
    for (int64_t i = 0; i < got.rows; ++i)
        for (int64_t j = 0; j < got.columns; ++j) {
            const int64_t at = i * got.columns + j;
            // A sum of `terms` rounded products is off by at most about terms * unit * sum |product|; the output's own
            // rounding is one unit.
            const double allowed = unit * (double(terms) + 4) * (magnitude[at] + 1e-30);
            const double error = std::abs(got(i, j) - expected[at]);
            if (!(error <= allowed)) {
                std::printf("%s: %s[%lld, %lld] = %g, expected %g (allowed error %g); isa %s\n", shape.c_str(), what,
                            (long long)i, (long long)j, got(i, j), expected[at], allowed, adamss_cpu_isa());
                std::exit(1);
            }
            worst = std::fmax(worst, error / allowed);
        }
}

template <class X>
void one_case() {
    using T = std::conditional_t<std::is_same_v<X, double>, double, float>;
    const double unit_T = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;
    const double unit_X = std::is_same_v<X, bfloat16> ? 0x1p-8 : unit_T;
    const std::string isa = adamss_cpu_isa();
    const bool whole = std::is_same_v<X, bfloat16> && isa == "amx" && coin();
    // The update alone, added to what is there.
    const bool adds = !whole && coin();
    const int64_t dtype = std::is_same_v<X, double>     ? ADAMSS_FLOAT64
                          : std::is_same_v<X, bfloat16> ? ADAMSS_BFLOAT16
                                                        : ADAMSS_FLOAT32;
    const int64_t M = whole ? integer(64, 300) : integer(0, coin() ? 9 : 300);
    // The P that stands for x without A has an address only where there are tokens.
    const bool has_A = M == 0 || integer(0, 3) > 0;
    const int64_t D = integer(1, coin() ? 20 : 150), R = has_A ? integer(1, coin() ? 6 : 40) : D;
    int64_t N = integer(1, coin() ? 20 : 150), K = integer(1, std::min<int64_t>(N, coin() ? 4 : 32));
    // Instructions for bfloat16 take Q, C and dS rounded to it, those of AMX S as well; few tokens do without.
    const bool rounds = std::is_same_v<X, bfloat16> && (isa == "amx" || isa == "avx512bf16");
    const bool masked = coin(), is_few = M <= 32 && (has_A || !masked);
    const double unit_S = rounds && !is_few ? 0x1p-8 : unit_T, unit_dS = rounds && M > 8 ? 0x1p-8 : unit_T;
    const bool has_bias = coin(), has_a = has_bias && has_A, projection = has_A && coin();
    // Few tokens make the base product on the way where they get W.
    const bool few_whole = !whole && !adds && M > 0 && is_few && coin();

    std::vector<int32_t> row_subspace(N), offsets(K + 1, 0);
    for (int64_t i = 0; i < N; ++i) row_subspace[i] = int32_t(i < K ? i : integer(0, K - 1));
    std::shuffle(row_subspace.begin(), row_subspace.end(), generator);
    const int64_t r_max_wanted = integer(1, coin() ? 3 : 16);
    int64_t r_max = 0;
    for (int64_t k = 0; k < K; ++k) {
        const int64_t rank = integer(1, r_max_wanted);
        offsets[k + 1] = int32_t(offsets[k] + rank);
        r_max = std::max(r_max, rank);
    }
    const int64_t rho = offsets[K];
    std::vector<uint8_t> active(K, 1), trainable(K, 1);
    for (int64_t k = 0; k < K && masked; ++k) active[k] = coin(), trainable[k] = coin();
    const adamss_layout layout = {N, K, row_subspace.data(), offsets.data(), masked ? active.data() : nullptr,
                                  masked ? trainable.data() : nullptr};

    Matrix<X> x(M, D, D + integer(0, 3), true), dy(M, N, coin() ? N : N + integer(0, 5), true);
    Matrix<X> P(M, R, R + integer(0, 3), true);
    Matrix<X> bias(1, N, N, true), y_got(M, N, N, adds);
    Matrix<X> W(N, D, D + integer(0, 3), true);
    // A basis of bfloat16 is the same numbers in fewer bits.
    Matrix<bfloat16> A_bfloat16(R, D, D, true);
    Matrix<T> A(R, D, D, true);
    const bool A_is_bfloat16 = std::is_same_v<T, float> && coin();
    for (int64_t i = 0; i < R * D && A_is_bfloat16; ++i) A.values[i] = T(widen(A_bfloat16.values[i]));
    for (int64_t i = 0; i < R * D && !has_A; ++i) A.values[i] = i / D == i % D;
    const void* const A_given = !has_A ? nullptr : A_is_bfloat16 ? static_cast<void*>(A_bfloat16.data()) : A.data();
    Matrix<T> a(1, R, R, true), B(rho, R, R, true), C(N, r_max, r_max, true);

    std::ostringstream text;
    text << "M=" << M << " D=" << D << " N=" << N << " R=" << R << " K=" << K << " rho=" << rho << " r_max=" << r_max
         << " dtype=" << dtype << " has_A=" << has_A << " masked=" << masked << " projection=" << projection
         << " whole=" << whole << few_whole << " adds=" << adds;
    const std::string shape = text.str();

    // Q = B A and q = B a, with the magnitudes that bound their rounding.
    std::vector<double> Q(rho * D), Q_size(rho * D), q(rho), q_size(rho);
    for (int64_t p = 0; p < rho; ++p) {
        for (int64_t r = 0; r < R; ++r) {
            for (int64_t d = 0; d < D; ++d) {
                Q[p * D + d] += B(p, r) * A(r, d);
                Q_size[p * D + d] += std::abs(B(p, r) * A(r, d));
            }
            if (has_a) q[p] += B(p, r) * a(0, r), q_size[p] += std::abs(B(p, r) * a(0, r));
        }
    }
    auto on = [&](int64_t k) { return active[k] != 0; };
    auto learns = [&](int64_t k) { return on(k) && trainable[k]; };

    // ---- forward
    std::vector<double> S(M * rho), S_size(M * rho), y(M * N), y_size(M * N);
    for (int64_t m = 0; m < M; ++m) {
        for (int64_t k = 0; k < K; ++k)
            for (int64_t p = offsets[k]; p < offsets[k + 1] && on(k); ++p) {
                double s = 0, size = 0;
                if (projection && !whole) {
                    for (int64_t r = 0; r < R; ++r) s += P(m, r) * B(p, r), size += std::abs(P(m, r) * B(p, r));
                } else {
                    s = q[p], size = q_size[p];
                    for (int64_t d = 0; d < D; ++d)
                        s += x(m, d) * Q[p * D + d], size += std::abs(x(m, d)) * Q_size[p * D + d];
                }
                S[m * rho + p] = s, S_size[m * rho + p] = size;
            }
        for (int64_t i = 0; i < N; ++i) {
            double v = adds ? y_got(m, i) : has_bias ? bias(0, i) : 0, size = std::abs(v);
            for (int64_t d = 0; d < D && (whole || few_whole); ++d)
                v += x(m, d) * W(i, d), size += std::abs(x(m, d) * W(i, d));
            const int32_t k = row_subspace[i];
            for (int64_t j = 0; j < offsets[k + 1] - offsets[k] && on(k); ++j) {
                v += S[m * rho + offsets[k] + j] * C(i, j);
                size += S_size[m * rho + offsets[k] + j] * std::abs(C(i, j));
            }
            y[m * N + i] = v, y_size[m * N + i] = size;
        }
    }
    Matrix<T> S_got(M, rho, rho, false);
    const bool keep_S = coin();
    const adamss_forward_args forward = {dtype, M, D, R, x.data(), x.stride, projection ? P.data() : nullptr, P.stride,
                                         whole || few_whole ? W.data() : nullptr, W.stride, A_given, A_is_bfloat16,
                                         has_a ? a.data() : nullptr, B.data(),
                                         has_bias && !adds ? bias.data() : nullptr, C.data(), r_max,
                                         keep_S ? S_got.data() : nullptr, y_got.data(), layout, nullptr, adds};
    if (adamss_cpu_forward(&forward) != (whole || few_whole ? ADAMSS_WHOLE : ADAMSS_UPDATE)) std::abort();
    const int64_t terms_S = D + R;
    if (keep_S) compare("S", shape, S_got, S, S_size, unit_S, terms_S);
    const double unit_y = unit_S > unit_T || unit_T * double(terms_S + r_max) > unit_X ? unit_S : unit_X / 4;
    compare("y", shape, y_got, y, y_size, unit_y, terms_S + r_max);

    // ---- backward
    Matrix<T> S_in(M, rho, rho, true);
    const bool need_dx = coin(), need_dB = coin(), need_dC = coin();
    std::vector<double> dS(M * rho), dS_size(M * rho), dx(M * D), dx_size(M * D), dB(rho * R), dB_size(rho * R);
    std::vector<double> dC(N * r_max), dC_size(N * r_max);
    for (int64_t m = 0; m < M; ++m)
        for (int64_t i = 0; i < N; ++i) {
            const int32_t k = row_subspace[i];
            for (int64_t j = 0; j < offsets[k + 1] - offsets[k]; ++j) {
                const int64_t p = offsets[k] + j;
                if (on(k)) {
                    dS[m * rho + p] += dy(m, i) * C(i, j);
                    dS_size[m * rho + p] += std::abs(dy(m, i) * C(i, j));
                }
                if (learns(k)) {
                    dC[i * r_max + j] += dy(m, i) * S_in(m, p);
                    dC_size[i * r_max + j] += std::abs(dy(m, i) * S_in(m, p));
                }
            }
        }
    for (int64_t m = 0; m < M; ++m)
        for (int64_t k = 0; k < K; ++k)
            for (int64_t p = offsets[k]; p < offsets[k + 1]; ++p) {
                for (int64_t d = 0; d < D; ++d) {
                    dx[m * D + d] += dS[m * rho + p] * Q[p * D + d];
                    dx_size[m * D + d] += dS_size[m * rho + p] * Q_size[p * D + d];
                }
                for (int64_t r = 0; r < R && learns(k); ++r) {
                    double along = 0, size = 0;
                    if (projection) {
                        along = P(m, r), size = std::abs(along);
                    } else {
                        along = has_a ? a(0, r) : 0, size = std::abs(along);
                        for (int64_t d = 0; d < D; ++d) along += x(m, d) * A(r, d), size += std::abs(x(m, d) * A(r, d));
                    }
                    dB[p * R + r] += dS[m * rho + p] * along;
                    dB_size[p * R + r] += dS_size[m * rho + p] * size;
                }
            }
    for (int64_t m = 0; m < M && whole; ++m)
        for (int64_t i = 0; i < N; ++i)
            for (int64_t d = 0; d < D; ++d) {
                dx[m * D + d] += dy(m, i) * W(i, d);
                dx_size[m * D + d] += std::abs(dy(m, i) * W(i, d));
            }
    const bool updates_W = need_dx && !std::is_same_v<X, bfloat16> && coin();
    std::vector<double> W_updated(N * D), W_size(N * D);
    for (int64_t i = 0; i < N; ++i)
        for (int64_t d = 0; d < D; ++d) {
            W_updated[i * D + d] = W(i, d), W_size[i * D + d] = std::abs(W(i, d));
            const int32_t k = row_subspace[i];
            for (int64_t j = 0; j < offsets[k + 1] - offsets[k] && on(k); ++j) {
                W_updated[i * D + d] += C(i, j) * Q[(offsets[k] + j) * D + d];
                W_size[i * D + d] += std::abs(C(i, j)) * Q_size[(offsets[k] + j) * D + d];
            }
        }
    Matrix<X> dx_got(M, D, D, false), W_got(N, D, D, false);
    Matrix<T> dB_got(rho, R, R, false), dC_got(N, r_max, r_max, false);
    const adamss_backward_args backward = {
        dtype, M, D, R, dy.data(), dy.stride, projection || !has_A ? nullptr : x.data(), x.stride,
        projection ? P.data() : !has_A ? x.data() : nullptr, projection ? P.stride : x.stride, S_in.data(),
        whole || updates_W ? W.data() : nullptr, W.stride,
        A_given, A_is_bfloat16, has_a ? a.data() : nullptr, B.data(), C.data(), r_max,
        need_dx && !updates_W ? dx_got.data() : nullptr, updates_W ? W_got.data() : nullptr,
        need_dB ? dB_got.data() : nullptr, need_dC ? dC_got.data() : nullptr, layout};
    if (adamss_cpu_backward(&backward) != (whole ? ADAMSS_WHOLE : ADAMSS_UPDATE)) std::abort();
    const int64_t terms = M + N + D + R + rho;
    if (updates_W) compare("W_updated", shape, W_got, W_updated, W_size, unit_T, R + r_max);
    if (need_dx && !updates_W)
        compare("dx", shape, dx_got, dx, dx_size, unit_dS > unit_T ? unit_dS : unit_X > unit_T ? unit_X / 4 : unit_T, terms);
    if (need_dB) compare("dB", shape, dB_got, dB, dB_size, unit_dS, terms);
    if (need_dC) compare("dC", shape, dC_got, dC, dC_size, whole ? unit_S : unit_T, terms);
}

}  // namespace

int main(int count, char** arguments) {
    const double seconds = count > 1 ? std::atof(arguments[1]) : 5;
    const uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
    generator.seed(seed);
    std::printf("seed %llu\n", (unsigned long long)seed);
    std::fflush(stdout);  // a sanitizer ends the process without that
    std::vector<std::string> isas;
    std::istringstream names(adamss_cpu_isas());
    for (std::string name; names >> name;) isas.push_back(name);
    const auto start = std::chrono::steady_clock::now();
    int64_t cases = 0;
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds)
        for (const std::string& isa : isas) {
            if (adamss_cpu_init(run_serially, isa.c_str()) != 0) return 1;
            one_case<float>(), one_case<double>(), one_case<bfloat16>();
            cases += 3;
        }
    std::printf("%lld cases on %s; largest error %.2g of what rounding explains\n", (long long)cases,
                adamss_cpu_isas(), worst);
}
