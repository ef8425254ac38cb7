// The library's C interface: what `adamss_kernels/native` calls through ctypes.
//
// Letters are those of docs/notation.md. Strides count elements; the last dimension is contiguous unless a stride is
// given for it. Matrices of parameters and of sums (Q, q, C, S, dQ, dC) are in the accumulation dtype of x: double for
// double, float otherwise.
#pragma once

#include <cstdint>

extern "C" {

enum adamss_dtype : int64_t { ADAMSS_FLOAT32 = 0, ADAMSS_FLOAT64 = 1, ADAMSS_BFLOAT16 = 2 };

// Which subspace owns each row, and which columns of S belong to it; masks may be null for "all".
struct adamss_layout {
    int64_t N, K;
    const int32_t* row_subspace;  // (N,)
    const int32_t* offsets;       // (K + 1,)
    const uint8_t* active;        // (K,)
    const uint8_t* trainable;     // (K,)
};

// S = x Q^T + q, y = bias + S C^T: the update, written where the base GEMM then accumulates.
struct adamss_forward_args {
    int64_t dtype, M, D;
    const void* x;  // (M, D)
    int64_t stride_xm;
    const void* Q;     // (RHO, D) contiguous
    const void* q;     // (RHO,) or null
    const void* bias;  // (N,) or null, dtype of x
    const void* C;     // (N, r_max) contiguous
    int64_t r_max;
    void* S;  // (M, RHO) contiguous, or null where not wanted; columns of pruned subspaces are zero
    void* y;  // (M, N) contiguous, dtype of x
    adamss_layout layout;
};

// dS = dy C, dC = dy^T S at the places of C, dQ = dS^T x, dx = dS Q; outputs may be null where not wanted.
struct adamss_backward_args {
    int64_t dtype, M, D;
    const void* dy;  // (M, N), dtype of x
    int64_t stride_dym;
    const void* x;  // (M, D) for dQ
    int64_t stride_xm;
    const void* S;  // (M, RHO) contiguous, for dC
    int64_t D_out;
    const void* Q;  // (RHO, D_out) contiguous, for dx
    const void* C;  // (N, r_max) contiguous
    int64_t r_max;
    void* dx;   // (M, D_out) contiguous, dtype of x
    void* dQ;   // (RHO, D) contiguous; rows that are not both active and trainable are zero
    void* dq;   // (RHO,), sum of dS over tokens; likewise
    void* dC;   // (N, r_max) contiguous; likewise
    adamss_layout layout;
};

// torch's `torch_parallel_for`: threads are torch's, in number and in person. 0 is success.
typedef void (*adamss_task)(int64_t begin, int64_t end, void* context);
typedef int32_t (*adamss_parallel_for)(int64_t begin, int64_t end, int64_t grain, adamss_task task, void* context);

// Sets the thread pool and picks the instruction set: `isa` by name, or the best of this machine when null or empty.
// Returns 0, or 1 when this machine or this build lacks `isa`.
int32_t adamss_cpu_init(adamss_parallel_for parallel_for, const char* isa);
// The instruction set in use, and all those that this build has and this machine can run, best first.
const char* adamss_cpu_isa();
const char* adamss_cpu_isas();
// Both return 0, or 1 when memory for scratch space ran out.
int32_t adamss_cpu_forward(const adamss_forward_args*);
int32_t adamss_cpu_backward(const adamss_backward_args*);
}
