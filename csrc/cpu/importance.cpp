// ASA's elementwise averages over many small matrices, which would each cost PyTorch a call.
#include <cmath>
#include <cstdint>

#include "interface.h"

namespace {

template <class T>
void measure(int64_t count, const void* const* w, const void* const* g, const int64_t* sizes, T* out, double* sum) {
    double total = 0;
    for (int64_t i = 0; i < count; ++i, out += sizes[i - 1]) {
        const T *const w_i = static_cast<const T*>(w[i]), *const g_i = static_cast<const T*>(g[i]);
        for (int64_t e = 0; e < sizes[i]; ++e) out[e] = g_i ? std::abs(w_i[e] * g_i[e]) : T(0);
        // Infinity and NaN survive a sum of absolute values; eight partial sums let it run in registers.
        T partial[8] = {};
        int64_t e = 0;
        for (; e + 8 <= sizes[i]; e += 8)
            for (int lane = 0; lane < 8; ++lane) partial[lane] += out[e + lane];
        for (; e < sizes[i]; ++e) partial[0] += out[e];
        for (T p : partial) total += p;
    }
    *sum = total;
}

// As torch.lerp, to the last bit but for contraction.
template <class T>
T lerp(T start, T end, T weight) {
    return weight < T(0.5) ? start + weight * (end - start) : end - (end - start) * (1 - weight);
}

template <class T>
void accumulate(int64_t size, const T* measured, T* importance, T* uncertainty, T weight1, T weight2) {
    for (int64_t e = 0; e < size; ++e) {
        uncertainty[e] = lerp(uncertainty[e], std::abs(measured[e] - importance[e]), weight2);
        importance[e] = lerp(importance[e], measured[e], weight1);
    }
}

}  // namespace

extern "C" {

void adamss_cpu_measure(int64_t dtype, int64_t count, const void* const* w, const void* const* g, const int64_t* sizes,
                        void* measured, double* sum) {
    if (dtype == ADAMSS_FLOAT64) measure(count, w, g, sizes, static_cast<double*>(measured), sum);
    else measure(count, w, g, sizes, static_cast<float*>(measured), sum);
}

void adamss_cpu_accumulate(int64_t dtype, int64_t size, const void* measured, void* importance, void* uncertainty,
                           double weight1, double weight2) {
    if (dtype == ADAMSS_FLOAT64)
        accumulate(size, static_cast<const double*>(measured), static_cast<double*>(importance),
                   static_cast<double*>(uncertainty), weight1, weight2);
    else
        accumulate(size, static_cast<const float*>(measured), static_cast<float*>(importance),
                   static_cast<float*>(uncertainty), float(weight1), float(weight2));
}
}
