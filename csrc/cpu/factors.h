// Rows of matrices as the factors of a product: where they lie, or converted, or rounded, two values to a factor. The
// two lie along a row where a product sums along rows; across them, they are of one row and the next.
#pragma once

#include "operands.h"

namespace ADAMSS_ISA {

template <class E>
constexpr int64_t VALUES = 1;
#if defined(__AVX512BF16__)
template <>
constexpr int64_t VALUES<Halves> = 2;
#endif

// Factors that n values make.
template <class E>
int64_t factors_of(int64_t n) {
    return (n + VALUES<E> - 1) / VALUES<E>;
}

template <class X, class E>
void to_factors(const X* row, E* to, int64_t n) {
    to_arithmetic(row, to, n);
}

#if defined(__AVX512BF16__)

inline __m256i rounded(const bfloat16* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline __m256i rounded(const float* p) { return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(p)); }
inline bfloat16 rounded_one(const bfloat16* p) { return *p; }
inline bfloat16 rounded_one(const float* p) { return to_bfloat16(*p); }

template <class X>
void to_factors(const X* row, Halves* to, int64_t n) {
    constexpr int64_t W = Vector<float>::width;
    bfloat16* const half = reinterpret_cast<bfloat16*>(to);
    int64_t i = 0;
    for (; i + W <= n; i += W) _mm256_storeu_si256((__m256i*)(half + i), rounded(row + i));
    for (; i < n; ++i) half[i] = rounded_one(row + i);
    if (n % 2) half[n] = {0};
}

// first[i] beside second[i]; zeros where there is no second row.
template <class X>
void to_factors(const X* first, const X* second, Halves* to, int64_t n) {
    constexpr int64_t W = Vector<Halves>::width;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const __m512i low = _mm512_cvtepu16_epi32(rounded(first + i));
        const __m512i high = _mm512_cvtepu16_epi32(second ? rounded(second + i) : _mm256_setzero_si256());
        _mm512_storeu_si512(to + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    for (; i < n; ++i) to[i] = {rounded_one(first + i), second ? rounded_one(second + i) : bfloat16{0}};
}

#endif

// Rows of X that follow one another as factors E, themselves if they can be.
template <class E, class X>
struct Rows {
    Buffer<E> copy;
    const E* p = nullptr;
    int64_t count = 0, width = 0, stride = 0;

    // M tokens from `begin` on. Padding repeats the last row, so that whole tiles can be read.
    void along(const X* x, int64_t stride_xm, const Tokens& tokens, int64_t begin, int64_t M, int64_t padded,
               int64_t D) {
        constexpr int64_t V = VALUES<E>;
        count = padded, width = factors_of<E>(D);
        if constexpr (sizeof(E) == V * sizeof(X))
            if (M == padded && tokens.are_together(begin, M) && D % V == 0 && stride_xm % V == 0) {
                p = reinterpret_cast<const E*>(x + tokens[begin] * stride_xm), stride = stride_xm / V;
                return;
            }
        copy.resize(padded * width);
        for (int64_t m = 0; m < padded; ++m)
            to_factors(x + tokens[begin + smaller(m, M - 1)] * stride_xm, copy.data() + m * width, D);
        p = copy.data(), stride = width;
    }

    void across(const X* x, int64_t stride_xm, const Tokens& tokens, int64_t begin, int64_t M, int64_t D) {
        if constexpr (VALUES<E> == 1) {
            along(x, stride_xm, tokens, begin, M, M, D);
        } else {
            count = factors_of<E>(M), width = D;
            copy.resize(count * width);
            for (int64_t m = 0; m < M; m += 2)
                to_factors(x + tokens[begin + m] * stride_xm,
                           m + 1 < M ? x + tokens[begin + m + 1] * stride_xm : nullptr, copy.data() + m / 2 * width, D);
            p = copy.data(), stride = width;
        }
    }
};

// The same of rows of T that lie anywhere.
template <class T, class E>
struct Factors {
    Buffer<E> copy;
    Buffer<const E*> rows;

    void along(const T* const* from, int64_t count, int64_t D) {
        take(from, count, factors_of<E>(D), [&](int64_t i, E* to) { to_factors(from[i], to, D); });
    }
    void across(const T* const* from, int64_t count, int64_t D) {
        take(from, factors_of<E>(count), D, [&](int64_t i, E* to) {
            if constexpr (VALUES<E> == 2)
                to_factors(from[2 * i], 2 * i + 1 < count ? from[2 * i + 1] : nullptr, to, D);
        });
    }

  private:
    template <class F>
    void take(const T* const* from, int64_t count, int64_t width, const F& convert) {
        rows.resize(count);
        if constexpr (std::is_same_v<T, E>) {
            for (int64_t i = 0; i < count; ++i) rows[i] = from[i];
        } else {
            const int64_t stride = row_stride<E>(width);
            copy.resize(count * stride);
            for (int64_t i = 0; i < count; ++i) {
                convert(i, copy.data() + i * stride);
                rows[i] = copy.data() + i * stride;
            }
        }
    }
};

}  // namespace ADAMSS_ISA
