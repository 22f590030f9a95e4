// Shared memory as instructions address it.
#pragma once

#include <cstdint>

namespace flash_ext::ptx {

// A 32-bit shared-memory address, the form every instruction on shared memory takes.
__device__ __forceinline__ uint32_t smem_addr(const void* ptr) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(ptr));
}

}  // namespace flash_ext::ptx
