// Gives the operators of backend `cpu` their kernels.
#include "../torch/register.h"
#include "operators.h"

namespace adamss::torch {
Shim shim;
}

extern "C" const char* adamss_cpu_register(const char* libtorch) {
    using namespace adamss::torch;
    if (const char* const missing = find_functions(libtorch)) return missing;
    return implement("adamss_kernels", "CPU",
                     {{"cpu_forward", forward},
                      {"cpu_backward", backward},
                      {"cpu_add_update", add_update},
                      {"cpu_update_backward", update_backward},
                      {"cpu_grouped_forward", grouped_forward},
                      {"cpu_grouped_backward", grouped_backward}});
}
