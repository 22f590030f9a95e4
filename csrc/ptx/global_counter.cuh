// Counters in global memory by which thread blocks of a grid tell each other how far they are. PTX
// ISA 9.7.9.8, 9.7.13.15.
#pragma once

namespace flash_ext::ptx {

// What was written before the counter was raised to the value found is visible afterwards.
__device__ __forceinline__ int load_acquire(const int* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

__device__ __forceinline__ void add_release(int* counter, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;\n" ::"l"(counter), "r"(value) : "memory");
}

}  // namespace flash_ext::ptx
