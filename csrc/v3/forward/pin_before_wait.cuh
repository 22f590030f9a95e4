// Keeps arithmetic where it overlaps with the tensor cores.
#pragma once

#include "ptx/smem_addr.cuh"

namespace flash_ext::v3::forward {

// Keeps what `x` >= 0 depends on before the next wgmma wait. The wait is ordered against memory
// only, and ptxas moves it above any arithmetic that does not need its result.
__device__ __forceinline__ void pin_before_wait(float x, float* never_written) {
  asm volatile(
      "{.reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p st.shared.f32 [%1], %0;}\n" ::"f"(x),
      "r"(ptx::smem_addr(never_written))
      : "memory");
}

}  // namespace flash_ext::v3::forward
