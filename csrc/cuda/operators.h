// The launches of backend `cuda` as torch's dispatcher calls them: arguments on `stack` on entry, results on return.
#pragma once

#include "../torch/shim.h"

namespace adamss::torch {

// Q = B A in the dtype of `like` and q = B a, zero in the rows of pruned subspaces; Q = B without a basis.
constexpr char INPUT_PROJECTION[] =
    "cuda_input_projection(Tensor like, Tensor B, Tensor? basis, Tensor? basis_bias, Tensor offsets, Tensor? active) "
    "-> (Tensor Q, Tensor q)";
void input_projection(Value* stack, uint64_t inputs, uint64_t outputs);

// y += S C^T. Rows of y are dense; S is contiguous, of the accumulation dtype.
constexpr char DELTA_FWD[] =
    "cuda_delta_fwd(Tensor(a!) y, Tensor S, Tensor C, Tensor row_subspace, Tensor offsets, Tensor? active) -> ()";
void delta_fwd(Value* stack, uint64_t inputs, uint64_t outputs);

// dS = dy C in the dtype of dy, and dC = dy^T S in that of C where S is given; empty where not needed.
constexpr char DELTA_BWD[] =
    "cuda_delta_bwd(Tensor dy, Tensor? S, Tensor C, Tensor row_subspace, Tensor offsets, Tensor? active, "
    "Tensor? trainable, int RHO, bool need_dS) -> (Tensor dS, Tensor dC)";
void delta_bwd(Value* stack, uint64_t inputs, uint64_t outputs);

// Zeroes the rows of dB, contiguous and of its accumulation dtype, that do not learn.
constexpr char MASK_ROWS[] =
    "cuda_mask_rows(Tensor(a!) dB, Tensor row_subspace, Tensor offsets, Tensor? active, Tensor? trainable) -> ()";
void mask_rows(Value* stack, uint64_t inputs, uint64_t outputs);

// Both directions on Hopper, base product included, from operands that `hopper.takes`. S is empty where not kept,
// gradients where not needed.
constexpr char FUSED_FORWARD[] =
    "cuda_fused_forward(Tensor x, Tensor weight, Tensor? bias, Tensor B, Tensor C, Tensor? basis, Tensor? basis_bias, "
    "Tensor row_subspace, Tensor offsets, Tensor? active, bool keep_S) -> (Tensor y, Tensor S)";
void fused_forward(Value* stack, uint64_t inputs, uint64_t outputs);
constexpr char FUSED_BACKWARD[] =
    "cuda_fused_backward(Tensor dy, Tensor? x, Tensor? S, Tensor? P, Tensor weight, Tensor B, Tensor C, Tensor? basis, "
    "Tensor? basis_bias, Tensor row_subspace, Tensor offsets, Tensor? active, Tensor? trainable, bool need_dB, "
    "bool need_dC) -> (Tensor dx, Tensor dB, Tensor dC)";
void fused_backward(Value* stack, uint64_t inputs, uint64_t outputs);

}  // namespace adamss::torch
