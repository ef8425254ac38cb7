// Compiled once per instruction set, with ADAMSS_ISA its name: picks the kernel for a dtype.
#include "backward.h"
#include "few.h"
#include "grouped.h"

namespace ADAMSS_ISA {

#define ADAMSS_STRING_(x) #x
#define ADAMSS_STRING(x) ADAMSS_STRING_(x)

template <class T, class X>
adamss_status forward_of(const adamss_forward_args& a) {
    return are_few(a) ? forward_few<T, X>(a) : forward<T, X>(a);
}

template <class T, class X>
adamss_status backward_of(const adamss_backward_args& a) {
    return are_few(a) ? backward_few<T, X>(a) : backward<T, X>(a);
}

static adamss_status forward_any(const adamss_forward_args& a) {
    if (a.dtype == ADAMSS_FLOAT32) return forward_of<float, float>(a);
    if (a.dtype == ADAMSS_FLOAT64) return forward_of<double, double>(a);
    return forward_of<float, bfloat16>(a);
}

static adamss_status backward_any(const adamss_backward_args& a) {
    if (a.dtype == ADAMSS_FLOAT32) return backward_of<float, float>(a);
    if (a.dtype == ADAMSS_FLOAT64) return backward_of<double, double>(a);
    return backward_of<float, bfloat16>(a);
}

static adamss_status grouped_forward_any(const adamss_forward_args& a, const adamss_groups& groups) {
    if (a.dtype == ADAMSS_FLOAT32) return grouped_forward<float, float>(a, groups);
    if (a.dtype == ADAMSS_FLOAT64) return grouped_forward<double, double>(a, groups);
    return grouped_forward<float, bfloat16>(a, groups);
}

static adamss_status grouped_backward_any(const adamss_backward_args& a, const adamss_groups& groups) {
    if (a.dtype == ADAMSS_FLOAT32) return grouped_backward<float, float>(a, groups);
    if (a.dtype == ADAMSS_FLOAT64) return grouped_backward<double, double>(a, groups);
    return grouped_backward<float, bfloat16>(a, groups);
}

extern const adamss::Kernels kernels;
const adamss::Kernels kernels = {ADAMSS_STRING(ADAMSS_ISA), forward_any, backward_any, grouped_forward_any,
                                 grouped_backward_any};

}  // namespace ADAMSS_ISA
