// The exported functions: picks the instruction set once, keeps C++ exceptions inside.
#include "dispatch.h"

#include <cstring>
#include <new>
#include <string>

namespace baseline {
extern const adamss::Kernels kernels;
}
#ifdef ADAMSS_X86
namespace avx2 {
extern const adamss::Kernels kernels;
}
namespace avx512 {
extern const adamss::Kernels kernels;
}
#endif
#ifdef ADAMSS_AVX512BF16
namespace avx512bf16 {
extern const adamss::Kernels kernels;
}
#endif
#ifdef ADAMSS_AMX
namespace amx {
extern const adamss::Kernels kernels;
bool usable();
}
#endif

namespace adamss {

adamss_parallel_for parallel_for = nullptr;
static const Kernels* chosen = &baseline::kernels;

// The kernels that this machine can run, best first.
template <class F>
static void for_each_runnable(const F& f) {
#ifdef ADAMSS_X86
    __builtin_cpu_init();
#ifdef ADAMSS_AMX
    if (amx::usable()) f(&amx::kernels);
#endif
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef ADAMSS_AVX512BF16
    if (avx512 && __builtin_cpu_supports("avx512bf16")) f(&avx512bf16::kernels);
#endif
    if (avx512) f(&avx512::kernels);
    if (avx2) f(&avx2::kernels);
#endif
    f(&baseline::kernels);
}

template <class F>
static int32_t guarded(const F& f) {
    try {
        return f();
    } catch (const std::bad_alloc&) {
        return ADAMSS_NO_MEMORY;
    }
}

}  // namespace adamss

extern "C" {

int32_t adamss_cpu_init(adamss_parallel_for parallel_for, const char* isa) {
    adamss::parallel_for = parallel_for;
    const adamss::Kernels* found = nullptr;
    adamss::for_each_runnable([&](const adamss::Kernels* kernels) {
        if (!found && (!isa || !*isa || !std::strcmp(isa, kernels->isa))) found = kernels;
    });
    if (!found) return 1;
    adamss::chosen = found;
    return 0;
}

const char* adamss_cpu_isa() { return adamss::chosen->isa; }

const char* adamss_cpu_isas() {
    static const std::string names = [] {
        std::string all;
        adamss::for_each_runnable([&](const adamss::Kernels* kernels) {
            all += (all.empty() ? "" : " ");
            all += kernels->isa;
        });
        return all;
    }();
    return names.c_str();
}

int32_t adamss_cpu_forward(const adamss_forward_args* args) {
    return adamss::guarded([&] { return adamss::chosen->forward(*args); });
}

int32_t adamss_cpu_backward(const adamss_backward_args* args) {
    return adamss::guarded([&] { return adamss::chosen->backward(*args); });
}

int32_t adamss_cpu_grouped_forward(const adamss_forward_args* args, const adamss_groups* groups) {
    return adamss::guarded([&] { return adamss::chosen->grouped_forward(*args, *groups); });
}

int32_t adamss_cpu_grouped_backward(const adamss_backward_args* args, const adamss_groups* groups) {
    return adamss::guarded([&] { return adamss::chosen->grouped_backward(*args, *groups); });
}
}
