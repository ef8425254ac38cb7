// dC^T = S^T dy and dB = dS^T P, or dS^T x, on sm_90a: sums over tokens, read once, in parts that are added afterwards.
#pragma once

#include "low_rank_gemm.h"

namespace adamss {

// One of the two products: parts[t] (Z, RHO_PAD) = z^T s over the tokens of split t; z (M, Z), s (M, RHO_PAD).
struct TokenProduct {
    int32_t Z, blocks;  // of TOKEN_COLUMNS columns
    float* parts;       // (splits, Z, RHO_PAD)
    float* sums;        // (splits, RHO_PAD): the sum of s over tokens, or null
};

struct TokenProducts {
    int64_t M;
    int32_t splits, width;  // tokens of a split, a multiple of TOKEN_ROWS
    TokenProduct of_dy, of_z;
};

constexpr int TOKEN_COLUMNS = 256;  // of z in one block: two warpgroups, two times 64
constexpr int TOKEN_ROWS = 64;      // a step of the sum
constexpr int TOKEN_STAGES = 5;
constexpr int TOKEN_THREADS = 384;
constexpr int TOKEN_STAGE = (TOKEN_COLUMNS / 64 + 1) * BOX;  // z, then s
constexpr int TOKEN_SHARED = TOKEN_STAGES * TOKEN_STAGE + BOX + 128;

template <class X>
__device__ X one();
template <>
__device__ inline __nv_bfloat16 one() {
    return __float2bfloat16_rn(1.f);
}
template <>
__device__ inline __half one() {
    return __float2half_rn(1.f);
}

// Blocks of dy come first, splits of a block side by side.
template <class X, int RHO_PAD>
__global__ void __launch_bounds__(TOKEN_THREADS, 1)
    token_products_kernel(const __grid_constant__ CUtensorMap dy_map, const __grid_constant__ CUtensorMap S_map,
                          const __grid_constant__ CUtensorMap z_map, const __grid_constant__ CUtensorMap dS_map,
                          const TokenProducts p) {
#ifdef ADAMSS_HOPPER
    using namespace hopper;
    extern __shared__ __align__(1024) uint8_t stages[];  // the swizzle repeats every 1024 bytes
    uint8_t* const ones = stages + TOKEN_STAGES * TOKEN_STAGE;
    uint64_t* const full = reinterpret_cast<uint64_t*>(ones + BOX);
    uint64_t* const empty = full + TOKEN_STAGES;
    const int warpgroup = threadIdx.x / 128, split = blockIdx.x % p.splits;
    int block = blockIdx.x / p.splits;
    const bool of_dy = block < p.of_dy.blocks;
    const int Z = of_dy ? p.of_dy.Z : p.of_z.Z;
    float* const parts = of_dy ? p.of_dy.parts : p.of_z.parts;
    float* const sums = of_dy ? p.of_dy.sums : p.of_z.sums;
    block -= of_dy ? 0 : p.of_dy.blocks;
    const int64_t begin = int64_t(split) * p.width, end = smaller(begin + p.width, p.M);
    const int steps = int((larger(end - begin, int64_t(0)) + TOKEN_ROWS - 1) / TOKEN_ROWS);
    if (threadIdx.x == 0) {
        for (int s = 0; s < TOKEN_STAGES; ++s) barrier_init(full + s, 1), barrier_init(empty + s, 2);
        barrier_init_done();
    }
    for (int e = threadIdx.x; e < BOX / 2; e += TOKEN_THREADS) reinterpret_cast<X*>(ones)[e] = one<X>();
    fence_async();
    __syncthreads();
    ADAMSS_WAIT_FOR_PREVIOUS_KERNEL;
    int stage = 0;
    uint32_t phase = 0;
    const auto next_stage = [&] {
        if (++stage == TOKEN_STAGES) stage = 0, phase ^= 1;
    };
    if (warpgroup == 0) {
        if (threadIdx.x == 0) {
            const CUtensorMap* const z = of_dy ? &dy_map : &z_map;
            const CUtensorMap* const s = of_dy ? &S_map : &dS_map;
            for (int k = 0; k < steps; ++k) {
                uint8_t* const to = stages + stage * TOKEN_STAGE;
                const int m = int(begin) + k * TOKEN_ROWS;
                barrier_wait(empty + stage, phase ^ 1);
                barrier_expect(full + stage, TOKEN_STAGE);
#pragma unroll
                for (int b = 0; b < TOKEN_COLUMNS / 64; ++b)
                    copy_in(to + b * BOX, z, block * TOKEN_COLUMNS + 64 * b, m, full + stage);
                copy_in(to + TOKEN_COLUMNS / 64 * BOX, s, 0, m, full + stage);
                next_stage();
            }
        }
        return;
    }
    const int wg = warpgroup - 1, t = threadIdx.x % 128, warp = t / 32, lane = t % 32;
    float total[2][RHO_PAD / 2], sum[RHO_PAD / 2];
    const auto add_up = [&](auto with_sum) {
        int previous = 0;
        for (int k = 0; k < steps; ++k) {
            const uint8_t* const from = stages + stage * TOKEN_STAGE;
            const uint64_t z = operand(from + 2 * wg * BOX, 0, 1024), u = operand(ones, 0, 1024);
            const uint64_t s = operand(from + TOKEN_COLUMNS / 64 * BOX, 0, 1024);
            barrier_wait(full + stage, phase);
            wgmma_fence();
#pragma unroll
            for (int e = 0; e < 4; ++e) {  // 16 tokens: 16 rows of 128 bytes
                using Product = Wgmma<X, RHO_PAD, true>;
                Product::template shared<true>(total[0], z + 128 * e, s + 128 * e, k | e);
                Product::template shared<true>(total[1], z + BOX / 16 + 128 * e, s + 128 * e, k | e);
                if constexpr (decltype(with_sum)::value)
                    Product::template shared<true>(sum, u + 128 * e, s + 128 * e, k | e);
            }
            wgmma_commit();
            if (k > 0) {
                wgmma_wait<1>();
                if (t == 0) barrier_arrive(empty + previous, 0);
            }
            previous = stage;
            next_stage();
        }
    };
    const bool with_sum = sums && block == 0 && wg == 0;
    if (with_sum)
        add_up(Yes());
    else
        add_up(No());
    wgmma_wait<0>();
#pragma unroll
    for (int g = 0; g < 2; ++g) {
#pragma unroll
        for (int j = 0; j < RHO_PAD / 8; ++j) {
#pragma unroll
            for (int v = 0; v < 4; v += 2) {
                const int column = block * TOKEN_COLUMNS + 128 * wg + 64 * g + 16 * warp + lane / 4 + 4 * v;
                if (column >= Z) continue;
                float* const to = parts + (int64_t(split) * Z + column) * RHO_PAD + 8 * j + 2 * (lane % 4);
                *reinterpret_cast<float2*>(to) = float2{total[g][4 * j + v], total[g][4 * j + v + 1]};
            }
        }
    }
    if (with_sum && t < 4) {
#pragma unroll
        for (int j = 0; j < RHO_PAD / 8; ++j)
            *reinterpret_cast<float2*>(sums + split * RHO_PAD + 8 * j + 2 * t) = float2{sum[4 * j], sum[4 * j + 1]};
    }
#endif
}

}  // namespace adamss
