// Instructions of sm_90a that CUDA C++ has no names for: barriers in shared memory, bulk tensor copies, wgmma.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ADAMSS_HOPPER 1
#endif

namespace adamss::hopper {

#ifdef ADAMSS_HOPPER

__device__ inline uint32_t address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// --- barriers -------------------------------------------------------------------------------------------------------

__device__ inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals));
}

__device__ inline void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;"); }

// Arrives, and announces `bytes` that copies will deliver before the phase ends.
__device__ inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes));
}

// Arrives at the barrier at the same place in block `rank` of the cluster.
__device__ inline void barrier_arrive(uint64_t* barrier, uint32_t rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(address(barrier)),
        "r"(rank));
}

__device__ inline void barrier_wait(uint64_t* barrier, uint32_t phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(address(barrier)),
        "r"(phase)
        : "memory");
}

__device__ inline uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// --- bulk tensor copies ---------------------------------------------------------------------------------------------

// Copies the box at column c0 and row c1 to shared memory; its bytes count on `barrier`.
__device__ inline void copy_in(void* to, const CUtensorMap* map, int32_t c0, int32_t c1, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            address(to)),
        "l"(map), "r"(c0), "r"(c1), "r"(address(barrier))
        : "memory");
}

// The same to every block of the cluster in `mask`, each at the same place and on its own barrier.
__device__ inline void copy_in_to_all(void* to, const CUtensorMap* map, int32_t c0, int32_t c1, uint64_t* barrier,
                                      uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(address(to)),
        "l"(map), "r"(c0), "r"(c1), "r"(address(barrier)), "h"(mask)
        : "memory");
}

// Makes ordinary writes to shared memory visible to copies and wgmma.
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void prefetch(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// --- wgmma ----------------------------------------------------------------------------------------------------------

// Where an operand lies, in tiles of 128 bytes a row with 128-byte swizzle. Eight rows follow one another every
// `stride` bytes; where rows run along the sum, the next 64 columns come `leading` bytes later.
__device__ inline uint64_t operand(const void* p, uint32_t leading, uint32_t stride) {
    return uint64_t((address(p) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
           uint64_t(1) << 62;
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

template <int REGISTERS>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

__device__ inline uint32_t pack(float low, float high, const __nv_bfloat16*) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
}
__device__ inline uint32_t pack(float low, float high, const __half*) {
    const __half2 both = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(both);
}

// Loads four 8 x 8 matrices of 16-bit values, 16 bytes a row; lanes 8 i to 8 i + 7 hold the addresses of matrix i.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address(from))
                 : "memory");
}

// Stores four 8 x 8 matrices of 16-bit values, 16 bytes a row; lanes 8 i to 8 i + 7 hold the addresses of matrix i.
__device__ inline void store_matrices(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address(to)), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

#endif  // ADAMSS_HOPPER

}  // namespace adamss::hopper
