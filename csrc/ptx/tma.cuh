// Tensor copies by the Tensor Memory Accelerator (Hopper). PTX ISA 9.7.9.27. One thread issues a
// copy of a whole box; coordinates count elements, innermost first. What lies outside the tensor is
// read as zero and never written.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "ptx/mbarrier.cuh"

namespace flash_ext::ptx {

// Global to shared memory; the bytes count towards the phase of `bar`.
__device__ __forceinline__ void tma_load_4d(void* dst, const CUtensorMap& map, Mbarrier& bar,
                                            int x0, int x1, int x2, int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(smem_addr(dst)),
      "l"(&map), "r"(smem_addr(&bar)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

// Shared to global memory, in this thread's bulk group. Writes to the source by ordinary stores
// need fence_proxy_async() by their threads, and a barrier, before.
__device__ __forceinline__ void tma_store_4d(const CUtensorMap& map, const void* src, int x0,
                                             int x1, int x2, int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], "
      "[%1];\n" ::"l"(&map),
      "r"(smem_addr(src)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
}

__device__ __forceinline__ void tma_store_commit_group() {
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}

// Until the sources of all this thread's committed stores have been read.
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;\n" ::: "memory");
}

// Orders this thread's ordinary accesses to shared memory before later TMA and wgmma accesses.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// The same for global memory, too, and in both directions.
__device__ __forceinline__ void fence_proxy_async_all() {
  asm volatile("fence.proxy.async;\n" ::: "memory");
}

}  // namespace flash_ext::ptx
