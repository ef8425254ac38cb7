// Defines the launches as operators of torch, and says what the library is for.
#include "../torch/register.h"
#include "operators.h"

#ifndef ADAMSS_CUDA_ARCHITECTURES
#define ADAMSS_CUDA_ARCHITECTURES ""
#endif

namespace adamss::torch {
Shim shim;
}

extern "C" {

// Once per namespace: torch keeps what is defined. Null, or the name of what torch lacks.
const char* adamss_cuda_register(const char* name_space, const char* key, const char* libtorch,
                                 const char* libtorch_cuda) {
    using namespace adamss::torch;
    if (const char* const missing = find_functions(libtorch)) return missing;
    if (const char* const missing = find_cuda_functions(libtorch_cuda)) return missing;
    if (const char* const missing = define(name_space, {INPUT_PROJECTION, DELTA_FWD, DELTA_BWD, MASK_ROWS,
                                                        FUSED_FORWARD, FUSED_BACKWARD}))
        return missing;
    return implement(name_space, key,
                     {{"cuda_input_projection", input_projection},
                      {"cuda_delta_fwd", delta_fwd},
                      {"cuda_delta_bwd", delta_bwd},
                      {"cuda_mask_rows", mask_rows},
                      {"cuda_fused_forward", fused_forward},
                      {"cuda_fused_backward", fused_backward}});
}

// "80 90 100 120+PTX": what the library was compiled for.
const char* adamss_cuda_architectures() { return ADAMSS_CUDA_ARCHITECTURES; }
}
