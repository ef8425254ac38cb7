// float16 as host C++, rounded to nearest even.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half v) {
    const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
    const float sign = v.bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * std::ldexp(float(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
}

inline __half __float2half_rn(float v) {
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    if (std::isnan(v)) return {0x7fff};
    const float size = std::fabs(v);
    if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    int exponent;
    std::frexp(size, &exponent);  // size = f 2^exponent with f in [1/2, 1)
    exponent = exponent > -13 ? exponent : -13;
    // In units of the last place of its binade; the default rounding mode is to nearest even.
    const uint32_t units = uint32_t(std::nearbyint(std::ldexp(size, 11 - exponent)));
    // A carry out of the fraction lands in the exponent, where it belongs.
    return {uint16_t(sign | (units < 1024 ? units : uint32_t((exponent + 13) << 10) + units))};
}
