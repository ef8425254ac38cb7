// Forward and backward on GPUs of compute capability 9.0, in float16 and bfloat16: kernels and how they are launched.
#include <cuda_runtime.h>

#include "finish.h"
#include "geometry.h"
#include "low_rank_gemm.h"
#include "prepare.h"
#include "token_products.h"

namespace {

using namespace adamss;
using Args = adamss_cuda_fused_args;

#define CHECK(call)                                          \
    do {                                                     \
        if (const int32_t status = int32_t(call)) return status; \
    } while (false)

// --- scratch --------------------------------------------------------------------------------------------------------

// Memory that lives through one call, from the workspace; with none, the sizes are added up.
struct Scratch {
    uint8_t* base;
    int64_t used = 0;

    template <class T>
    T* take(int64_t count) {
        T* const here = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += up(count * int64_t(sizeof(T)), 256);
        return here;
    }
};

// --- operands for the copy engine -----------------------------------------------------------------------------------

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function; the library links with the runtime alone.
Encode encoder() {
    static const Encode encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
    }();
    return encode;
}

CUtensorMapDataType type_of(const __nv_bfloat16*) { return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16; }
CUtensorMapDataType type_of(const __half*) { return CU_TENSOR_MAP_DATA_TYPE_FLOAT16; }

// A matrix of `rows` rows, copied in boxes of 64 columns (128 bytes) by `box_rows` rows; beyond its edges are zeros.
template <class X>
int32_t describe(CUtensorMap* map, const X* p, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
    const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[] = {cuuint64_t(stride) * sizeof(X)};
    const cuuint32_t box[] = {64, cuuint32_t(box_rows)}, steps[] = {1, 1};
    if (!encoder()) return int32_t(cudaErrorNotSupported);
    const CUresult status = encoder()(map, type_of(p), 2, const_cast<X*>(p), sizes, strides, box, steps,
                                      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return status == CUDA_SUCCESS ? 0 : int32_t(cudaErrorInvalidValue);
}

// --- launches -------------------------------------------------------------------------------------------------------

// `early`: it may start while the kernel before it still runs, and waits where it reads what that has written.
template <class... Parameters, class... Arguments>
int32_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, void* stream, bool early,
               const Arguments&... arguments) {
    if (blocks == 0) return 0;
    if (blocks > MAX_BLOCKS) return ADAMSS_TOO_LARGE;
    if (shared > SHARED_LIMIT)
        CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute, config.numAttrs = early;
    return int32_t(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

template <int RHO_PAD, class X, class A_t>
int32_t prepare_from(const Args& args, const X* bias, const Prepared<X>& to) {
    const Prepare<X, A_t> p = describe_prepare<RHO_PAD, X, A_t>(args, bias, to);
    return launch(prepare_kernel<X, A_t, RHO_PAD>, p.blocks(), PREPARE_THREADS, PREPARE_SHARED<RHO_PAD>, args.stream,
                  false, p);
}

template <int RHO_PAD, class X>
int32_t prepare(const Args& args, const X* bias, const Prepared<X>& to) {
    return args.A_dtype == args.dtype ? prepare_from<RHO_PAD, X, X>(args, bias, to)
                                      : prepare_from<RHO_PAD, X, float>(args, bias, to);
}

// Y (M, F) = L (M, E) R + (L U^T + u) V; R is W^T in forward, W in backward.
template <class X>
struct Gemm {
    int64_t M, E, F, RHO, RHO_PAD, multiprocessors;
    void* stream;
    const X* L;
    int64_t stride_lm;
    const X* W;
    int64_t stride_wn;
    const X* U;
    const float* u;
    const X* V;
    X* Y;
    float* inner;
    X* inner_padded;
};

template <class X, int TILE_N, int RHO_PAD, bool COLUMNS>
int32_t low_rank_gemm(const Gemm<X>& g, int64_t clusters, int64_t run) {
    CUtensorMap L, R, U, V;
    CHECK(describe(&L, g.L, g.M, g.E, g.stride_lm, TILE_M));
    if (COLUMNS)
        CHECK(describe(&R, g.W, g.E, g.F, g.stride_wn, TILE_E));
    else
        CHECK(describe(&R, g.W, g.F, g.E, g.stride_wn, TILE_N / CLUSTER));
    CHECK(describe(&U, g.U, RHO_PAD, g.E, g.E, RHO_PAD));
    CHECK(describe(&V, g.V, RHO_PAD, g.F, g.F, RHO_PAD));
    LowRankGemm<X> p = {};
    p.M = g.M, p.E = int32_t(g.E), p.F = int32_t(g.F), p.RHO = int32_t(g.RHO);
    p.tiles_n = int32_t(cdiv(g.F, TILE_N)), p.pairs = int32_t(cdiv(g.M, CLUSTER * TILE_M));
    p.run = int32_t(run), p.group = 8;
    p.u = g.u, p.inner = g.inner, p.inner_padded = g.inner_padded, p.Y = g.Y;
    const int64_t units = p.pairs * cdiv(p.tiles_n, run);
    return launch(low_rank_gemm_kernel<X, TILE_N, RHO_PAD, COLUMNS>, CLUSTER * smaller(units, clusters),
                  LOW_RANK_GEMM_THREADS, Stages<TILE_N, RHO_PAD>::shared, g.stream, true, L, R, U, V, p);
}

// About how many cycles the longest of `clusters` takes with tiles of `tile_n` columns, `run` of them from one inner
// product. On an H100 a step of 64 by 256 columns takes 1024 cycles, what lies between two tiles some 2000; the first
// tile of a run reads its rows of L from memory, which brings 1400 bytes a cycle to all of them together.
double cycles_of(int64_t M, int64_t E, int64_t F, int64_t rho_pad, int64_t clusters, int64_t tile_n, int64_t run) {
    const int64_t steps = cdiv(E, TILE_E), chunks = cdiv(cdiv(F, tile_n), run), pairs = cdiv(M, CLUSTER * TILE_M);
    const int64_t units = pairs * chunks, rounds = cdiv(units, clusters);
    const int64_t tile = steps * 4 * tile_n, rows = cdiv(smaller(units, clusters), chunks) * CLUSTER * TILE_M;
    const int64_t first = larger(tile, rows * E * 2 / 1400) + steps * 5 * rho_pad;
    return double(rounds) * double(first + (run - 1) * tile + run * 2000);
}

template <class X, int RHO_PAD, bool COLUMNS>
int32_t low_rank_gemm(const Gemm<X>& g) {
    const int64_t clusters = g.multiprocessors / CLUSTER;
    int64_t tile_n = 0, run = 0;
    double least = 0;
    for (int64_t width : {256, 192}) {
        if (width == 256 && RHO_PAD > 32) continue;  // more than registers hold
        const int64_t tiles = cdiv(g.F, width);
        for (int64_t length = tiles; length > 0; length = length > 1 ? cdiv(length, 2) : 0) {
            const double cycles = cycles_of(g.M, g.E, g.F, RHO_PAD, clusters, width, length);
            if (run == 0 || cycles < least) least = cycles, tile_n = width, run = length;
        }
    }
    if constexpr (RHO_PAD <= 32)
        if (tile_n == 256) return low_rank_gemm<X, 256, RHO_PAD, COLUMNS>(g, clusters, run);
    return low_rank_gemm<X, 192, RHO_PAD, COLUMNS>(g, clusters, run);
}

template <class X, int RHO_PAD>
int32_t token_products(const Args& args, const X* S, const X* dS, const X* z, int64_t stride_zm, int64_t Z,
                       TokenProducts p) {
    CUtensorMap dy_map, S_map, z_map, dS_map;
    const X* const dy = static_cast<const X*>(args.dy);
    // What is not there is not read, but a description has to be one of something.
    CHECK(describe(&dy_map, dy, args.M, args.layout.N, args.stride_dym, TOKEN_ROWS));
    CHECK(describe(&S_map, S ? S : dS, args.M, RHO_PAD, RHO_PAD, TOKEN_ROWS));
    CHECK(describe(&dS_map, dS ? dS : S, args.M, RHO_PAD, RHO_PAD, TOKEN_ROWS));
    if (z)
        CHECK(describe(&z_map, z, args.M, Z, stride_zm, TOKEN_ROWS));
    else
        z_map = dy_map;
    return launch(token_products_kernel<X, RHO_PAD>, p.splits * (p.of_dy.blocks + p.of_z.blocks), TOKEN_THREADS,
                  TOKEN_SHARED, args.stream, true, dy_map, S_map, z_map, dS_map, p);
}

// Divides the tokens so that the blocks fill the GPU once or a few times: by sizes alone, so that sums keep their order.
void divide(TokenProducts* p, int64_t multiprocessors) {
    const int64_t blocks = p->of_dy.blocks + p->of_z.blocks, steps = cdiv(p->M, TOKEN_ROWS);
    int64_t least = 0;
    for (int64_t splits = 1; splits <= smaller(steps, int64_t(64)); ++splits) {
        const int64_t width = cdiv(steps, splits);
        // A part that is written and read again costs about as much as four steps.
        const int64_t cost = cdiv(blocks * splits, multiprocessors) * (width + 4);
        if (splits > 1 && cost >= least) continue;
        least = cost, p->splits = int32_t(cdiv(steps, width)), p->width = int32_t(width * TOKEN_ROWS);
    }
}

template <class A_t>
int32_t through_input(const Args& args, const float* G) {
    return launch(dB_kernel<A_t>, args.R, THROUGH_WARPS * WARP, THROUGH_WARPS * args.RHO_PAD * 4, args.stream, true,
                  describe_through_input<A_t>(args, G));
}

// --- the two directions ---------------------------------------------------------------------------------------------

template <class X, int RHO_PAD>
int32_t forward(const Args& args, Scratch& scratch) {
    Prepared<X> made = {};
    made.Q = scratch.take<X>(RHO_PAD * args.D);
    made.Ct = scratch.take<X>(RHO_PAD * args.layout.N);
    made.q = scratch.take<float>(RHO_PAD);
    if (!scratch.base) return 0;
    const X* const bias = static_cast<const X*>(args.bias);
    CHECK(prepare<RHO_PAD>(args, bias, made));
    Gemm<X> g = {};
    g.M = args.M, g.E = args.D, g.F = args.layout.N, g.RHO = args.RHO, g.RHO_PAD = RHO_PAD;
    g.multiprocessors = args.multiprocessors, g.stream = args.stream;
    g.L = static_cast<const X*>(args.x), g.stride_lm = args.stride_xm;
    g.W = static_cast<const X*>(args.W), g.stride_wn = args.stride_wn;
    g.U = made.Q, g.u = made.q, g.V = made.Ct;
    g.Y = static_cast<X*>(args.y), g.inner = static_cast<float*>(args.S);
    return low_rank_gemm<X, RHO_PAD, false>(g);
}

template <class X, int RHO_PAD>
int32_t backward(const Args& args, Scratch& scratch) {
    const int64_t M = args.M, N = args.layout.N, D = args.D;
    const bool through_x = args.dB && !args.P;
    Prepared<X> made = {};
    made.Q = scratch.take<X>(RHO_PAD * D);
    made.Ct = scratch.take<X>(RHO_PAD * N);
    made.q = scratch.take<float>(RHO_PAD);
    if (args.dC) made.S = scratch.take<X>(M * RHO_PAD);
    if (args.dB && args.P) made.P = scratch.take<X>(M * padded_R(args));
    X* const dS = args.dB ? scratch.take<X>(M * RHO_PAD) : nullptr;

    const int64_t Z = through_x ? D : args.R;
    TokenProducts products = {};
    products.M = M;
    products.of_dy.Z = int32_t(N), products.of_z.Z = int32_t(Z);
    products.of_dy.blocks = args.dC ? int32_t(cdiv(N, TOKEN_COLUMNS)) : 0;
    products.of_z.blocks = args.dB ? int32_t(cdiv(Z, TOKEN_COLUMNS)) : 0;
    divide(&products, args.multiprocessors);
    if (args.dC) products.of_dy.parts = scratch.take<float>(products.splits * N * RHO_PAD);
    if (args.dB) products.of_z.parts = scratch.take<float>(products.splits * Z * RHO_PAD);
    if (through_x && args.a) products.of_z.sums = scratch.take<float>(products.splits * RHO_PAD);
    float* const G = through_x ? scratch.take<float>((D + 1) * RHO_PAD) : nullptr;
    if (!scratch.base) return 0;

    const X* const none = nullptr;
    CHECK(prepare<RHO_PAD>(args, none, made));
    Gemm<X> g = {};
    g.M = M, g.E = N, g.F = D, g.RHO = args.RHO, g.RHO_PAD = RHO_PAD;
    g.multiprocessors = args.multiprocessors, g.stream = args.stream;
    g.L = static_cast<const X*>(args.dy), g.stride_lm = args.stride_dym;
    g.W = static_cast<const X*>(args.W), g.stride_wn = args.stride_wn;
    g.U = made.Ct, g.V = made.Q;
    g.Y = static_cast<X*>(args.dx), g.inner_padded = dS;
    CHECK((low_rank_gemm<X, RHO_PAD, true>(g)));
    if (!args.dB && !args.dC) return 0;

    const X* const z = !args.dB ? nullptr : through_x ? static_cast<const X*>(args.x) : made.P;
    CHECK((token_products<X, RHO_PAD>(args, made.S, dS, z, through_x ? args.stride_xm : padded_R(args), Z, products)));
    const float *const dy_parts = products.of_dy.parts, *const z_parts = products.of_z.parts;
    const Finish p = describe_finish(args, dy_parts, z_parts, products.of_z.sums, products.splits, G);
    CHECK(launch(finish_kernel, p.blocks(), FINISH_THREADS, 0, args.stream, true, p));
    if (!through_x) return 0;
    return args.A_dtype == args.dtype ? through_input<X>(args, G) : through_input<float>(args, G);
}

template <class X, int RHO_PAD>
int32_t run(const Args& args, Scratch& scratch) {
    return args.dy ? backward<X, RHO_PAD>(args, scratch) : forward<X, RHO_PAD>(args, scratch);
}

template <class X>
int32_t for_rank(const Args& args, Scratch& scratch) {
    switch (args.RHO_PAD) {
        case 32:
            return run<X, 32>(args, scratch);
        case 64:
            return run<X, 64>(args, scratch);
    }
    return int32_t(cudaErrorInvalidValue);
}

int32_t for_dtype(const Args& args, Scratch& scratch) {
    const int64_t limit = 0x7fffffff;
    if (args.M > limit || args.D > limit || args.layout.N > limit) return ADAMSS_TOO_LARGE;
    if (args.RHO + (args.bias && !args.dy) > args.RHO_PAD) return int32_t(cudaErrorInvalidValue);
    if (args.dtype == ADAMSS_CUDA_BFLOAT16) return for_rank<__nv_bfloat16>(args, scratch);
    if (args.dtype == ADAMSS_CUDA_FLOAT16) return for_rank<__half>(args, scratch);
    return int32_t(cudaErrorInvalidValue);
}

}  // namespace

int64_t adamss_cuda_fused_workspace(const adamss_cuda_fused_args* args) {
    Scratch scratch = {nullptr};
    for_dtype(*args, scratch);
    return scratch.used;
}

int32_t adamss_cuda_fused(const adamss_cuda_fused_args* args) {
    Scratch scratch = {static_cast<uint8_t*>(args->workspace)};
    return for_dtype(*args, scratch);
}
