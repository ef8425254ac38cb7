// What the kernels of each instruction set share with the dispatcher.
#pragma once

#include "interface.h"

namespace adamss {

// Work runs on torch's threads; set by adamss_cpu_init.
extern adamss_parallel_for parallel_for;

// One instruction set's kernels.
struct Kernels {
    const char* isa;
    adamss_status (*forward)(const adamss_forward_args&);
    adamss_status (*backward)(const adamss_backward_args&);
    adamss_status (*grouped_forward)(const adamss_forward_args&, const adamss_groups&);
    adamss_status (*grouped_backward)(const adamss_backward_args&, const adamss_groups&);
};

}  // namespace adamss
