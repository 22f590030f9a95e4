// Single-instruction transcendental functions. PTX ISA 9.7.3.
#pragma once

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

}  // namespace flash_ext::ptx
