// Copies of contiguous bytes by the Tensor Memory Accelerator (Hopper). PTX ISA 9.7.9.25.4.
// Addresses and sizes are multiples of 16 bytes.
#pragma once

#include "ptx/mbarrier.cuh"

namespace flash_ext::ptx {

// Global to shared memory; the bytes count towards the phase of `bar`.
__device__ __forceinline__ void bulk_load(void* dst, const void* src, int bytes, Mbarrier& bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];\n" ::"r"(smem_addr(dst)),
      "l"(src), "r"(bytes), "r"(smem_addr(&bar))
      : "memory");
}

// Adds floats in shared memory to floats in global memory, in this thread's bulk group (see
// tma_store_4d() for what the source needs).
__device__ __forceinline__ void bulk_reduce_add(float* dst, const float* src, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n" ::"l"(dst),
      "r"(smem_addr(src)), "r"(bytes)
      : "memory");
}

// Until all this thread's committed copies have been written.
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory");
}

}  // namespace flash_ext::ptx
