// Warpgroup matrix multiply-accumulate with fp32 accumulators (Hopper). PTX ISA 9.7.15.
//
// Four warps multiply a 64 x 16 A with a 16 x N B. The instructions run asynchronously: fence, any
// number of products, commit, and much later the wait. In between nobody may touch the accumulators
// or the registers of A.
// Accumulator d[j][i] of lane l of warp w (g = l / 4, t = l % 4): column 8j + 2t + i % 2 of row
// 16w + g (i < 2) or 16w + g + 8: the map of mma.m16n8k16, one tile of eight columns after another.
// A in registers holds 16 columns of such an accumulator, packed in pairs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flash_ext::ptx {

// Orders earlier accesses to the registers of the wgmmas that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most kPending of this warp's groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// A finished accumulator as an ordinary register, which may be read while later products run: for
// the accumulator itself ptxas would wait until they have ended.
__device__ __forceinline__ float wgmma_detach(float acc) {
  float copy;
  asm volatile("mov.f32 %0, %1;\n" : "=f"(copy) : "f"(acc));
  return copy;
}

// In which direction the elements of an operand are contiguous in shared memory.
enum class Major : int { kK = 0, kMN = 1 };

// d = A B, or d += A B where `accumulates`; B in shared memory, A there (ss) or in registers (rs).
// The 64-bit descriptors of shared-memory operands come from sm90/smem_tile.cuh.
template <typename Element, int kN>
struct Wgmma;

// clang-format off
// Inline assembly takes operand numbers as literals only, and numbers the N / 2 accumulators first:
// lists of them, and for each N the numbers of the operands that follow.
#define R0_31 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R32_47 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define R48_63 \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define R64_95 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define R96_127 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127"
#define R64 R0_31
#define R96 R64 ", " R32_47
#define R128 R96 ", " R48_63
#define R192 R128 ", " R64_95
#define R256 R192 ", " R96_127

#define D1(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define D4(j) D1(j), D1(j + 1), D1(j + 2), D1(j + 3)
#define D8(j) D4(j), D4(j + 4)
#define D64 D8(0)
#define D96 D64, D4(8)
#define D128 D64, D8(8)
#define D192 D128, D8(16)
#define D256 D192, D8(24)

#define WGMMA(Element, type, N, O0, O1, O2, O3, O4, O5, O6)                                     \
  template <>                                                                                   \
  struct Wgmma<Element, N> {                                                                    \
    template <Major kMajorA, Major kMajorB>                                                     \
    static __device__ __forceinline__ void ss(float (&d)[N / 8][4], uint64_t a, uint64_t b,     \
                                              bool accumulates) {                               \
      asm volatile("{.reg .pred p; setp.ne.b32 p, " O2 ", 0;\n"                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" R##N    \
                   "}, " O0 ", " O1 ", p, 1, 1, " O3 ", " O4 ";}\n"                             \
                   : D##N                                                                       \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulates)),                        \
                     "n"(static_cast<int>(kMajorA)), "n"(static_cast<int>(kMajorB)));           \
    }                                                                                           \
    template <Major kMajorB>                                                                    \
    static __device__ __forceinline__ void rs(float (&d)[N / 8][4], const uint32_t (&a)[4],     \
                                              uint64_t b, bool accumulates) {                   \
      asm volatile("{.reg .pred p; setp.ne.b32 p, " O5 ", 0;\n"                                 \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" R##N    \
                   "}, {" O0 ", " O1 ", " O2 ", " O3 "}, " O4 ", p, 1, 1, " O6 ";}\n"           \
                   : D##N                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                        \
                     "r"(static_cast<int>(accumulates)), "n"(static_cast<int>(kMajorB)));       \
    }                                                                                           \
  };
#define WGMMA_TYPES(...)              \
  WGMMA(__half, "f16", __VA_ARGS__)   \
  WGMMA(__nv_bfloat16, "bf16", __VA_ARGS__)

WGMMA_TYPES(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
WGMMA_TYPES(96, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
WGMMA_TYPES(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
WGMMA_TYPES(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
WGMMA_TYPES(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#undef WGMMA_TYPES
#undef WGMMA
#undef D256
#undef D192
#undef D128
#undef D96
#undef D64
#undef D8
#undef D4
#undef D1
#undef R256
#undef R192
#undef R128
#undef R96
#undef R64
#undef R96_127
#undef R64_95
#undef R48_63
#undef R32_47
#undef R0_31
// clang-format on

}  // namespace flash_ext::ptx
