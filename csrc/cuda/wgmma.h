// wgmma by width: D (64, N) += A (64, 16) B (16, N), float32 D in registers. Mechanical: one instruction, many names.
//
// Of thread t of a warpgroup, D[4 j + v] is row 16 (t / 32) + (t % 32) / 4 + 8 (v / 2), column 8 j + 2 (t % 4) + v % 2.
// A in registers is packed in the same places: a[0] and a[2] the upper eight rows, a[1] and a[3] the lower.
#pragma once

#include "hopper.h"

namespace adamss::hopper {

#ifdef ADAMSS_HOPPER

// clang-format off
#define ADAMSS_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ADAMSS_F8(d, i) ADAMSS_F4(d, i), ADAMSS_F4(d, i + 4)
#define ADAMSS_F16(d, i) ADAMSS_F8(d, i), ADAMSS_F8(d, i + 8)
#define ADAMSS_F32(d, i) ADAMSS_F16(d, i), ADAMSS_F16(d, i + 16)
#define ADAMSS_F64(d, i) ADAMSS_F32(d, i), ADAMSS_F32(d, i + 32)
#define ADAMSS_F96(d, i) ADAMSS_F64(d, i), ADAMSS_F32(d, i + 64)
#define ADAMSS_F128(d, i) ADAMSS_F64(d, i), ADAMSS_F64(d, i + 64)

#define ADAMSS_D16 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define ADAMSS_D32 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define ADAMSS_D96 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
    "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
    "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
    "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}"
#define ADAMSS_D128 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
    "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
    "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
    "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, " \
    "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
    "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

// A from shared memory. `accumulate` 0 starts from zero. COLUMNS: in memory B is (16, N), not (N, 16);
// TRANSPOSED: A is (16, 64), not (64, 16).
template <class X, int N, bool COLUMNS>
struct Wgmma;

#define ADAMSS_WGMMA(TYPE, NAME, N, REGISTERS, NEXT0, NEXT1, NEXT2, NEXT3, NEXT4, NEXT5, NEXT6) \
    template <bool COLUMNS> \
    struct Wgmma<TYPE, N, COLUMNS> { \
        template <bool TRANSPOSED = false> \
        static __device__ inline void shared(float (&d)[REGISTERS], uint64_t a, uint64_t b, int accumulate) { \
            asm volatile( \
                "{\n.reg .pred p;\nsetp.ne.b32 p, " NEXT2 ", 0;\n" \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " " ADAMSS_D##REGISTERS ", " NEXT0 \
                ", " NEXT1 ", p, 1, 1, " NEXT3 ", " NEXT4 ";\n}" \
                : ADAMSS_F##REGISTERS(d, 0) \
                : "l"(a), "l"(b), "r"(accumulate), "n"(int(TRANSPOSED)), "n"(int(COLUMNS))); \
        } \
        static __device__ inline void registers(float (&d)[REGISTERS], const uint32_t* a, uint64_t b, \
                                                int accumulate) { \
            asm volatile( \
                "{\n.reg .pred p;\nsetp.ne.b32 p, " NEXT5 ", 0;\n" \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " " ADAMSS_D##REGISTERS ", {" NEXT0 \
                ", " NEXT1 ", " NEXT2 ", " NEXT3 "}, " NEXT4 ", p, 1, 1, " NEXT6 ";\n}" \
                : ADAMSS_F##REGISTERS(d, 0) \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int(COLUMNS))); \
        } \
    };

ADAMSS_WGMMA(__nv_bfloat16, "bf16", 32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
ADAMSS_WGMMA(__half, "f16", 32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
ADAMSS_WGMMA(__nv_bfloat16, "bf16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
ADAMSS_WGMMA(__half, "f16", 64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
ADAMSS_WGMMA(__nv_bfloat16, "bf16", 192, 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
ADAMSS_WGMMA(__half, "f16", 192, 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
ADAMSS_WGMMA(__nv_bfloat16, "bf16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
ADAMSS_WGMMA(__half, "f16", 256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#endif  // ADAMSS_HOPPER

}  // namespace adamss::hopper
