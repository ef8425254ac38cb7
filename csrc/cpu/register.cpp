// Finds torch's functions in the process that loads this library, and gives torch's operators their kernels.
#include <dlfcn.h>

#include "interface.h"
#include "operators.h"
#include "torch_shim.h"

namespace adamss::torch {
Shim shim;
}

extern "C" const char* adamss_cpu_register(const char* libtorch) {
    using namespace adamss::torch;
    void* const torch = dlopen(libtorch, RTLD_NOW | RTLD_NOLOAD);
    if (!torch) return libtorch;
#define F(name, arguments)                                                     \
    shim.name = reinterpret_cast<decltype(shim.name)>(dlsym(torch, #name)); \
    if (!shim.name) return #name;
    ADAMSS_TORCH_FUNCTIONS(F)
#undef F
#define F(type, name)                                                  \
    const auto get_##name = reinterpret_cast<type (*)()>(dlsym(torch, #name)); \
    if (!get_##name) return #name;                                     \
    shim.name = get_##name();
    ADAMSS_TORCH_CONSTANTS(F)
#undef F
    // Kept for as long as the process lives: deleting it would take the operators away.
    LibraryHandle library;
    const int32_t failed = shim.aoti_torch_library_init_impl("adamss_kernels", "CPU", __FILE__, __LINE__, &library) ||
                           shim.torch_library_impl(library, "cpu_forward", forward, ABI_VERSION) ||
                           shim.torch_library_impl(library, "cpu_backward", backward, ABI_VERSION) ||
                           shim.torch_library_impl(library, "cpu_add_update", add_update, ABI_VERSION) ||
                           shim.torch_library_impl(library, "cpu_update_backward", update_backward, ABI_VERSION) ||
                           shim.torch_library_impl(library, "cpu_grouped_forward", grouped_forward, ABI_VERSION) ||
                           shim.torch_library_impl(library, "cpu_grouped_backward", grouped_backward, ABI_VERSION);
    return failed ? "torch_library_impl" : nullptr;
}
