// K minus the mean of the head's keys.
#pragma once

#include <type_traits>

#include "common/centred_keys.cuh"
#include "common/numeric.cuh"
#include "sm90/smem_tile.cuh"

namespace flash_ext::v3::backward {

// 64 rows, from row0 on, by a warpgroup. From these dQ = dS K is computed: exactly, a row of dS
// sums to 0 (or to dL, see the postprocess kernel); rounded it does not, and the remainder times a
// large mean of K is an error of 10 to 50% in dQ on biased keys.
template <typename KVTile>
__device__ __forceinline__ void centre_rows(KVTile& centred, const KVTile& keys,
                                            const float* key_mean, int row0) {
  using Element = typename KVTile::Element;
  using Pair = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;
  constexpr float kScale = kCentredKeyScale<Element>;
  const uint32_t scale_bits = pack<Element>(kScale, kScale);
  const Pair scale = reinterpret_cast<const Pair&>(scale_bits);
  const int thread_idx = threadIdx.x % 128;
#pragma unroll
  for (int slab = 0; slab < KVTile::kSlabs; ++slab) {
    const int col = slab * sm90::kSlabCols + thread_idx % 8 * 8;
    Pair minus_mean[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 mean = *reinterpret_cast<const float2*>(&key_mean[col + 2 * i]);
      const uint32_t bits = pack<Element>(-kScale * mean.x, -kScale * mean.y);
      minus_mean[i] = reinterpret_cast<const Pair&>(bits);
    }
#pragma unroll
    for (int row = 0; row < 64; row += 16) {
      const int offset = KVTile::chunk_offset(row0 + row + thread_idx / 8, col);
      uint4 bits = *reinterpret_cast<const uint4*>(keys.data + offset);
      auto* x = reinterpret_cast<Pair*>(&bits);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = __hfma2(x[i], scale, minus_mean[i]);
      *reinterpret_cast<uint4*>(centred.data + offset) = bits;
    }
  }
}

}  // namespace flash_ext::v3::backward
