// One SIMD register of the instruction set that this file is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define ADAMSS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define ADAMSS_VECTOR_BYTES 32
#else
#define ADAMSS_VECTOR_BYTES 16
#endif

// Loops over registers are unrolled, so that arrays of registers are registers.
#define ADAMSS_UNROLL _Pragma("GCC unroll 16")
// For lambdas that hold registers of their surroundings.
#define ADAMSS_INLINE __attribute__((always_inline))

namespace ADAMSS_ISA {

// bfloat16 is storage only: arithmetic is in float.
struct bfloat16 {
    uint16_t bits;
};

template <class T>
struct Vector {
    static constexpr int width = ADAMSS_VECTOR_BYTES / sizeof(T);
    typedef T type __attribute__((vector_size(ADAMSS_VECTOR_BYTES)));
};
template <class T>
using vec = typename Vector<T>::type;

template <class T>
inline vec<T> load(const T* p) {
    vec<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class T>
inline void store(T* p, vec<T> v) {
    std::memcpy(p, &v, sizeof v);
}

template <class T>
inline vec<T> broadcast(T s) {
    return s - vec<T>{};
}

// total + a b.
inline vec<float> multiply_add(vec<float> total, vec<float> a, vec<float> b) { return total + a * b; }
inline vec<double> multiply_add(vec<double> total, vec<double> a, vec<double> b) { return total + a * b; }

template <class T>
inline T sum(vec<T> v) {
    T total = 0;
    for (int lane = 0; lane < Vector<T>::width; ++lane) total += v[lane];
    return total;
}

// The sums of four registers, which share most of the shuffles.
template <class T>
inline void sum4(const vec<T> v[4], T out[4]) {
    for (int i = 0; i < 4; ++i) out[i] = sum<T>(v[i]);
}

// p[index[lane]] for every lane.
template <class T>
inline vec<T> gather(const T* p, const int32_t* index) {
    vec<T> v;
    for (int lane = 0; lane < Vector<T>::width; ++lane) v[lane] = p[index[lane]];
    return v;
}

inline float to_float(bfloat16 h) {
    uint32_t bits = uint32_t(h.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// Registers of storage type as arithmetic type.
template <class T>
inline vec<T> load_as(const T* p) {
    return load(p);
}
template <class T>
inline vec<T> load_as(const bfloat16* p) {
    typedef uint16_t half_t __attribute__((vector_size(ADAMSS_VECTOR_BYTES / 2)));
    typedef uint32_t bits_t __attribute__((vector_size(ADAMSS_VECTOR_BYTES)));
    half_t half;
    std::memcpy(&half, p, sizeof half);
    return (vec<T>)(__builtin_convertvector(half, bits_t) << 16);
}

// Round to nearest even, as torch does; a NaN stays one.
inline bfloat16 to_bfloat16(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// Reading and writing rows of storage type as arithmetic type.
inline void to_arithmetic(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }
inline void to_arithmetic(const double* from, double* to, int64_t n) { std::memcpy(to, from, n * sizeof(double)); }
inline void to_arithmetic(const bfloat16* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

inline void store_as(float* p, vec<float> v) { store<float>(p, v); }
inline void store_as(double* p, vec<double> v) { store<double>(p, v); }
inline void store_as(float* p, float s) { *p = s; }
inline void store_as(double* p, double s) { *p = s; }
inline void store_as(bfloat16* p, float s) { *p = to_bfloat16(s); }
inline void store_as(bfloat16* p, vec<float> v) {
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
#else
    // Branch-free, so that it stays in registers: a NaN is recognised by v != v.
    typedef uint32_t bits_t __attribute__((vector_size(ADAMSS_VECTOR_BYTES)));
    typedef uint16_t half_t __attribute__((vector_size(ADAMSS_VECTOR_BYTES / 2)));
    bits_t bits = (bits_t)v;
    bits_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    bits_t quiet = (bits >> 16) | 0x40;
    bits_t nan = (bits_t)(v != v);
    half_t half = __builtin_convertvector((nan & quiet) | (~nan & rounded), half_t);
#endif
    std::memcpy(p, &half, sizeof half);
}

// What values that are stored as X are to products summed in T: T, to which they are converted, unless the instruction
// set multiplies them as they are.
template <class T, class X>
struct FactorOf {
    using type = T;
};
template <class T, class X>
using Factor = typename FactorOf<T, X>::type;

#if defined(__AVX512BF16__)

// Two bfloat16 whose products with two others are added as one: a b = a.first b.first + a.second b.second.
struct Halves {
    bfloat16 first, second;
};
inline float operator*(Halves a, Halves b) {
    return to_float(a.first) * to_float(b.first) + to_float(a.second) * to_float(b.second);
}
template <>
struct Vector<Halves> {
    static constexpr int width = 16;
    typedef __m512bh type;
};
inline vec<float> multiply_add(vec<float> total, vec<Halves> a, vec<Halves> b) {
    return (vec<float>)_mm512_dpbf16_ps((__m512)total, a, b);
}
template <>
inline vec<Halves> broadcast<Halves>(Halves s) {
    int32_t bits;
    std::memcpy(&bits, &s, sizeof bits);
    return (vec<Halves>)_mm512_set1_epi32(bits);
}
template <>
struct FactorOf<float, bfloat16> {
    using type = Halves;
};

#endif

#if defined(__AVX512F__)

template <>
inline float sum<float>(vec<float> v) {
    return _mm512_reduce_add_ps((__m512)v);
}
template <>
inline double sum<double>(vec<double> v) {
    return _mm512_reduce_add_pd((__m512d)v);
}
template <>
inline void sum4<float>(const vec<float> v[4], float out[4]) {
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    // Each 128-bit lane now holds a0 b0 a1 b1 and c0 d0 c1 d1: add the halves into a b c d.
    __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(abcd), 1)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
template <>
inline vec<float> gather<float>(const float* p, const int32_t* index) {
    return (vec<float>)_mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4);
}
template <>
inline vec<double> gather<double>(const double* p, const int32_t* index) {
    return (vec<double>)_mm512_i32gather_pd(_mm256_loadu_si256((const __m256i*)index), p, 8);
}

#elif defined(__AVX2__)

template <>
inline vec<float> gather<float>(const float* p, const int32_t* index) {
    return (vec<float>)_mm256_i32gather_ps(p, _mm256_loadu_si256((const __m256i*)index), 4);
}
template <>
inline vec<double> gather<double>(const double* p, const int32_t* index) {
    return (vec<double>)_mm256_i32gather_pd(p, _mm_loadu_si128((const __m128i*)index), 8);
}

#endif

template <class T, class X>
T value_of(const X* p) {
    T value;
    to_arithmetic(p, &value, 1);
    return value;
}

// A row of S held for repeated gathers: in registers where the instruction set can permute one, else in memory.
// `Registers` is the number of registers that hold the row; 0 means memory.
template <class T, int Registers>
struct Row {
    const T* p;
    explicit Row(const T* row) : p(row) {}
    vec<T> operator[](const int32_t* index) const { return gather<T>(p, index); }
    static constexpr bool IN_REGISTERS = false;
    static constexpr int64_t capacity = 1 << 30;
};

#if defined(__AVX512F__)
template <>
struct Row<float, 1> {
    __m512 v;
    explicit Row(const float* row) : v(_mm512_loadu_ps(row)) {}
    vec<float> operator[](const int32_t* index) const {
        return (vec<float>)_mm512_permutexvar_ps(_mm512_loadu_si512(index), v);
    }
    static constexpr bool IN_REGISTERS = true;
    static constexpr int64_t capacity = 16;
};
template <>
struct Row<float, 2> {
    __m512 v, w;
    explicit Row(const float* row) : v(_mm512_loadu_ps(row)), w(_mm512_loadu_ps(row + 16)) {}
    vec<float> operator[](const int32_t* index) const {
        return (vec<float>)_mm512_permutex2var_ps(v, _mm512_loadu_si512(index), w);
    }
    static constexpr bool IN_REGISTERS = true;
    static constexpr int64_t capacity = 32;
};
template <>
struct Row<float, 4> {
    Row<float, 2> low, high;
    explicit Row(const float* row) : low(row), high(row + 32) {}
    vec<float> operator[](const int32_t* index) const {
        // Each half looks at the five lowest bits; the sixth chooses between them.
        __mmask16 upper = _mm512_test_epi32_mask(_mm512_loadu_si512(index), _mm512_set1_epi32(32));
        return (vec<float>)_mm512_mask_mov_ps((__m512)low[index], upper, (__m512)high[index]);
    }
    static constexpr bool IN_REGISTERS = true;
    static constexpr int64_t capacity = 64;
};
#elif defined(__AVX2__)
template <>
struct Row<float, 1> {
    __m256 v;
    explicit Row(const float* row) : v(_mm256_loadu_ps(row)) {}
    vec<float> operator[](const int32_t* index) const {
        return (vec<float>)_mm256_permutevar8x32_ps(v, _mm256_loadu_si256((const __m256i*)index));
    }
    static constexpr bool IN_REGISTERS = true;
    static constexpr int64_t capacity = 8;
};
template <>
struct Row<float, 2> {
    Row<float, 1> low, high;
    explicit Row(const float* row) : low(row), high(row + 8) {}
    vec<float> operator[](const int32_t* index) const {
        // Bit 3 of the index, moved to the sign, chooses between the halves.
        __m256i upper = _mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)index), 28);
        return (vec<float>)_mm256_blendv_ps((__m256)low[index], (__m256)high[index], _mm256_castsi256_ps(upper));
    }
    static constexpr bool IN_REGISTERS = true;
    static constexpr int64_t capacity = 16;
};
#endif

}  // namespace ADAMSS_ISA
