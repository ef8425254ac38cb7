// The library's C interface. `adamss_kernels/compiled` calls it through ctypes, but for forward and backward, which
// operators.cpp makes operators of torch.
//
// Letters are those of docs/notation.md. Rows are contiguous; a stride, in elements, is given where rows need not
// follow one another. x, bias, P, y and their gradients have the dtype that is named; everything else (A, a, B, C, S
// and their gradients) has its accumulation dtype: double for double, float otherwise. A may also be bfloat16 where
// that is float.
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

// S = x Q^T + q with Q = B A and q = B a (or P B^T), y = bias + S C^T: the update, written where the base GEMM then
// accumulates; or y whole.
struct adamss_forward_args {
    int64_t dtype, M, D, R;
    const void* x;  // (M, D)
    int64_t stride_xm;
    const void* P;  // (M, R), or null
    int64_t stride_pm;
    const void* W;  // (N, D), dtype of x
    int64_t stride_wn;
    const void* A;     // (R, D); null for the identity, and then R = D
    bool A_is_bfloat16;
    const void* a;     // (R,) or null
    const void* B;     // (RHO, R)
    const void* bias;  // (N,) or null, dtype of x
    const void* C;     // (N, r_max)
    int64_t r_max;
    void* S;  // (M, RHO), or null where not wanted; columns of pruned subspaces are zero
    void* y;  // (M, N), dtype of x
    adamss_layout layout;
    const int64_t* tokens;  // (M,), ascending: the rows of x, P, S and y that are meant; null for the first M
    bool adds_to_y;         // y += S C^T instead: then W and bias are null
};

// dS = dy C, dC = dy^T S at the places of C, dB = (dS^T x) A^T + (sum_m dS) a^T or dS^T P, dx = dS Q, where the base
// GEMM then accumulates; or dx whole; or instead of dx the weight W' = W + C Q, for dx = dy W'.
// Outputs may be null where not wanted; those of parameters are zero where a subspace is not active and trainable.
struct adamss_backward_args {
    int64_t dtype, M, D, R;
    const void* dy;  // (M, N), dtype of x
    int64_t stride_dym;
    const void* x;  // (M, D) for dB, or null
    int64_t stride_xm;
    const void* P;  // (M, R) instead of x, or null; without A it is x
    int64_t stride_pm;
    const void* S;  // (M, RHO) for dC
    const void* W;  // (N, D), dtype of x
    int64_t stride_wn;
    const void* A;  // (R, D); null for the identity, and then R = D and x comes as P
    bool A_is_bfloat16;
    const void* a;  // (R,) or null
    const void* B;  // (RHO, R)
    const void* C;  // (N, r_max)
    int64_t r_max;
    void* dx;  // (M, D), dtype of x
    void* W_updated;  // (N, D), dtype of x: not for bfloat16, whose rounding would swallow the update
    void* dB;  // (RHO, R)
    void* dC;  // (N, r_max)
    adamss_layout layout;
    const int64_t* tokens;  // (M,), ascending: the rows of dy, x, P, S and dx that are meant; null for the first M
};

// Tokens by adapter: those of group g are tokens[starts[g]] to tokens[starts[g + 1]], ascending; those from
// starts[count] on take none. With groups, B is (slots, RHO, R), C (slots, N, r_max) and a mask (slots, K), of which
// group g takes slots[g]; dB and dC have one for each group.
struct adamss_groups {
    int64_t count;
    const int64_t* tokens;  // (M,)
    const int64_t* slots;   // (count,)
    const int64_t* starts;  // (count + 1,)
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
// What both return: whether y or dx still lacks x W^T or dy W (a skinny product's pass is the library's, a large
// product mostly another's), or that memory for scratch space ran out.
enum adamss_status : int32_t { ADAMSS_UPDATE = 0, ADAMSS_WHOLE = 1, ADAMSS_NO_MEMORY = 2 };
int32_t adamss_cpu_forward(const adamss_forward_args*);
int32_t adamss_cpu_backward(const adamss_backward_args*);
// The same with another adapter for each group of tokens; they always leave the base product to the caller.
int32_t adamss_cpu_grouped_forward(const adamss_forward_args*, const adamss_groups*);
int32_t adamss_cpu_grouped_backward(const adamss_backward_args*, const adamss_groups*);

// Gives torch's operators of backend `cpu` (`ops.py`) their kernels. `libtorch` is the path of the loaded library.
// Returns null, or the name of what that torch lacks.
const char* adamss_cpu_register(const char* libtorch);
}
