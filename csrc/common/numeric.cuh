// Element types: conversions between fp32 registers and what lies in memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flash_ext {

template <typename Element>
__device__ __forceinline__ Element from_float(float x);
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }

// Two 16-bit elements in one register, `lo` at the lower address. One F2FP instruction.
template <typename Element>
__device__ __forceinline__ uint32_t pack(float lo, float hi);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float lo, float hi) {
  const __half2 h = __floats2half2_rn(lo, hi);
  return reinterpret_cast<const uint32_t&>(h);
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float lo, float hi) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
  return reinterpret_cast<const uint32_t&>(h);
}

// Negative ones as zeros; no more instructions.
template <typename Element>
__device__ __forceinline__ uint32_t pack_relu(float lo, float hi);
template <>
__device__ __forceinline__ uint32_t pack_relu<__half>(float lo, float hi) {
  uint32_t bits;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(hi), "f"(lo));
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack_relu<__nv_bfloat16>(float lo, float hi) {
  uint32_t bits;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(hi), "f"(lo));
  return bits;
}

// The reverse.
template <typename Element>
__device__ __forceinline__ float2 unpack(uint32_t bits);
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t bits) {
  return __half22float2(reinterpret_cast<const __half2&>(bits));
}
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t bits) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits));
}

// Two neighbouring elements in one store.
template <typename Element>
__device__ __forceinline__ void store_pair(Element* to, float lo, float hi) {
  *reinterpret_cast<uint32_t*>(to) = pack<Element>(lo, hi);
}
__device__ __forceinline__ void store_pair(float* to, float lo, float hi) {
  *reinterpret_cast<float2*>(to) = make_float2(lo, hi);
}

}  // namespace flash_ext
