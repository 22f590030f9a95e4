// Fragment stores to shared memory (Hopper), the inverse of ldmatrix. PTX ISA 9.7.14.5.16.
#pragma once

#include <cstdint>

namespace flash_ext::ptx {

// Four 8x8 matrices of 16-bit elements. Lane l holds, of every matrix, elements 2(l%4), 2(l%4)+1 of
// row l/4, and names row l%8 of matrix l/8: 16 bytes at `addr`.
__device__ __forceinline__ void stmatrix_x4(uint32_t addr, uint32_t m0, uint32_t m1, uint32_t m2,
                                            uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(addr),
               "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

// The same with every matrix transposed: lane l holds elements 2(l%4), 2(l%4)+1 of column l/4.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t addr, uint32_t m0, uint32_t m1,
                                                  uint32_t m2, uint32_t m3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(addr),
      "r"(m0), "r"(m1), "r"(m2), "r"(m3)
      : "memory");
}

}  // namespace flash_ext::ptx
