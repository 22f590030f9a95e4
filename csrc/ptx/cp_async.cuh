// Asynchronous copies from global to shared memory (Ampere and later). PTX ISA 9.7.9.25.3.
// Wrappers that order memory carry a "memory" clobber; see the same rule in every file of ptx/.
#pragma once

#include <cstdint>

#include "ptx/smem_addr.cuh"

namespace flash_ext::ptx {

// Copies the first `src_bytes` (0..16) of 16 bytes and zero-fills the rest; with 0 bytes the source
// is not read. Both addresses are multiples of 16. `.cg` keeps streamed tiles out of L1.
__device__ __forceinline__ void cp_async_16B_zfill(uint32_t dst, const void* src, int src_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(dst), "l"(src),
               "r"(src_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most kPending of this thread's groups are in flight. Other threads' copies become
// visible only after a barrier that follows.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Arrives at an mbarrier, whose count includes it, once this thread's copies so far are complete.
// Orders those copies alone, no ordinary writes. PTX ISA 9.7.13.15.17.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint32_t bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(bar) : "memory");
}

}  // namespace flash_ext::ptx
