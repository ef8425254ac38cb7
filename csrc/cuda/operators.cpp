// The launches of backend `cuda` as torch's dispatcher calls them: takes tensors apart for the kernels, and has torch
// make results and scratch.
#include "operators.h"

#include <cuda_runtime.h>

#include "../torch/operands.h"
#include "interface.h"

namespace adamss::torch {
namespace {

// torch's current device, until it goes.
class Guard {
    GuardHandle handle_;

  public:
    explicit Guard(int32_t device_index) { check(shim.aoti_torch_create_cuda_guard(device_index, &handle_), "guard"); }
    Guard(const Guard&) = delete;
    ~Guard() { shim.aoti_torch_delete_cuda_guard(handle_); }
};

// Where a kernel runs: the device of `t`, the current one while this lives, and its current stream.
class Place {
    const char* const kernel_;
    const Device device_;
    const Guard guard_;

    void fail(const std::string& shape, const char* why) const {
        throw std::runtime_error(kernel_ + (" failed on " + name()) + shape + ": " + why);
    }
    void check_cuda(cudaError_t status) const {
        if (status) fail("", cudaGetErrorString(status));
    }
    std::string name() const { return "cuda:" + std::to_string(device_.index); }

  public:
    Place(const char* kernel, const Tensor& t) : kernel_(kernel), device_(t.device()), guard_(device_.index) {
        // CUDA's runtime in this library is another than torch's.
        check_cuda(cudaSetDevice(device_.index));
    }

    void* stream() const {
        void* stream;
        torch::check(shim.aoti_torch_get_current_cuda_stream(device_.index, &stream), "current_cuda_stream");
        return stream;
    }
    int64_t multiprocessors() const {
        int count;
        check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_.index));
        return count;
    }

    // A new matrix, or with one size a vector.
    Tensor empty(int32_t dtype, int64_t rows, int64_t columns = -1) const {
        Tensor made = try_empty(device_, dtype, rows, columns);
        if (made) return made;
        size_t free, total;
        check_cuda(cudaMemGetInfo(&free, &total));
        // `cuda_library.py` knows the first words.
        const std::string shape = std::to_string(rows) + (columns < 0 ? "" : " x " + std::to_string(columns));
        throw std::runtime_error("CUDA out of memory: " + (kernel_ + (" needs " + shape)) + " elements on " + name() +
                                 ", where " + std::to_string(free) + " bytes are free beside what torch holds");
    }
    Tensor none(int32_t dtype) const { return empty(dtype, 0); }

    // Throws what a launch has failed with.
    void check(int32_t status, const adamss_cuda_layout& layout,
               std::initializer_list<std::pair<const char*, int64_t>> sizes) const {
        if (!status) return;
        std::string shape = " for ";
        for (const auto& [name, size] : sizes) shape += std::string(name) + "=" + std::to_string(size) + ", ";
        fail(shape + "N=" + std::to_string(layout.N) + ", K=" + std::to_string(layout.K), adamss_cuda_error(status));
    }
};

int64_t number_of(int32_t dtype) {
    if (dtype == shim.aoti_torch_dtype_float32) return ADAMSS_CUDA_FLOAT32;
    if (dtype == shim.aoti_torch_dtype_float64) return ADAMSS_CUDA_FLOAT64;
    if (dtype == shim.aoti_torch_dtype_bfloat16) return ADAMSS_CUDA_BFLOAT16;
    if (dtype == shim.aoti_torch_dtype_float16) return ADAMSS_CUDA_FLOAT16;
    throw std::runtime_error("adamss_kernels: expected float32, float64, bfloat16 or float16");
}

// T: the dtype of B, C, S and their gradients in kernels.
int32_t accumulation_of(int32_t dtype) {
    return dtype == shim.aoti_torch_dtype_float64 ? dtype : shim.aoti_torch_dtype_float32;
}

// A and a as they are where that is of `dtype` or T, else as T; any strides, a's dtype is A's.
struct Basis {
    Tensor A, a;
    int64_t dtype, stride_ar = 0, stride_ad = 0, stride_a = 0;

    Basis(Tensor basis, Tensor basis_bias, int32_t of) : A(std::move(basis)), a(std::move(basis_bias)) {
        const int32_t given = A ? A.dtype() : of;
        if (A && given != of && given != accumulation_of(of)) A = copied(A, accumulation_of(of));
        if (a && a.dtype() != A.dtype()) a = copied(a, A.dtype());
        dtype = number_of(A ? A.dtype() : of);
        if (A) stride_ar = A.stride(0), stride_ad = A.stride(1);
        if (a) stride_a = a.stride(0);
    }
};

// Rows, offsets and masks, as operators take them one after the other.
struct Rows {
    Tensor row_subspace, offsets, active, trainable;

    explicit Rows(Inputs& in, bool has_trainable = true)
        : row_subspace(in.tensor()), offsets(in.tensor()), active(dense(in.optional(), shim.aoti_torch_dtype_bool)) {
        if (has_trainable) trainable = dense(in.optional(), shim.aoti_torch_dtype_bool);
    }
    adamss_cuda_layout layout() const {
        return layout_of<adamss_cuda_layout>(row_subspace, offsets, active, trainable);
    }
};

// RHO_PAD: a multiple of 32, with room for the bias.
int64_t padded(int64_t RHO, bool has_bias) { return (RHO + has_bias + 31) / 32 * 32; }

// What both directions share, in the order of interface.h.
adamss_cuda_fused_args fused_args(const Place& place, const Tensor& like, const Tensor& x, const Tensor& weight,
                                  const Tensor& bias, const Tensor& B, const Tensor& C, const Basis& basis,
                                  const Rows& rows) {
    adamss_cuda_fused_args args = {};
    args.stream = place.stream();
    args.dtype = number_of(like.dtype()), args.A_dtype = basis.dtype;
    args.M = like.size(0), args.D = weight.size(1);
    args.RHO = B.size(0), args.RHO_PAD = padded(B.size(0), bool(bias)), args.R = B.size(1), args.r_max = C.size(1);
    args.multiprocessors = place.multiprocessors();
    args.x = x.data(), args.stride_xm = x ? x.stride(0) : 0;
    args.W = weight.data(), args.stride_wn = weight.stride(0);
    args.bias = bias.data();
    args.A = basis.A.data(), args.stride_ar = basis.stride_ar, args.stride_ad = basis.stride_ad;
    args.a = basis.a.data(), args.stride_a = basis.stride_a;
    args.B = B.data(), args.C = C.data();
    args.layout = rows.layout();
    return args;
}

void run_fused(const Place& place, adamss_cuda_fused_args args) {
    const Tensor workspace = place.empty(shim.aoti_torch_dtype_uint8, adamss_cuda_fused_workspace(&args));
    args.workspace = workspace.data();
    place.check(adamss_cuda_fused(&args), args.layout,
                {{"M", args.M}, {"D", args.D}, {"RHO", args.RHO}, {"R", args.R}, {"r_max", args.r_max}});
}

}  // namespace

void input_projection(Value* stack, uint64_t, uint64_t) {
    Inputs in(stack);
    const int32_t dtype = in.tensor().dtype(), T = accumulation_of(dtype);
    const Tensor B = dense(in.tensor(), T);
    Tensor A = in.optional(), a = in.optional();
    const Basis basis(std::move(A), std::move(a), dtype);
    const Tensor offsets = in.tensor(), active = dense(in.optional(), shim.aoti_torch_dtype_bool);

    const Place place("input_projection", B);
    const int64_t D = basis.A ? basis.A.size(1) : B.size(1);
    Tensor Q = place.empty(dtype, B.size(0), D), q = basis.a ? place.empty(T, B.size(0)) : place.none(T);
    adamss_cuda_input_projection_args args = {};
    args.stream = place.stream();
    args.dtype = number_of(dtype), args.A_dtype = basis.dtype;
    args.RHO = B.size(0), args.R = B.size(1), args.D = D;
    args.B = B.data();
    args.A = basis.A.data(), args.stride_ar = basis.stride_ar, args.stride_ad = basis.stride_ad;
    args.a = basis.a.data(), args.stride_a = basis.stride_a;
    args.Q = Q.data(), args.q = basis.a ? q.data() : nullptr;
    args.layout.K = offsets.size(0) - 1;
    args.layout.offsets = static_cast<const int32_t*>(offsets.data());
    args.layout.active = static_cast<const uint8_t*>(active.data());
    place.check(adamss_cuda_input_projection(&args), args.layout, {{"RHO", args.RHO}, {"R", args.R}, {"D", D}});
    set_outputs(stack, {&Q, &q});
}

void delta_fwd(Value* stack, uint64_t, uint64_t) {
    Inputs in(stack);
    const Tensor y = in.tensor(), S = in.tensor(), C = dense(in.tensor(), S.dtype());
    const Rows rows(in, false);

    const Place place("delta_fwd", y);
    const adamss_cuda_layout layout = rows.layout();
    const int64_t M = y.size(0), RHO = S.size(1), r_max = C.size(1);
    const adamss_cuda_delta_fwd_args args = {
        place.stream(), number_of(y.dtype()), M, RHO, r_max, y.data(), y.stride(0), S.data(), C.data(), layout};
    place.check(adamss_cuda_delta_fwd(&args), layout, {{"M", M}, {"RHO", RHO}, {"r_max", r_max}});
}

void delta_bwd(Value* stack, uint64_t, uint64_t) {
    Inputs in(stack);
    const Tensor dy = in.tensor(), S = in.optional();
    Tensor C = in.tensor();
    const Rows rows(in);
    const int64_t RHO = in.integer();
    const bool need_dS = in.boolean(), need_dC = bool(S);

    const Place place("delta_bwd", dy);
    const adamss_cuda_layout layout = rows.layout();
    const int32_t dtype = dy.dtype(), T = accumulation_of(dtype), dtype_C = C.dtype();
    C = dense(std::move(C), T);
    const int64_t M = dy.size(0), N = dy.size(1), r_max = C.size(1);
    const adamss_cuda_plan plan = adamss_cuda_delta_bwd_plan(number_of(dtype), M, N, RHO, place.multiprocessors());
    const bool has_parts = need_dS && plan.stretches > 1;
    Tensor dS = need_dS ? place.empty(dtype, M, RHO) : place.none(dtype);
    Tensor dC = need_dC ? place.empty(T, N, r_max) : place.none(T);
    const Tensor dS_parts = has_parts ? place.empty(T, plan.stretches * M, RHO) : Tensor();
    const Tensor dC_parts = need_dC ? place.empty(T, plan.parts * N, r_max) : Tensor();
    const adamss_cuda_delta_bwd_args args = {
        place.stream(), number_of(dtype), M, RHO, r_max, dy.data(), dy.stride(0), dy.stride(1), S.data(), C.data(),
        need_dS ? dS.data() : nullptr, dS_parts.data(), need_dC ? dC.data() : nullptr, dC_parts.data(), plan, layout};
    place.check(adamss_cuda_delta_bwd(&args), layout, {{"M", M}, {"RHO", RHO}, {"r_max", r_max}});
    if (dtype_C != T) dC = copied(dC, dtype_C);
    set_outputs(stack, {&dS, &dC});
}

void mask_rows(Value* stack, uint64_t, uint64_t) {
    Inputs in(stack);
    const Tensor dB = in.tensor();
    const Rows rows(in);

    const Place place("mask_rows", dB);
    const adamss_cuda_layout layout = rows.layout();
    const int64_t RHO = dB.size(0), R = dB.size(1);
    const adamss_cuda_mask_rows_args args = {place.stream(), number_of(dB.dtype()), RHO, R, dB.data(), layout};
    place.check(adamss_cuda_mask_rows(&args), layout, {{"RHO", RHO}, {"R", R}});
}

void fused_forward(Value* stack, uint64_t, uint64_t) {
    Inputs in(stack);
    const Tensor x = in.tensor(), weight = in.tensor(), bias = dense(in.optional(), x.dtype());
    const int32_t T = shim.aoti_torch_dtype_float32;
    const Tensor B = dense(in.tensor(), T), C = dense(in.tensor(), T);
    Tensor A = in.optional(), a = in.optional();
    const Basis basis(std::move(A), std::move(a), x.dtype());
    const Rows rows(in, false);
    const bool keep_S = in.boolean();

    const Place place("fused_forward", x);
    adamss_cuda_fused_args args = fused_args(place, x, x, weight, bias, B, C, basis, rows);
    Tensor y = place.empty(x.dtype(), args.M, args.layout.N);
    Tensor S = keep_S ? place.empty(T, args.M, args.RHO) : place.none(T);
    args.y = y.data(), args.S = keep_S ? S.data() : nullptr;
    run_fused(place, args);
    set_outputs(stack, {&y, &S});
}

void fused_backward(Value* stack, uint64_t, uint64_t) {
    Inputs in(stack);
    const Tensor dy = in.tensor(), x = in.optional();
    Tensor S = in.optional(), P = in.optional();
    const Tensor weight = in.tensor();
    Tensor B = in.tensor(), C = in.tensor(), A = in.optional(), a = in.optional();
    const Basis basis(std::move(A), std::move(a), dy.dtype());
    const Rows rows(in);
    const bool need_dB = in.boolean(), need_dC = in.boolean();

    const Place place("fused_backward", dy);
    const int32_t T = shim.aoti_torch_dtype_float32, dtype_B = B.dtype(), dtype_C = C.dtype();
    B = dense(std::move(B), T), C = dense(std::move(C), T);
    S = need_dC ? dense(std::move(S), T) : Tensor();
    P = need_dB ? dense(std::move(P), dy.dtype()) : Tensor();
    adamss_cuda_fused_args args = fused_args(place, dy, x, weight, Tensor(), B, C, basis, rows);
    Tensor dx = place.empty(dy.dtype(), args.M, args.D);
    Tensor dB = need_dB ? place.empty(T, args.RHO, args.R) : place.none(T);
    Tensor dC = need_dC ? place.empty(T, args.layout.N, args.r_max) : place.none(T);
    args.dy = dy.data(), args.stride_dym = dy.stride(0);
    args.S = S.data(), args.P = P.data(), args.dx = dx.data();
    args.dB = need_dB ? dB.data() : nullptr, args.dC = need_dC ? dC.data() : nullptr;
    run_fused(place, args);
    if (dtype_B != T) dB = copied(dB, dtype_B);
    if (dtype_C != T) dC = copied(dC, dtype_C);
    set_outputs(stack, {&dx, &dB, &dC});
}

}  // namespace adamss::torch
