// Chooses the instantiation, the grid and the shared memory, and launches.
#include "backward.h"
#include "forward.h"
#include "geometry.h"
#include "interface.h"

namespace {

using namespace adamss;

template <class X>
struct Type {
    using type = X;
};

// Calls `f` with the storage type that `dtype` names.
template <class F>
int32_t for_dtype(int64_t dtype, const F& f) {
    switch (dtype) {
        case ADAMSS_CUDA_FLOAT32:
            return f(Type<float>());
        case ADAMSS_CUDA_FLOAT64:
            return f(Type<double>());
        case ADAMSS_CUDA_BFLOAT16:
            return f(Type<__nv_bfloat16>());
        case ADAMSS_CUDA_FLOAT16:
            return f(Type<__half>());
    }
    return int32_t(cudaErrorInvalidValue);
}

template <class... Parameters, class... Arguments>
int32_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, void* stream,
               const Arguments&... arguments) {
    if (blocks == 0) return 0;
    if (blocks > MAX_BLOCKS) return ADAMSS_TOO_LARGE;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared);
    config.stream = static_cast<cudaStream_t>(stream);
    return int32_t(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// Whether rows that start at `p` and follow one another every `stride` elements all start at a multiple of 16 bytes.
bool is_aligned(const void* p, int64_t stride, int64_t size) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * size % 16 == 0;
}

template <class X, class A_t>
int32_t project(const adamss_cuda_input_projection_args& args) {
    Projection<X, A_t> p = {};
    p.RHO = args.RHO, p.R = args.R, p.D = args.D;
    p.stride_ar = args.stride_ar, p.stride_ad = args.stride_ad, p.stride_a = args.stride_a;
    p.tiles_d = cdiv(args.D + (args.q != nullptr), PROJECTION_THREADS);
    p.B = static_cast<const Acc<X>*>(args.B);
    p.A = static_cast<const A_t*>(args.A);
    p.a = static_cast<const A_t*>(args.a);
    p.Q = static_cast<X*>(args.Q);
    p.q = static_cast<Acc<X>*>(args.q);
    p.layout = args.layout;
    const int64_t blocks = p.tiles_d * cdiv(args.RHO, PROJECTION_ROWS);
    return launch(input_projection_kernel<X, A_t>, blocks, PROJECTION_THREADS, 0, args.stream, p);
}

}  // namespace

int32_t adamss_cuda_input_projection(const adamss_cuda_input_projection_args* args) {
    return for_dtype(args->dtype, [&](auto x) {
        using X = typename decltype(x)::type;
        return args->A_dtype == args->dtype ? project<X, X>(*args) : project<X, Acc<X>>(*args);
    });
}

int32_t adamss_cuda_delta_fwd(const adamss_cuda_delta_fwd_args* args) {
    return for_dtype(args->dtype, [&](auto x) {
        using X = typename decltype(x)::type;
        using T = Acc<X>;
        const ForwardTiles tiles = forward_tiles(args->M, args->layout.N, args->RHO, args->r_max, sizeof(X), sizeof(T));
        Update<X> p = {};
        p.M = args->M, p.RHO = args->RHO, p.r_max = args->r_max, p.stride_ym = args->stride_ym;
        p.rows = tiles.rows, p.tiles_n = tiles.tiles_n;
        p.aligned = is_aligned(args->y, args->stride_ym, sizeof(X));
        p.y = static_cast<X*>(args->y);
        p.S = static_cast<const T*>(args->S);
        p.C = static_cast<const T*>(args->C);
        p.layout = args->layout;
        return launch(tiles.shared ? delta_fwd_kernel<X, true> : delta_fwd_kernel<X, false>, tiles.blocks,
                      FORWARD_WARPS * WARP, tiles.shared, args->stream, p);
    });
}

adamss_cuda_plan adamss_cuda_delta_bwd_plan(int64_t dtype, int64_t M, int64_t N, int64_t RHO, int64_t multiprocessors) {
    adamss_cuda_plan plan = {};
    for_dtype(dtype, [&](auto x) {
        using X = typename decltype(x)::type;
        const BackwardTiles tiles = backward_tiles(M, N, RHO, sizeof(X), sizeof(Acc<X>), multiprocessors);
        plan = {tiles.stretches, tiles.width, tiles.tiles_m * tiles.groups};
        return 0;
    });
    return plan;
}

int32_t adamss_cuda_delta_bwd(const adamss_cuda_delta_bwd_args* args) {
    return for_dtype(args->dtype, [&](auto x) {
        using X = typename decltype(x)::type;
        using T = Acc<X>;
        const adamss_cuda_layout& layout = args->layout;
        const adamss_cuda_plan& plan = args->plan;
        BackwardOperands<X> p = {};
        p.M = args->M, p.RHO = args->RHO, p.r_max = args->r_max;
        p.stride_dym = args->stride_dym, p.stride_dyn = args->stride_dyn;
        p.tiles_m = cdiv(args->M, BACKWARD_ROWS), p.blocks_rho = cdiv(args->RHO, COLUMN_BYTES / sizeof(T));
        p.stretches = plan.stretches, p.width = plan.width;
        p.aligned = args->stride_dyn == 1 && is_aligned(args->dy, args->stride_dym, sizeof(X));
        p.dy = static_cast<const X*>(args->dy);
        p.S = static_cast<const T*>(args->S);
        p.C = static_cast<const T*>(args->C);
        p.dS = static_cast<X*>(args->dS);
        p.dS_parts = static_cast<T*>(args->dS_parts);
        p.dC_parts = static_cast<T*>(args->dC_parts);
        p.layout = layout;
        const int64_t blocks = p.tiles_m * p.blocks_rho * p.stretches, shared = backward_shared(args->RHO, sizeof(T));
        int32_t status = launch(delta_bwd_kernel<X>, blocks, BACKWARD_THREADS, shared, args->stream, p);
        if (status == 0 && args->dS && plan.stretches > 1) {
            const int64_t E = args->M * args->RHO;
            status = launch(sum_dS_kernel<X>, cdiv(E, SUM_THREADS), SUM_THREADS, 0, args->stream, p.dS_parts, p.dS,
                            plan.stretches, E);
        }
        if (status == 0 && args->dC)
            status = launch(sum_dC_kernel<T>, cdiv(layout.N * args->r_max, WARP), SUM_THREADS, 0, args->stream,
                            p.dC_parts, static_cast<T*>(args->dC), plan.parts, args->r_max, layout);
        return status;
    });
}

int32_t adamss_cuda_mask_rows(const adamss_cuda_mask_rows_args* args) {
    const int64_t blocks = cdiv(args->RHO * args->R, SUM_THREADS);
    return for_dtype(args->dtype, [&](auto x) {
        using T = Acc<typename decltype(x)::type>;
        return launch(mask_rows_kernel<T>, blocks, SUM_THREADS, 0, args->stream, static_cast<T*>(args->dB), args->RHO,
                      args->R, args->layout);
    });
}

const char* adamss_cuda_error(int32_t status) {
    return status == ADAMSS_TOO_LARGE ? "more than 2^31 - 1 blocks of threads"
                                      : cudaGetErrorString(static_cast<cudaError_t>(status));
}
