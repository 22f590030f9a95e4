// Arithmetic that C++ has no name for. PTX ISA 9.7.1 and 9.7.3.
#pragma once

#include <cstdint>

namespace flash_ext::ptx {

// 2^x to 2 ulp; 2^-inf = 0. Subnormal results are flushed: they are below any visible weight.
__device__ __forceinline__ float exp2_approx(float x) {
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(d) : "f"(x));
  return d;
}

// 1 / x to 1 ulp.
__device__ __forceinline__ float rcp_approx(float x) {
  float d;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(d) : "f"(x));
  return d;
}

// The largest of x and the bits of a and b, as unsigned or signed numbers: one instruction, where
// fmaxf() takes two. Volatile, as a and b may be accumulators of wgmma: their bits are otherwise
// read before the wait.
__device__ __forceinline__ uint32_t max_of_bits(uint32_t x, float a, float b) {
  uint32_t d;
  asm volatile(
      "{.reg .b32 a, b;\n mov.b32 a, %2;\n mov.b32 b, %3;\n max.u32 a, a, b;\n"
      " max.u32 %0, %1, a;}\n"
      : "=r"(d)
      : "r"(x), "f"(a), "f"(b));
  return d;
}

__device__ __forceinline__ int32_t max_of_bits(int32_t x, float a, float b) {
  int32_t d;
  asm volatile(
      "{.reg .b32 a, b;\n mov.b32 a, %2;\n mov.b32 b, %3;\n max.s32 a, a, b;\n"
      " max.s32 %0, %1, a;}\n"
      : "=r"(d)
      : "r"(x), "f"(a), "f"(b));
  return d;
}

}  // namespace flash_ext::ptx
