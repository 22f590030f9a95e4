// Barriers in shared memory that threads and asynchronous copies arrive at: cp.async from Ampere
// on, TMA on Hopper. PTX ISA 9.7.13.15.
//
// A barrier is in a phase, of parity 0 at first, that completes when the expected arrivals and the
// expected bytes are in; then the next phase begins with the same count.
#pragma once

#include <cstdint>

#include "ptx/smem_addr.cuh"

namespace flash_ext::ptx {

struct alignas(8) Mbarrier {
  uint64_t state;
};

// By one thread; others may use the barrier after mbarrier_init_fence() and a __syncthreads().
__device__ __forceinline__ void mbarrier_init(Mbarrier& bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(smem_addr(&bar)), "r"(arrivals)
               : "memory");
}

// Makes the barriers that this thread initialised visible to TMA.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier& bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(smem_addr(&bar)) : "memory");
}

// Arrives, and makes the phase wait for `bytes` that TMA copies will bring.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(Mbarrier& bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(smem_addr(&bar)),
               "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity has completed. A fresh barrier counts as having completed a
// phase of parity 1.
__device__ __forceinline__ void mbarrier_wait(Mbarrier& bar, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n"
      "}\n" ::"r"(smem_addr(&bar)),
      "r"(parity)
      : "memory");
#else  // Ampere's does not suspend the thread
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n"
      "}\n" ::"r"(smem_addr(&bar)),
      "r"(parity)
      : "memory");
#endif
}

}  // namespace flash_ext::ptx
