// Finds torch's functions in the process that loads a library, and gives torch's operators their kernels.
//
// All return null, or the name of what torch lacks.
#pragma once

#include <dlfcn.h>

#include <initializer_list>

#include "shim.h"

namespace adamss::torch {

#define ADAMSS_FIND_FUNCTION(name, arguments)                               \
    shim.name = reinterpret_cast<decltype(shim.name)>(dlsym(torch, #name)); \
    if (!shim.name) return #name;

// `libtorch` is the path of a library that the process has loaded.
inline const char* find_functions(const char* libtorch) {
    void* const torch = dlopen(libtorch, RTLD_NOW | RTLD_NOLOAD);
    if (!torch) return libtorch;
    ADAMSS_TORCH_FUNCTIONS(ADAMSS_FIND_FUNCTION)
#define F(type, name)                                                          \
    const auto get_##name = reinterpret_cast<type (*)()>(dlsym(torch, #name)); \
    if (!get_##name) return #name;                                             \
    shim.name = get_##name();
    ADAMSS_TORCH_CONSTANTS(F)
#undef F
    return nullptr;
}

inline const char* find_cuda_functions(const char* libtorch_cuda) {
    void* const torch = dlopen(libtorch_cuda, RTLD_NOW | RTLD_NOLOAD);
    if (!torch) return libtorch_cuda;
    ADAMSS_TORCH_CUDA_FUNCTIONS(ADAMSS_FIND_FUNCTION)
    return nullptr;
}

#undef ADAMSS_FIND_FUNCTION

struct Operator {
    const char* name;
    Kernel kernel;
};

// Libraries are kept for as long as the process lives: deleting one would take its operators away.
inline const char* define(const char* name_space, std::initializer_list<const char*> schemas) {
    LibraryHandle library;
    int32_t failed = shim.aoti_torch_library_init_fragment(name_space, __FILE__, __LINE__, &library);
    for (const char* schema : schemas) failed = failed || shim.aoti_torch_library_def(library, schema);
    return failed ? "aoti_torch_library_def" : nullptr;
}

inline const char* implement(const char* name_space, const char* key, std::initializer_list<Operator> operators) {
    LibraryHandle library;
    int32_t failed = shim.aoti_torch_library_init_impl(name_space, key, __FILE__, __LINE__, &library);
    for (const Operator& o : operators)
        failed = failed || shim.torch_library_impl(library, o.name, o.kernel, ABI_VERSION);
    return failed ? "torch_library_impl" : nullptr;
}

}  // namespace adamss::torch
