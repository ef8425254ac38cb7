// Y = L R + (L U^T + u) V on sm_90a: the frozen product and the low-rank update in one pass, forward and for dx.
#pragma once

#include "arithmetic.h"
#include "wgmma.h"

namespace adamss {

// Forward: L = x, R = W^T, U = Q, u = q, V = C^T; dx: L = dy, R = W, U = C^T, V = Q. The inner product is S, or dS.
template <class X>
struct LowRankGemm {
    int64_t M;
    int32_t E, F;     // the sum runs over E; Y is (M, F)
    int32_t RHO;      // columns of the inner product that are written
    int32_t tiles_n;  // across Y
    int32_t pairs;    // of tiles along M
    int32_t run;      // tiles across Y that share one inner product
    int32_t group;    // pairs that run side by side, for reuse of R in the L2 cache
    const float* u;   // (RHO_PAD,) or null
    float* inner;     // (M, RHO) or null
    X* inner_padded;  // (M, RHO_PAD) or null
    X* Y;             // (M, F)
};

// What a loop is told at compile time.
struct Yes {
    static constexpr bool value = true;
};
struct No {
    static constexpr bool value = false;
};

constexpr int TILE_M = 128;      // rows of Y: two warpgroups of 64
constexpr int TILE_E = 64;       // a step of the sum: 128 bytes a row, the width of the swizzle
constexpr int CLUSTER = 2;       // blocks, one above the other, that share R
constexpr int SHARED_SM90 = 232448;
constexpr int BOX = 64 * 128;    // bytes of 64 rows of 128 bytes
constexpr int STAGING = 8 * 16 * 128;  // of 8 warps: 16 rows of 128 bytes each

template <int TILE_N, int RHO_PAD>
struct Stages {
    static constexpr int L = TILE_M * 128, R = TILE_N * 128, U = RHO_PAD * 128;
    static constexpr int bytes = L + R + U;
    static constexpr int barriers = 128;
    static constexpr int count = (SHARED_SM90 - barriers - STAGING) / bytes;
    static constexpr int shared = count * bytes + STAGING + barriers;
    static_assert(count >= 4, "a stage that is released comes back two steps later, sometimes three");
};

// Older GPUs have no clusters, and their compilers no word for them; there the kernels are empty.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define ADAMSS_IN_CLUSTERS
#else
#define ADAMSS_IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#endif

constexpr int LOW_RANK_GEMM_THREADS = 384;  // a warpgroup that copies, two that multiply

// Y (M, F) = L (M, E) R + (L U^T + u) V with U (RHO_PAD, E), V (RHO_PAD, F); R is W^T of W (F, E) where COLUMNS is
// false, W (E, F) itself where it is true.
//
// A unit of work is `run` tiles of one pair of row blocks: the first also sums L U^T, the others reuse it from
// registers. Blocks of a cluster take one row block each, and each loads half of R for both.
template <class X, int TILE_N, int RHO_PAD, bool COLUMNS>
__global__ void ADAMSS_IN_CLUSTERS __launch_bounds__(LOW_RANK_GEMM_THREADS, 1)
    low_rank_gemm_kernel(const __grid_constant__ CUtensorMap L_map, const __grid_constant__ CUtensorMap R_map,
                         const __grid_constant__ CUtensorMap U_map, const __grid_constant__ CUtensorMap V_map,
                         const LowRankGemm<X> p) {
#ifdef ADAMSS_HOPPER
    using namespace hopper;
    using Ring = Stages<TILE_N, RHO_PAD>;
    constexpr int COUNT = Ring::count, BOXES = TILE_N / 64;
    extern __shared__ __align__(1024) uint8_t stages[];  // the swizzle repeats every 1024 bytes
    uint8_t* const staging = stages + COUNT * Ring::bytes;
    uint64_t* const full = reinterpret_cast<uint64_t*>(staging + STAGING);
    uint64_t* const empty = full + COUNT;
    const int warpgroup = threadIdx.x / 128, rank = int(cluster_rank());
    if (threadIdx.x == 0) {
        for (int s = 0; s < COUNT; ++s) {
            barrier_init(full + s, 1);
            barrier_init(empty + s, 2 * CLUSTER);  // both warpgroups of every block that R is copied to
        }
        barrier_init_done();
    }
    cluster_sync();

    const int clusters = gridDim.x / CLUSTER, chunks = (p.tiles_n + p.run - 1) / p.run;
    const int units = p.pairs * chunks, steps = (p.E + TILE_E - 1) / TILE_E;
    int stage = 0;
    uint32_t phase = 0;
    const auto next_stage = [&] {
        if (++stage == COUNT) stage = 0, phase ^= 1;
    };
    const auto unit_of = [&](int unit, int& pair, int& chunk) {
        const int base = unit / (p.group * chunks) * p.group, left = p.pairs - base;
        const int high = left < p.group ? left : p.group, rest = unit - base * chunks;
        pair = base + rest % high, chunk = rest / high;
    };

    if (warpgroup == 0) {
        give_registers<40>();
        if (threadIdx.x == 0) {
            prefetch(&L_map), prefetch(&R_map), prefetch(&U_map), prefetch(&V_map);
            bool waited = false;
            for (int unit = blockIdx.x / CLUSTER; unit < units; unit += clusters) {
                int pair, chunk;
                unit_of(unit, pair, chunk);
                const int m = (pair * CLUSTER + rank) * TILE_M, first = chunk * p.run;
                const int last = first + p.run < p.tiles_n ? first + p.run : p.tiles_n;
                for (int tile = first; tile < last; ++tile) {
                    const int n = tile * TILE_N;
                    for (int k = 0; k < steps; ++k) {
                        uint8_t* const to = stages + stage * Ring::bytes;
                        barrier_wait(empty + stage, phase ^ 1);
                        barrier_expect(full + stage, Ring::L + Ring::R + (tile == first ? Ring::U : 0));
                        copy_in(to, &L_map, k * TILE_E, m, full + stage);
                        if (COLUMNS) {
#pragma unroll
                            for (int b = rank * BOXES / 2; b < (rank + 1) * BOXES / 2; ++b)
                                copy_in_to_all(to + Ring::L + b * BOX, &R_map, n + 64 * b, k * TILE_E, full + stage, 3);
                        } else {
                            copy_in_to_all(to + Ring::L + rank * (Ring::R / 2), &R_map, k * TILE_E,
                                           n + rank * (TILE_N / 2), full + stage, 3);
                        }
                        if (tile == first) {
                            if (!waited) ADAMSS_WAIT_FOR_PREVIOUS_KERNEL;  // which writes U, u and V
                            waited = true;
                            copy_in(to + Ring::L + Ring::R, &U_map, k * TILE_E, 0, full + stage);
                        }
                        next_stage();
                    }
                    // One more step of the sum, whose left operand is the inner product and whose right one is V.
                    uint8_t* const to = stages + stage * Ring::bytes + Ring::L;
                    barrier_wait(empty + stage, phase ^ 1);
                    barrier_expect(full + stage, RHO_PAD * TILE_N * 2);
#pragma unroll
                    for (int b = 0; b < BOXES; ++b)
                        copy_in(to + b * RHO_PAD * 128, &V_map, n + 64 * b, 0, full + stage);
                    next_stage();
                }
            }
        }
    } else {
        take_registers<232>();
        const int wg = warpgroup - 1, t = threadIdx.x % 128, warp = t / 32, lane = t % 32;
        uint8_t* const staged = staging + (4 * wg + warp) * 16 * 128;
        float y[TILE_N / 2];
        uint32_t inner[RHO_PAD / 4];
        const auto release = [&](int s) {
            if (t < CLUSTER) barrier_arrive(empty + s, uint32_t(t));
        };
        // The row, of the warp's 16, and half of 16 columns whose address this lane gives for the warp's matrices.
        const int matrix_row = lane % 16, half = lane / 16;
        // One tile's sum over E, its last step still under way.
        const auto sum = [&](auto with_inner, float(&S)[RHO_PAD / 2]) {
            int previous = 0;
            for (int k = 0; k < steps; ++k) {
                const uint8_t* const from = stages + stage * Ring::bytes;
                const uint64_t L = operand(from + wg * BOX, 0, 1024);
                const uint64_t R = operand(from + Ring::L, BOX, 1024);
                const uint64_t U = operand(from + Ring::L + Ring::R, 0, 1024);
                barrier_wait(full + stage, phase);
                wgmma_fence();
#pragma unroll
                for (int e = 0; e < 4; ++e)  // 16 columns: 32 bytes of a row, or 16 rows of 128 bytes
                    Wgmma<X, TILE_N, COLUMNS>::shared(y, L + 2 * e, R + (COLUMNS ? 128 : 2) * e, k | e);
                wgmma_commit();
                if (k > 0) {
                    wgmma_wait<1>();
                    release(previous);
                }
                if constexpr (decltype(with_inner)::value) {
                    // From registers: a product this narrow takes less time than its left operand from shared memory.
                    uint32_t rows[4][4];
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        load_matrices(rows[e], from + wg * BOX + (16 * warp + matrix_row) * 128 +
                                                   ((2 * e + half) ^ (lane % 8)) * 16);
                    wgmma_fence();
#pragma unroll
                    for (int e = 0; e < 4; ++e) Wgmma<X, RHO_PAD, false>::registers(S, rows[e], U + 2 * e, k | e);
                    wgmma_commit();
                }
                previous = stage;
                next_stage();
            }
            return previous;
        };
        for (int unit = blockIdx.x / CLUSTER; unit < units; unit += clusters) {
            int pair, chunk;
            unit_of(unit, pair, chunk);
            const int m = (pair * CLUSTER + rank) * TILE_M + 64 * wg, first = chunk * p.run;
            const int last = first + p.run < p.tiles_n ? first + p.run : p.tiles_n;
            for (int tile = first; tile < last; ++tile) {
                const int n = tile * TILE_N;
                float S[RHO_PAD / 2];
                int previous;
                if (tile == first) {
                    previous = sum(Yes(), S);
                    wgmma_wait<0>();
                    release(previous);
                    ADAMSS_WAIT_FOR_PREVIOUS_KERNEL;
                    const int64_t row = int64_t(m) + 16 * warp + lane / 4;
#pragma unroll
                    for (int j = 0; j < RHO_PAD / 8; ++j) {
                        const int c = 8 * j + 2 * (lane % 4);
                        const float2 u = p.u ? *reinterpret_cast<const float2*>(p.u + c) : float2{0, 0};
#pragma unroll
                        for (int v = 0; v < 4; ++v) S[4 * j + v] += v % 2 ? u.y : u.x;
                        inner[2 * j] = pack(S[4 * j], S[4 * j + 1], static_cast<const X*>(nullptr));
                        inner[2 * j + 1] = pack(S[4 * j + 2], S[4 * j + 3], static_cast<const X*>(nullptr));
                        if (chunk > 0) continue;
#pragma unroll
                        for (int v = 0; v < 4; ++v) {
                            const int64_t at = row + 8 * (v / 2);
                            if (at >= p.M) continue;
                            if (p.inner && c + v % 2 < p.RHO) p.inner[at * p.RHO + c + v % 2] = S[4 * j + v];
                            if (p.inner_padded && v % 2 == 0)
                                *reinterpret_cast<uint32_t*>(p.inner_padded + at * RHO_PAD + c) = inner[2 * j + v / 2];
                        }
                    }
                } else {
                    previous = sum(No(), S);
                }
                barrier_wait(full + stage, phase);
                wgmma_fence();
                const uint64_t V = operand(stages + stage * Ring::bytes + Ring::L, RHO_PAD * 128, 1024);
#pragma unroll
                for (int c = 0; c < RHO_PAD / 16; ++c)
                    Wgmma<X, TILE_N, true>::registers(y, inner + 4 * c, V + 128 * c, 1);
                wgmma_commit();
                if (tile != first) {
                    wgmma_wait<1>();
                    release(previous);
                }
                wgmma_wait<0>();
                release(stage);
                next_stage();

                // Through shared memory, 64 columns at a time, so that 8 lanes write 128 bytes of a row.
                const int64_t row = int64_t(m) + 16 * warp + lane / 8;
                const int column = n + lane % 8 * 8, rows = int(p.M - row < 16 ? p.M - row : 16);
                X* to = p.Y + row * p.F + column;
#pragma unroll
                for (int box = 0; box < BOXES; ++box) {
                    __syncwarp();
#pragma unroll
                    for (int j = 0; j < 8; j += 2) {
                        const float* const v = y + 32 * box + 4 * j;
                        const X* const as = nullptr;
                        store_matrices(staged + matrix_row * 128 + (((j + half) ^ lane) % 8) * 16, pack(v[0], v[1], as),
                                       pack(v[2], v[3], as), pack(v[4], v[5], as), pack(v[6], v[7], as));
                    }
                    __syncwarp();
                    X* at = to + 64 * box;
#pragma unroll
                    for (int r = 0; r < 16; r += 4) {
                        const uint4 eight = *reinterpret_cast<const uint4*>(
                            staged + (lane / 8 + r) * 128 + ((lane ^ (lane / 8 + r)) % 8) * 16);
                        if (r < rows && column + 64 * box < p.F) *reinterpret_cast<uint4*>(at) = eight;
                        at += 4 * int64_t(p.F);
                    }
                }
            }
        }
    }
    cluster_sync();  // no block leaves while another still copies to it or arrives at its barriers
#endif
}

}  // namespace adamss
