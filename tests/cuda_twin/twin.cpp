// csrc/cuda's own sources compiled as host C++, with what tests set and read of the pretended device.
#include <cuda_runtime.h>

alignas(16) thread_local uint4 shared_memory[TWIN_SHARED / sizeof(uint4)];

#include "launch.cu"
#include "operators.cpp"
#include "register.cpp"

#include <sys/mman.h>
#include <unistd.h>

#include "finish.h"
#include "prepare.h"

namespace {

// --- hopper.cu's two directions, with loops for its kernels of wgmma, which the twin has not -------------------------

using Args = adamss_cuda_fused_args;

// Where tests want to see what is prepared, and parts that they want to be finished.
struct Watched {
    void *Q, *q, *Ct, *S, *P;
    const float *dy_parts, *z_parts, *sums;
    int64_t splits;
    float* G;
} watched = {};

constexpr int64_t WORKSPACE = 1000;

template <class T>
struct Buffer {
    std::vector<T> own;
    T* p;
    Buffer(void* there, int64_t size) : own(there ? 0 : size), p(there ? static_cast<T*>(there) : own.data()) {}
};

// Y = L R + (L U^T + u) V in forward and, with R = W instead of its transpose, in backward.
template <class X>
void low_rank_gemm(const Args& args, int64_t rho_pad, const X* U, const float* u, const X* V, X* dS) {
    const bool back = args.dy;
    const int64_t N = args.layout.N, E = back ? N : args.D, F = back ? args.D : N;
    const X *const L = static_cast<const X*>(back ? args.dy : args.x), *const W = static_cast<const X*>(args.W);
    std::vector<float> inner(rho_pad);
    for (int64_t m = 0; m < args.M; ++m) {
        const X* const row = L + m * (back ? args.stride_dym : args.stride_xm);
        for (int64_t c = 0; c < rho_pad; ++c) {
            float total = 0;
            for (int64_t e = 0; e < E; ++e) total += widen(row[e]) * widen(U[c * E + e]);
            inner[c] = total + (u ? u[c] : 0.f);
            if (args.S && !back && c < args.RHO) static_cast<float*>(args.S)[m * args.RHO + c] = inner[c];
            X rounded;
            store(&rounded, inner[c]);
            inner[c] = widen(rounded);
            if (dS) dS[m * rho_pad + c] = rounded;
        }
        for (int64_t f = 0; f < F; ++f) {
            float total = 0;
            for (int64_t c = 0; c < rho_pad; ++c) total += inner[c] * widen(V[c * F + f]);
            for (int64_t e = 0; e < E; ++e)
                total += widen(row[e]) * widen(W[back ? e * args.stride_wn + f : f * args.stride_wn + e]);
            store(static_cast<X*>(back ? args.dx : args.y) + m * F + f, total);
        }
    }
}

// parts[t] (columns, rho_pad) = left^T right over the tokens of part t.
template <class X>
std::vector<float> token_products(int64_t M, int64_t splits, const X* left, int64_t stride, int64_t columns,
                                  const X* right, int64_t rho_pad) {
    std::vector<float> parts(splits * columns * rho_pad);
    for (int64_t m = 0; m < M; ++m)
        for (int64_t i = 0; i < columns; ++i)
            for (int64_t c = 0; c < rho_pad; ++c)
                parts[(m % splits * columns + i) * rho_pad + c] +=
                    (left ? widen(left[m * stride + i]) : 1.f) * widen(right[m * rho_pad + c]);
    return parts;
}

template <class X, class A_t, int RHO_PAD>
int32_t fused(const Args& args) {
    const int64_t M = args.M, N = args.layout.N, D = args.D;
    const bool back = args.dy, through_x = args.dB && !args.P, keeps_P = back && args.dB && args.P;
    std::memset(args.workspace, 0, WORKSPACE);
    Buffer<X> Q(watched.Q, RHO_PAD * D), Ct(watched.Ct, RHO_PAD * N), S(watched.S, M * RHO_PAD);
    Buffer<X> P(watched.P, M * padded_R(args));
    Buffer<float> q(watched.q, RHO_PAD);
    const Prepared<X> to = {Q.p, Ct.p, back && args.dC ? S.p : nullptr, keeps_P ? P.p : nullptr, q.p};
    const auto p = describe_prepare<RHO_PAD, X, A_t>(args, back ? nullptr : static_cast<const X*>(args.bias), to);
    if (const int32_t status = launch(prepare_kernel<X, A_t, RHO_PAD>, p.blocks(), PREPARE_THREADS,
                                      PREPARE_SHARED<RHO_PAD>, args.stream, p))
        return status;
    if (!back) return low_rank_gemm<X>(args, RHO_PAD, Q.p, q.p, Ct.p, nullptr), 0;
    std::vector<X> dS(M * RHO_PAD);
    low_rank_gemm<X>(args, RHO_PAD, Ct.p, nullptr, Q.p, dS.data());
    if (!args.dB && !args.dC) return 0;

    const int64_t splits = 3, Z = through_x ? D : args.R;
    std::vector<float> dy_parts, z_parts, sums, G((D + 1) * RHO_PAD);
    Watched w = watched;
    if (!w.splits) {
        w.splits = splits;
        if (args.dC)
            dy_parts = token_products<X>(M, splits, static_cast<const X*>(args.dy), args.stride_dym, N, S.p, RHO_PAD);
        if (args.dB)
            z_parts = token_products<X>(M, splits, through_x ? static_cast<const X*>(args.x) : P.p,
                                        through_x ? args.stride_xm : padded_R(args), Z, dS.data(), RHO_PAD);
        if (through_x && args.a) sums = token_products<X>(M, splits, nullptr, 0, 1, dS.data(), RHO_PAD);
        w.dy_parts = dy_parts.data(), w.z_parts = z_parts.data(), w.sums = sums.empty() ? nullptr : sums.data();
    }
    if (!w.G) w.G = G.data();
    const Finish f = describe_finish(args, w.dy_parts, w.z_parts, w.sums, w.splits, through_x ? w.G : nullptr);
    if (const int32_t status = launch(finish_kernel, f.blocks(), FINISH_THREADS, 0, args.stream, f)) return status;
    if (!through_x) return 0;
    return launch(dB_kernel<A_t>, args.R, THROUGH_WARPS * WARP, THROUGH_WARPS * args.RHO_PAD * 4, args.stream,
                  describe_through_input<A_t>(args, w.G));
}

template <class X>
int32_t fused(const Args& args) {
    const bool same = args.A_dtype == args.dtype;
    if (args.RHO_PAD == 32) return same ? fused<X, X, 32>(args) : fused<X, float, 32>(args);
    return same ? fused<X, X, 64>(args) : fused<X, float, 64>(args);
}

// --- memory that torch makes for operators -----------------------------------------------------------------------------

// Each new tensor ends where memory that nobody may touch begins, lies behind a page of ones, and is full of NaN.
struct Guarded {
    uint8_t* margin;
    int64_t bytes;
};
std::vector<Guarded> guarded;
decltype(adamss::torch::Shim::aoti_torch_empty_strided) torchs_empty = nullptr;

int32_t guarded_empty(int64_t dimensions, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t type,
                      int32_t index, adamss::torch::Handle* made) {
    using namespace adamss::torch;
    int64_t size = dtype == shim.aoti_torch_dtype_float64 ? 8
                   : dtype == shim.aoti_torch_dtype_float32 ? 4
                   : dtype == shim.aoti_torch_dtype_uint8 || dtype == shim.aoti_torch_dtype_bool ? 1 : 2;
    for (int64_t d = 0; d < dimensions; ++d) size *= sizes[d];
    const int64_t page = sysconf(_SC_PAGESIZE), bytes = up(size, page);
    void* const area =
        mmap(nullptr, bytes + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED) return 1;
    uint8_t* const first = static_cast<uint8_t*>(area);
    std::memset(first, 0xff, bytes + page);
    mprotect(first + page + bytes, page, PROT_NONE);
    guarded.push_back({first, page + bytes - size});
    return shim.aoti_torch_create_tensor_from_blob(first + page + bytes - size, dimensions, sizes, strides, 0, dtype,
                                                   type, index, made);
}

int32_t no_memory(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, adamss::torch::Handle*) {
    return 1;
}

}  // namespace

int32_t adamss_cuda_fused(const Args* args) {
    return args->dtype == ADAMSS_CUDA_FLOAT16 ? fused<__half>(*args) : fused<__nv_bfloat16>(*args);
}
int64_t adamss_cuda_fused_workspace(const Args*) { return WORKSPACE; }

extern "C" {

// What torch exports where it has CUDA.
int32_t aoti_torch_create_cuda_guard(int32_t device, adamss::torch::GuardHandle* guard) {
    *guard = reinterpret_cast<adamss::torch::GuardHandle>(new int(twin::control.device));
    twin::control.device = device;
    return 0;
}
int32_t aoti_torch_delete_cuda_guard(adamss::torch::GuardHandle guard) {
    int* const previous = reinterpret_cast<int*>(guard);
    twin::control.device = *previous;
    delete previous;
    return 0;
}
int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
    *stream = reinterpret_cast<void*>(intptr_t(1000 + device));
    return 0;
}

void twin_set(uint64_t seed, int32_t record, int32_t fail) {
    twin::control.seed = seed;
    twin::control.record = record;
    twin::control.fail = fail;
    twin::control.launches.clear();
}

// 0: as torch gives it, 1: guarded, 2: there is none.
void twin_memory(int32_t kind) {
    auto& empty = adamss::torch::shim.aoti_torch_empty_strided;
    if (!torchs_empty) torchs_empty = empty;
    empty = kind == 0 ? torchs_empty : kind == 1 ? guarded_empty : no_memory;
    guarded.clear();
}

// How many tensors were guarded, or -1 where a margin of one was written to.
int64_t twin_guarded() {
    for (const Guarded& g : guarded)
        for (int64_t i = 0; i < g.bytes; ++i)
            if (g.margin[i] != 0xff) return -1;
    return int64_t(guarded.size());
}

void twin_watch(void* Q, void* q, void* Ct, void* S, void* P, const float* dy_parts, const float* z_parts,
                const float* sums, int64_t splits, float* G) {
    watched = {Q, q, Ct, S, P, dy_parts, z_parts, sums, splits, G};
}

int32_t twin_device() { return twin::control.device; }
void* twin_stream() { return twin::control.stream; }

// Copies blocks, threads, shared bytes and device of up to `count` launches; returns how many there were since
// `twin_set`.
int64_t twin_launches(int64_t* out, int64_t count) {
    const auto& launches = twin::control.launches;
    for (int64_t i = 0; i < int64_t(launches.size()) && i < count; ++i) {
        out[4 * i] = launches[i].blocks;
        out[4 * i + 1] = launches[i].threads;
        out[4 * i + 2] = launches[i].shared;
        out[4 * i + 3] = launches[i].device;
    }
    return int64_t(launches.size());
}

// Launches of any size, with addresses that nothing reads: return null, or what is wrong.
const char* twin_delta_fwd(int64_t dtype, int64_t M, int64_t N, int64_t RHO, int64_t r_max) {
    void* const at = reinterpret_cast<void*>(16);
    const adamss_cuda_delta_fwd_args args = {
        nullptr, dtype, M, RHO, r_max, at, N, at, at, {N, 10, nullptr, nullptr, nullptr, nullptr}};
    const int32_t status = adamss_cuda_delta_fwd(&args);
    return status ? adamss_cuda_error(status) : nullptr;
}

const char* twin_delta_bwd(int64_t dtype, int64_t M, int64_t N, int64_t RHO, int64_t r_max, int64_t stretches,
                           int64_t width, int64_t parts) {
    void* const at = reinterpret_cast<void*>(16);
    const adamss_cuda_delta_bwd_args args = {
        nullptr, dtype, M, RHO, r_max, at, N, 1, at, at, at, at, at, at, {stretches, width, parts},
        {N, 10, nullptr, nullptr, nullptr, nullptr}};
    const int32_t status = adamss_cuda_delta_bwd(&args);
    return status ? adamss_cuda_error(status) : nullptr;
}

// Stretches, width and parts.
void twin_plan(int64_t dtype, int64_t M, int64_t N, int64_t RHO, int64_t multiprocessors, int64_t* out) {
    const adamss_cuda_plan plan = adamss_cuda_delta_bwd_plan(dtype, M, N, RHO, multiprocessors);
    out[0] = plan.stretches, out[1] = plan.width, out[2] = plan.parts;
}
}
