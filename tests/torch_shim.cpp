// Compiles where csrc/torch/shim.h declares torch's functions as torch's own headers do, as of the version that it
// names: -DTORCH_TARGET_VERSION hides what came later. With torch first, the opaque types of both are the same.
#ifndef TORCH_TARGET_VERSION
#error "expected TORCH_TARGET_VERSION, the version that csrc/torch/shim.h names"
#endif
#define USE_CUDA  // shows what a torch with CUDA has
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/c/shim.h>

#include <type_traits>

#include "interface.h"
#include "shim.h"

namespace {
using namespace adamss::torch;

static_assert(ABI_VERSION == TORCH_TARGET_VERSION, "ABI_VERSION");
static_assert(std::is_same_v<Value, StableIValue>, "Value");
static_assert(std::is_same_v<adamss_parallel_for, decltype(&::torch_parallel_for)>, "adamss_parallel_for");

#define F(name, arguments) static_assert(std::is_same_v<decltype(Shim::name), decltype(&::name)>, #name);
ADAMSS_TORCH_FUNCTIONS(F)
ADAMSS_TORCH_CUDA_FUNCTIONS(F)
#undef F
#define F(type, name) static_assert(std::is_same_v<type (*)(), decltype(&::name)>, #name);
ADAMSS_TORCH_CONSTANTS(F)
#undef F
}  // namespace
