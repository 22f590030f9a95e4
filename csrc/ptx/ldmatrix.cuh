// Fragment loads from shared memory. PTX ISA 9.7.14.5.15.
//
// One 8x8 matrix of 16-bit elements is eight rows of 16 bytes; lane i of the i-th group of eight
// lanes names row i%8 of matrix i/8. Afterwards lane l holds, of every matrix, the 32-bit word l%4
// of row l/4: two 16-bit elements, or one fp32 element of an 8x4 matrix.
#pragma once

#include <cstdint>

namespace flash_ext::ptx {

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(addr)
               : "memory");
}

// The same with every 8x8 matrix transposed: lane l holds elements 2(l%4), 2(l%4)+1 of column l/4.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(addr)
               : "memory");
}

__device__ __forceinline__ uint32_t ld_shared_b32(uint32_t addr) {
  uint32_t d;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(d) : "r"(addr) : "memory");
  return d;
}

__device__ __forceinline__ uint32_t ld_shared_u16(uint32_t addr) {
  uint32_t d;
  asm volatile("ld.shared.u16 %0, [%1];\n" : "=r"(d) : "r"(addr) : "memory");
  return d;
}

}  // namespace flash_ext::ptx
