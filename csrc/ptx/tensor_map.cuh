// Tensor maps that the GPU itself writes (sm_90a). PTX ISA 9.7.9.28, 9.7.13.4.
//
// A map is changed in shared memory, published to global memory, and there acquired by every thread
// whose copies use it: TMA reads maps through a proxy, and a cache, of their own.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "ptx/smem_addr.cuh"

namespace flash_ext::ptx {

// Of a map in shared memory. Its address in global memory is a multiple of 16 bytes.
__device__ __forceinline__ void tensor_map_replace_address(CUtensorMap& map, const void* address) {
  asm volatile("tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%0], %1;\n" ::"r"(
                   smem_addr(&map)),
               "l"(address)
               : "memory");
}

// The size of dimension kDim, innermost first; at least 1.
template <int kDim>
__device__ __forceinline__ void tensor_map_replace_size(CUtensorMap& map, uint32_t size) {
  asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], %1, %2;\n" ::"r"(
                   smem_addr(&map)),
               "n"(kDim), "r"(size)
               : "memory");
}

// By a whole warp: copies a map from shared to global memory. Both lie at multiples of 128 bytes.
__device__ __forceinline__ void tensor_map_publish(CUtensorMap* to, const CUtensorMap& from) {
  asm volatile(
      "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned "
      "[%0], [%1], 128;\n" ::"l"(to),
      "r"(smem_addr(&from))
      : "memory");
}

// This thread's later copies see the map in global memory as it was published.
__device__ __forceinline__ void tensor_map_acquire(const CUtensorMap* map) {
  asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;\n" ::"l"(map) : "memory");
}

}  // namespace flash_ext::ptx
