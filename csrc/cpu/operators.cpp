// The operators of backend `cpu` as torch's dispatcher calls them: takes tensors apart for the kernels, and has torch
// add the base product where they leave it out.
//
// In C++ because a Python function around them costs as much as a small layer's whole update.
#include <new>

#include "../torch/operands.h"
#include "interface.h"
#include "operators.h"
#include "scratch.h"

namespace adamss::torch {
namespace {

bool is_bfloat16(const Tensor& t) { return t && t.dtype() == shim.aoti_torch_dtype_bfloat16; }

// The kernels take a basis of bfloat16 as it is, where they compute in float.
Tensor dense_basis(Tensor basis, int32_t arithmetic) {
    const bool as_it_is = is_bfloat16(basis) && arithmetic == shim.aoti_torch_dtype_float32;
    return dense(std::move(basis), as_it_is ? shim.aoti_torch_dtype_bfloat16 : arithmetic);
}

// The tensor itself where its rows are contiguous, else a copy: an expanded gradient, a transpose.
Tensor dense_rows(Tensor t) { return !t || t.stride(1) == 1 ? std::move(t) : copied(t, t.dtype()); }

int64_t row_stride(const Tensor& rows) { return rows ? rows.stride(0) : 0; }

// A matrix for the length of a call, or none of no rows. Not torch's memory: large blocks that come and go can make the
// C library return pages to the system in every call.
struct Scratch {
    int64_t bytes;
    void* memory = nullptr;
    Tensor matrix;

    Scratch(int32_t dtype, int64_t rows, int64_t columns)
        : bytes(rows * columns * (dtype == shim.aoti_torch_dtype_float64 ? 8 : 4)) {
        if (!rows) return;
        memory = take_scratch(bytes);
        if (!memory) throw std::bad_alloc();
        matrix = of_memory(memory, dtype, rows, columns);
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() {
        if (memory) give_scratch(memory, bytes);
    }
};

// P = x A^T + a.
Tensor projected(const Tensor& x, const Tensor& basis, const Tensor& basis_bias) {
    const int32_t dtype = x.dtype();
    Tensor P = empty(dtype, x.size(0), basis.size(0));
    const Tensor A = basis.dtype() == dtype ? transposed(basis) : transposed(copied(basis, dtype));
    if (basis_bias && basis_bias.dtype() != dtype)
        multiply(P, copied(basis_bias, dtype), x, A);
    else
        multiply(P, basis_bias, x, A);
    return P;
}

// sum_m t[m], by a product: sums are as wide as its are.
Tensor column_sums(const Tensor& t) {
    const int64_t M = t.size(0), N = t.size(1);
    Tensor ones = empty(shim.aoti_torch_dtype_float64, 1, M), sums = empty(t.dtype(), 1, N);
    for (int64_t m = 0; m < M; ++m) static_cast<double*>(ones.data())[m] = 1;
    multiply(sums, Tensor(), copied(ones, t.dtype()), t);
    return row(sums);
}

struct Types {
    int64_t dtype;
    int32_t arithmetic;
    explicit Types(const Tensor& x) : arithmetic(shim.aoti_torch_dtype_float32) {
        const int32_t storage = x.dtype();
        if (storage == shim.aoti_torch_dtype_float32)
            dtype = ADAMSS_FLOAT32;
        else if (storage == shim.aoti_torch_dtype_bfloat16)
            dtype = ADAMSS_BFLOAT16;
        else if (storage == shim.aoti_torch_dtype_float64)
            dtype = ADAMSS_FLOAT64, arithmetic = storage;
        else
            throw std::runtime_error("adamss_kernels: expected float32, float64 or bfloat16");
    }
};

// Whether the kernels have left the base product to torch.
bool lacks_base(int32_t status) {
    if (status == ADAMSS_NO_MEMORY) throw std::bad_alloc();
    return status == ADAMSS_UPDATE;
}

// Whether S, or dB, is better had through P = x A^T + a, in two smaller products. Where AMX makes one pass of all, it
// wants x itself.
bool goes_through_P(int64_t dtype, const Tensor& basis, int64_t rho) {
    if (dtype == ADAMSS_BFLOAT16 || !basis) return false;
    const int64_t R = basis.size(0), D = basis.size(1);
    return 5 * R * (D + rho) < 4 * rho * D;
}

// Which tokens take which adapter, or none at all where there is one for all of them.
struct Groups {
    Tensor tokens, slots, starts;
    adamss_groups kernel = {};

    Groups() = default;
    explicit Groups(Inputs& in) : tokens(in.tensor()), slots(in.tensor()), starts(in.tensor()) {
        in.tensor();  // tiles are for GPUs
        kernel = {slots.size(0), indices(tokens), indices(slots), indices(starts)};
    }
    explicit operator bool() const { return bool(tokens); }
    static const int64_t* indices(const Tensor& t) { return static_cast<const int64_t*>(t.data()); }
    bool is_empty(int64_t group) const { return kernel.starts[group] == kernel.starts[group + 1]; }

    // As `goes_through_P`: all groups share P, while each needs a Q of its own, which costs it R more tokens.
    bool go_through_P(const Tensor& basis, int64_t rho, int64_t M) const {
        if (!basis) return false;
        const int64_t R = basis.size(0), D = basis.size(1);
        int64_t tokens_and_Qs = M;
        for (int64_t g = 0; g < kernel.count; ++g) tokens_and_Qs += is_empty(g) ? 0 : R;
        return 5 * M * R * (D + rho) < 4 * rho * D * tokens_and_Qs;
    }

    // The stack itself where it is contiguous and of `dtype`, else one that is, in which slots in use have values.
    Tensor dense_stack(Tensor stack, int32_t dtype) const {
        if (stack.dtype() == dtype && stack.is_contiguous()) return stack;
        const int64_t rows = stack.size(1), columns = stack.size(2);
        Tensor copies = empty(dtype, stack.size(0) * rows, columns);
        for (int64_t g = 0; g < kernel.count; ++g) {
            if (is_empty(g)) continue;
            const int64_t slot = kernel.slots[g];
            const Tensor to = view(copies, slot * rows * columns, rows, columns, columns, 1);
            const Tensor from = view(stack, slot * stack.stride(0), rows, columns, stack.stride(1), stack.stride(2));
            check(shim.aoti_torch_copy_(to.get(), from.get(), 0), "copy_");
        }
        return copies;
    }
};

// Whether dx is better had from an updated copy of W than from dS Q: they differ in a pass over W and one over dx. Not
// in bfloat16, to which the copy would be rounded.
bool updates_weight(int64_t dtype, int64_t M, int64_t N) { return dtype != ADAMSS_BFLOAT16 && M >= 2 * N; }

}  // namespace

namespace {

void forward(Value* stack, bool is_grouped) {
    Inputs in(stack);
    Tensor x = in.tensor(), weight = in.tensor(), bias = in.optional(), B = in.tensor(), C = in.tensor(),
           basis = in.optional(), basis_bias = in.optional();
    const Tensor row_subspace = in.tensor(), offsets = in.tensor();
    Tensor active = in.optional();
    const Groups groups = is_grouped ? Groups(in) : Groups();
    const bool keep_S = in.boolean(), keep_P = in.boolean();

    const Types types(x);
    const int64_t M = x.size(0), N = weight.size(0);
    const int64_t rho = B.size(is_grouped), R = B.size(1 + is_grouped), r_max = C.size(1 + is_grouped);
    const bool by_P = keep_P || (groups ? groups.go_through_P(basis, rho, M) : goes_through_P(types.dtype, basis, rho));
    Tensor P = by_P ? projected(x, basis, basis_bias) : empty(x.dtype(), 0);
    Tensor S = keep_S ? empty(types.arithmetic, M, rho) : empty(types.arithmetic, 0);
    Tensor y = empty(x.dtype(), M, N);
    basis = dense_basis(std::move(basis), types.arithmetic);
    basis_bias = dense(std::move(basis_bias), types.arithmetic);
    bias = dense(std::move(bias), x.dtype());
    B = groups ? groups.dense_stack(std::move(B), types.arithmetic) : dense(std::move(B), types.arithmetic);
    C = groups ? groups.dense_stack(std::move(C), types.arithmetic) : dense(std::move(C), types.arithmetic);
    active = dense(std::move(active), shim.aoti_torch_dtype_bool);
    x = dense_rows(std::move(x));
    weight = dense_rows(std::move(weight));

    const adamss_forward_args args = {types.dtype, M, x.size(1), R, x.data(), row_stride(x),
                                      by_P ? P.data() : nullptr, R, weight.data(), row_stride(weight), basis.data(),
                                      is_bfloat16(basis), basis_bias.data(), B.data(), bias.data(), C.data(), r_max,
                                      keep_S ? S.data() : nullptr, y.data(),
                                      layout_of<adamss_layout>(row_subspace, offsets, active, Tensor()), nullptr};
    if (lacks_base(groups ? adamss_cpu_grouped_forward(&args, &groups.kernel) : adamss_cpu_forward(&args)))
        multiply(y, y, x, transposed(weight));
    if (by_P && !keep_P) P = empty(x.dtype(), 0);
    set_outputs(stack, {&y, &S, &P});
}

// Without a base: S C^T alone, added to y.
void add_update(Value* stack) {
    Inputs in(stack);
    const Tensor y = in.tensor();
    Tensor x = in.tensor(), B = in.tensor(), C = in.tensor(), basis = in.optional(), basis_bias = in.optional();
    const Tensor row_subspace = in.tensor(), offsets = in.tensor();
    Tensor active = in.optional();
    const bool keep_S = in.boolean(), keep_P = in.boolean();

    const Types types(x);
    const int64_t M = x.size(0), rho = B.size(0), R = B.size(1), r_max = C.size(1);
    const bool by_P = keep_P || goes_through_P(types.dtype, basis, rho);
    Tensor P = by_P ? projected(x, basis, basis_bias) : empty(x.dtype(), 0);
    Tensor S = keep_S ? empty(types.arithmetic, M, rho) : empty(types.arithmetic, 0);
    basis = dense_basis(std::move(basis), types.arithmetic);
    basis_bias = dense(std::move(basis_bias), types.arithmetic);
    B = dense(std::move(B), types.arithmetic);
    C = dense(std::move(C), types.arithmetic);
    active = dense(std::move(active), shim.aoti_torch_dtype_bool);
    x = dense_rows(std::move(x));

    const adamss_forward_args args = {types.dtype, M, x.size(1), R, x.data(), row_stride(x),
                                      by_P ? P.data() : nullptr, R, nullptr, 0, basis.data(),
                                      is_bfloat16(basis), basis_bias.data(), B.data(), nullptr, C.data(), r_max,
                                      keep_S ? S.data() : nullptr, y.data(),
                                      layout_of<adamss_layout>(row_subspace, offsets, active, Tensor()), nullptr, true};
    lacks_base(adamss_cpu_forward(&args));
    if (by_P && !keep_P) P = empty(x.dtype(), 0);
    set_outputs(stack, {&S, &P});
}

// Without a base dx is that of the update alone.
void backward(Value* stack, bool is_grouped, bool has_base = true) {
    Inputs in(stack);
    Tensor dy = in.tensor(), x = in.optional(), S = in.optional(), P = in.optional(),
           weight = has_base ? in.tensor() : Tensor(), B = in.tensor(), C = in.tensor(), basis = in.optional(),
           basis_bias = in.optional();
    const Tensor row_subspace = in.tensor(), offsets = in.tensor();
    Tensor active = in.optional(), trainable = in.optional();
    const Groups groups = is_grouped ? Groups(in) : Groups();
    bool needs[5];
    in.booleans(needs);
    const auto [need_dx, need_dweight, need_dbias, need_dB, need_dC] = needs;

    const Types types(dy);
    const int32_t dtype_B = B.dtype(), dtype_C = C.dtype();
    const int64_t rho = B.size(is_grouped), R = B.size(1 + is_grouped), r_max = C.size(1 + is_grouped);
    const int64_t M = dy.size(0), N = dy.size(1), D = basis ? basis.size(1) : R;
    Tensor dx = need_dx ? empty(dy.dtype(), M, D) : empty(dy.dtype(), 0);
    const bool updates_W = need_dx && has_base && !groups && updates_weight(types.dtype, M, N);
    const Scratch W_updated(dy.dtype(), updates_W ? N : 0, D);
    Tensor dweight = need_dweight ? empty(dy.dtype(), N, D) : empty(dy.dtype(), 0);
    if (need_dweight) multiply(dweight, Tensor(), transposed(dy), x);
    Tensor dbias = need_dbias ? column_sums(dy) : empty(dy.dtype(), 0);
    // Rows of all groups stand one under the other.
    const int64_t count = groups ? groups.kernel.count : 1;
    Tensor dB = need_dB ? empty(types.arithmetic, count * rho, R) : empty(types.arithmetic, 0);
    Tensor dC = need_dC ? empty(types.arithmetic, count * N, r_max) : empty(types.arithmetic, 0);
    // The address of no rows at all would be null: "no P".
    if (need_dB && P && !M) P = empty(dy.dtype(), 1, R);
    const bool groups_by_P = groups && groups.go_through_P(basis, rho, M);
    if (need_dB && !P && (groups ? groups_by_P : goes_through_P(types.dtype, basis, rho)))
        P = projected(x, basis, basis_bias);
    const bool by_P = need_dB && P;
    // With another Q for each group dx is better had as dP A: to the kernels P is x then, and B is Q.
    const bool dx_by_dP = need_dx && groups_by_P && (by_P || !need_dB);
    Tensor dP = dx_by_dP ? empty(dy.dtype(), M, R) : Tensor();
    P = dense_rows(std::move(P));
    x = dense_rows(std::move(x));
    const Tensor A_for_dx = dx_by_dP ? dense(view(basis), dy.dtype()) : Tensor();
    basis = dense_basis(std::move(basis), types.arithmetic);
    basis_bias = dense(std::move(basis_bias), types.arithmetic);
    B = groups ? groups.dense_stack(std::move(B), types.arithmetic) : dense(std::move(B), types.arithmetic);
    C = groups ? groups.dense_stack(std::move(C), types.arithmetic) : dense(std::move(C), types.arithmetic);
    active = dense(std::move(active), shim.aoti_torch_dtype_bool);
    trainable = dense(std::move(trainable), shim.aoti_torch_dtype_bool);
    dy = dense_rows(std::move(dy));
    weight = dense_rows(std::move(weight));

    const adamss_backward_args args = {types.dtype, M, dx_by_dP ? R : D, R, dy.data(), row_stride(dy),
                                       need_dB && !by_P ? x.data() : nullptr, row_stride(x),
                                       by_P ? P.data() : nullptr, row_stride(P), need_dC ? S.data() : nullptr,
                                       weight.data(), row_stride(weight), dx_by_dP ? nullptr : basis.data(),
                                       is_bfloat16(basis), basis_bias.data(), B.data(), C.data(), r_max,
                                       dx_by_dP                          ? dP.data()
                                       : need_dx && !W_updated.matrix    ? dx.data()
                                                                         : nullptr,
                                       W_updated.matrix.data(), need_dB ? dB.data() : nullptr,
                                       need_dC ? dC.data() : nullptr,
                                       layout_of<adamss_layout>(row_subspace, offsets, active, trainable), nullptr};
    const bool lacks =
        lacks_base(groups ? adamss_cpu_grouped_backward(&args, &groups.kernel) : adamss_cpu_backward(&args));
    if (dx_by_dP) multiply(dx, Tensor(), dP, A_for_dx);
    if (W_updated.matrix)
        multiply(dx, Tensor(), dy, W_updated.matrix);
    else if (need_dx && lacks && has_base)
        multiply(dx, dx, dy, weight);
    if (dtype_B != types.arithmetic) dB = copied(dB, dtype_B);
    if (dtype_C != types.arithmetic) dC = copied(dC, dtype_C);
    if (groups && need_dB) dB = stacked(dB, count, rho);
    if (groups && need_dC) dC = stacked(dC, count, N);
    set_outputs(stack, {&dx, &dweight, &dbias, &dB, &dC});
}

}  // namespace

void forward(Value* stack, uint64_t, uint64_t) { forward(stack, false); }
void backward(Value* stack, uint64_t, uint64_t) { backward(stack, false); }
void add_update(Value* stack, uint64_t, uint64_t) { add_update(stack); }
void update_backward(Value* stack, uint64_t, uint64_t) { backward(stack, false, false); }
void grouped_forward(Value* stack, uint64_t, uint64_t) { forward(stack, true); }
void grouped_backward(Value* stack, uint64_t, uint64_t) { backward(stack, true); }

}  // namespace adamss::torch
