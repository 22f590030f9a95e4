// Fire-and-forget additions to global memory. PTX ISA 9.7.13.15.
#pragma once

namespace flash_ext::ptx {

// Adds four consecutive floats at a 16-byte aligned address. Hopper has one instruction for it.
__device__ __forceinline__ void red_add_v4(float* addr, float x, float y, float z, float w) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(addr), "f"(x), "f"(y),
               "f"(z), "f"(w)
               : "memory");
#else
  asm volatile("red.global.add.f32 [%0], %1;\n" ::"l"(addr), "f"(x) : "memory");
  asm volatile("red.global.add.f32 [%0], %1;\n" ::"l"(addr + 1), "f"(y) : "memory");
  asm volatile("red.global.add.f32 [%0], %1;\n" ::"l"(addr + 2), "f"(z) : "memory");
  asm volatile("red.global.add.f32 [%0], %1;\n" ::"l"(addr + 3), "f"(w) : "memory");
#endif
}

// Hopper.
__device__ __forceinline__ void red_add_v2(float* addr, float x, float y) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};\n" ::"l"(addr), "f"(x), "f"(y) : "memory");
}

__device__ __forceinline__ void red_add(float* addr, float x) {
  asm volatile("red.global.add.f32 [%0], %1;\n" ::"l"(addr), "f"(x) : "memory");
}

}  // namespace flash_ext::ptx
