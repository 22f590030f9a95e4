// The order in which thread blocks take the tiles of all heads, and how much of it runs at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda_check.h"

namespace flash_ext {

// Heads are cut into sections. A section's tiles come by their rank in the head, the longest first;
// the heads of a rank side by side.
struct TileOrder {
  int tiles_per_head;
  int num_heads;
  int heads_per_section;

  struct Place {
    int rank;
    int head;
  };

  __device__ __forceinline__ Place place(int index) const {
    const int section_tiles = heads_per_section * tiles_per_head;
    const int section = index / section_tiles;
    const int in_section = index - section * section_tiles;
    const int first_head = section * heads_per_section;
    const int heads = min(heads_per_section, num_heads - first_head);
    const int rank = in_section / heads;
    return {rank, first_head + in_section - rank * heads};
  }
};

// For a grid of one thread block a tile, which the GPU starts in this order. Causal tiles differ in
// length: with one head to a section the last head's long ones start last, and a third of the GPU
// waits for them. Sections as large as L2 holds (`head_bytes` of a head are read more than once)
// leave the end to short tiles. Others are of one length, and one head at a time is best for L2.
inline TileOrder tile_order(const AttentionShape& shape, bool is_causal, int64_t tiles_per_head,
                            int64_t num_heads, int64_t head_bytes) {
  int64_t heads_per_section = 1;
  if (is_causal) {
    const int64_t l2_bytes = device_attribute(cudaDevAttrL2CacheSize, shape);
    const int64_t fitting = std::max<int64_t>(1, l2_bytes / 8 * 5 / std::max<int64_t>(1, head_bytes));
    const int64_t num_sections = std::max<int64_t>(1, (num_heads + fitting - 1) / fitting);
    heads_per_section = (num_heads + num_sections - 1) / num_sections;
  }
  return {static_cast<int>(tiles_per_head), static_cast<int>(num_heads),
          static_cast<int>(heads_per_section)};
}

}  // namespace flash_ext
