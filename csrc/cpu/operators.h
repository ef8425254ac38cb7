// The operators of backend `cpu`, as torch's dispatcher calls them: arguments on `stack` on entry, results on return.
#pragma once

#include "../torch/shim.h"

namespace adamss::torch {

void forward(Value* stack, uint64_t inputs, uint64_t outputs);
void backward(Value* stack, uint64_t inputs, uint64_t outputs);
void add_update(Value* stack, uint64_t inputs, uint64_t outputs);
void update_backward(Value* stack, uint64_t inputs, uint64_t outputs);
void grouped_forward(Value* stack, uint64_t inputs, uint64_t outputs);
void grouped_backward(Value* stack, uint64_t inputs, uint64_t outputs);

}  // namespace adamss::torch
