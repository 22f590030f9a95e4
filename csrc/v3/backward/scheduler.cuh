// Which tiles a thread block computes, and in which order.
#pragma once

#include "common/block_range.h"
#include "common/mask.h"

namespace flash_ext::v3::backward {

// A key block of one key head. Its work is every query block that sees it, of every query head in
// the group.
struct Tile {
  int n_block;
  int kv_head_idx;
  int batch_idx;
  bool is_valid;  // false: there are no more
};

// The grid is persistent: thread block (or cluster) c of n takes the tiles c, 2n-1-c, 2n+c, 4n-1-c,
// ... of an order in which tiles get shorter, so that what one round gives a block too much the
// next takes back.
//
// The order: heads are cut into sections, whose queries should fit in L2 together. A section's
// tiles come by key block, first (under a causal mask: longest) first; the heads of a block side by
// side.
struct Schedule {
  int num_n_blocks;
  int num_tiles;
  int heads_kv;
  int heads_per_section;
  int num_walkers;  // thread blocks, or clusters

  __device__ __forceinline__ Tile tile(int round, int c = blockIdx.x) const {
    const int n = num_walkers;
    // Unsigned: the round after the last may lie up to n past 2^31.
    const unsigned index = static_cast<unsigned>(round) * n + (round % 2 == 0 ? c : n - 1 - c);
    if (index >= static_cast<unsigned>(num_tiles)) return {0, 0, 0, false};
    const int section_tiles = heads_per_section * num_n_blocks;
    const int section = static_cast<int>(index) / section_tiles;
    const int in_section = static_cast<int>(index) - section * section_tiles;
    const int first_head = section * heads_per_section;
    const int heads = min(heads_per_section, num_tiles / num_n_blocks - first_head);
    const int n_block = in_section / heads;
    const int batch_head = first_head + in_section - n_block * heads;
    const int batch_idx = batch_head / heads_kv;
    return {n_block, batch_head - batch_idx * heads_kv, batch_idx, true};
  }
};

}  // namespace flash_ext::v3::backward
