// The order in which thread blocks take the tiles of all heads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda_check.h"
#include "common/divisor.cuh"

namespace flash_ext {

// Heads are cut into sections. A section's tiles come by their rank in the head, the longest first;
// the heads of a rank side by side.
class TileOrder {
 public:
  struct Place {
    int rank;
    int head;
  };

  TileOrder() = default;
  TileOrder(int64_t tiles_per_head, int64_t num_heads, int64_t heads_per_section)
      : tiles_per_head_(static_cast<int>(tiles_per_head)),
        num_heads_(static_cast<int>(num_heads)),
        section_tiles_(heads_per_section * tiles_per_head),
        section_heads_(heads_per_section),
        last_section_heads_(num_heads - (num_heads - 1) / heads_per_section * heads_per_section) {}

  __device__ __forceinline__ int tiles_per_head() const { return tiles_per_head_; }
  __device__ __forceinline__ int num_heads() const { return num_heads_; }

  __device__ __forceinline__ Place place(int index) const {
    const int section = index / section_tiles_;
    const int in_section = index - section * section_tiles_;
    const int first_head = section * section_heads_;
    const bool is_last = first_head + last_section_heads_ == num_heads_;
    const Divisor heads = is_last ? last_section_heads_ : section_heads_;
    const int rank = in_section / heads;
    return {rank, first_head + in_section - rank * heads};
  }

 private:
  int tiles_per_head_ = 0;
  int num_heads_ = 0;
  Divisor section_tiles_, section_heads_, last_section_heads_;
};

// For a grid of one thread block a tile, which the GPU starts in this order. Causal tiles differ in
// length: with one head to a section the last head's long ones start late, and most of the GPU
// waits for them. Sections as large as L2 holds (`head_bytes` of a head are read by several tiles)
// leave the end to short tiles. Others are of one length, and one head at a time is best for L2.
inline TileOrder tile_order(const AttentionShape& shape, bool is_causal, int64_t tiles_per_head,
                            int64_t num_heads, int64_t head_bytes) {
  if (!is_causal || num_heads < 2) return TileOrder(tiles_per_head, num_heads, 1);
  const int64_t section_bytes = device_attribute(cudaDevAttrL2CacheSize, shape) * int64_t{5} / 8;
  const int64_t fitting = std::max<int64_t>(1, section_bytes / std::max<int64_t>(1, head_bytes));
  const int64_t num_sections = (num_heads + fitting - 1) / fitting;
  return TileOrder(tiles_per_head, num_heads, (num_heads + num_sections - 1) / num_sections);
}

}  // namespace flash_ext
