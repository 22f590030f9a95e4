// Thread blocks of a cluster and each other's shared memory (Hopper). PTX ISA 9.7.13.4, 9.7.9.25.4.
#pragma once

#include "ptx/mbarrier.cuh"

namespace flash_ext::ptx {

__device__ __forceinline__ int cluster_block_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

// All threads of the cluster that have not exited.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// The address of the same variable in the shared memory of another thread block of the cluster.
__device__ __forceinline__ uint32_t cluster_smem_addr(const void* ptr, int block_rank) {
  uint32_t addr;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n"
               : "=r"(addr)
               : "r"(smem_addr(ptr)), "r"(block_rank));
  return addr;
}

// Orders nothing: a release, at the scope of the cluster, would wait for all of the thread's
// additions to global memory.
__device__ __forceinline__ void mbarrier_arrive_cluster_relaxed(uint32_t bar) {
  asm volatile("mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];\n" ::"r"(bar)
               : "memory");
}

// Own to another thread block's shared memory; the bytes count towards the phase of its `bar`. Own
// writes by ordinary stores need fence_proxy_async() by their threads, and a barrier, before.
__device__ __forceinline__ void bulk_copy_cluster(uint32_t dst, const void* src, int bytes,
                                                  uint32_t bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];\n" ::"r"(dst),
      "r"(smem_addr(src)), "r"(bytes), "r"(bar)
      : "memory");
}

}  // namespace flash_ext::ptx
