// What the operators (operators.cpp) hand to the launches (launch.cu, hopper.cu), without torch.
//
// Letters are those of docs/notation.md. x, y, dy, P and Q have the dtype that is named; B, C, S and the gradients of
// parameters have its accumulation dtype, written T: double for double, float otherwise. Pointers are device memory;
// strides count elements. Every function launches on `stream`, of the current device, and returns at once: 0, a
// cudaError_t, or ADAMSS_TOO_LARGE; `adamss_cuda_error` puts it in words. Nothing is allocated here: scratch is the
// caller's.
#pragma once

#include <cstdint>

enum adamss_cuda_dtype : int64_t {
    ADAMSS_CUDA_FLOAT32 = 0,
    ADAMSS_CUDA_FLOAT64 = 1,
    ADAMSS_CUDA_BFLOAT16 = 2,
    ADAMSS_CUDA_FLOAT16 = 3
};
enum { ADAMSS_TOO_LARGE = -1 };  // more than 2^31 - 1 blocks

// Which subspace owns each row, and which columns of S belong to it; masks may be null for "all".
struct adamss_cuda_layout {
    int64_t N, K;
    const int32_t* row_subspace;  // (N,)
    const int32_t* offsets;       // (K + 1,)
    const uint8_t* active;        // (K,)
    const uint8_t* trainable;     // (K,)
};

// Q = B A and q = B a, zero in the rows of pruned subspaces; Q = B where A is null, and then D = R.
struct adamss_cuda_input_projection_args {
    void* stream;
    int64_t dtype, A_dtype, RHO, R, D;
    const void* B;  // (RHO, R)
    const void* A;  // (R, D), of A_dtype: dtype or T
    int64_t stride_ar, stride_ad;
    const void* a;  // (R,) or null, of A_dtype
    int64_t stride_a;
    void* Q;  // (RHO, D)
    void* q;  // (RHO,), T, or null
    adamss_cuda_layout layout;
};

// y += S C^T in place; columns of pruned subspaces are left out.
struct adamss_cuda_delta_fwd_args {
    void* stream;
    int64_t dtype, M, RHO, r_max;
    void* y;  // (M, N)
    int64_t stride_ym;
    const void* S;  // (M, RHO)
    const void* C;  // (N, r_max)
    adamss_cuda_layout layout;
};

// How the backward pass divides dy, and so what scratch it needs.
struct adamss_cuda_plan {
    int64_t stretches, width;  // of rows of C: partial dS are (stretches, M, RHO) unless there is one stretch
    int64_t parts;             // partial dC are (parts, N, r_max)
};

// dS = dy C, zero where pruned, and dC = dy^T S at the places of C, zero where not active and trainable.
struct adamss_cuda_delta_bwd_args {
    void* stream;
    int64_t dtype, M, RHO, r_max;
    const void* dy;  // (M, N), any strides
    int64_t stride_dym, stride_dyn;
    const void* S;   // (M, RHO), for dC
    const void* C;   // (N, r_max)
    void* dS;        // (M, RHO), dtype, or null
    void* dS_parts;  // (stretches, M, RHO), T, or null where there is one stretch
    void* dC;        // (N, r_max), T, or null
    void* dC_parts;  // (parts, N, r_max), T
    adamss_cuda_plan plan;
    adamss_cuda_layout layout;
};

// Zeroes the rows of dB that belong to subspaces which are not both active and trainable.
struct adamss_cuda_mask_rows_args {
    void* stream;
    int64_t dtype, RHO, R;
    void* dB;  // (RHO, R), T
    adamss_cuda_layout layout;
};

// Forward, or with `dy` backward, on a GPU of compute capability 9.0, in float16 or bfloat16: the base product and the
// update in one. Rows of x, W and dy start at multiples of 16 bytes and are dense; N and D are multiples of 8.
struct adamss_cuda_fused_args {
    void* stream;
    int64_t dtype, A_dtype, M, D, RHO, RHO_PAD, R, r_max;  // RHO_PAD: 32 or 64, with room for a bias
    int64_t multiprocessors;
    const void* x;  // (M, D); in backward, where it was kept and P was not
    int64_t stride_xm;
    const void* W;  // (N, D)
    int64_t stride_wn;
    const void* bias;  // (N,) or null; not read in backward
    const void* A;     // (R, D), of A_dtype: dtype or float; null for Q = B
    int64_t stride_ar, stride_ad;
    const void* a;  // (R,) or null, of A_dtype
    int64_t stride_a;
    const void* B;  // (RHO, R), float
    const void* C;  // (N, r_max), float
    void* y;        // (M, N), in forward
    void* S;        // (M, RHO), float: in forward written or null, in backward read for dC
    const void* dy;  // (M, N), in backward
    int64_t stride_dym;
    const void* P;    // (M, R), or null
    void* dx;         // (M, D)
    void* dB;         // (RHO, R), float, or null
    void* dC;         // (N, r_max), float, or null
    void* workspace;  // of adamss_cuda_fused_workspace bytes, at a multiple of 256
    adamss_cuda_layout layout;
};

int32_t adamss_cuda_fused(const adamss_cuda_fused_args*);
int64_t adamss_cuda_fused_workspace(const adamss_cuda_fused_args*);
int32_t adamss_cuda_input_projection(const adamss_cuda_input_projection_args*);
int32_t adamss_cuda_delta_fwd(const adamss_cuda_delta_fwd_args*);
int32_t adamss_cuda_delta_bwd(const adamss_cuda_delta_bwd_args*);
int32_t adamss_cuda_mask_rows(const adamss_cuda_mask_rows_args*);

// A plan that gives each of `multiprocessors` something to do; it depends on sizes alone, so that sums keep their order.
adamss_cuda_plan adamss_cuda_delta_bwd_plan(int64_t dtype, int64_t M, int64_t N, int64_t RHO, int64_t multiprocessors);
const char* adamss_cuda_error(int32_t status);
