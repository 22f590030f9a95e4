// Which tiles a thread block computes, and in which order.
#pragma once

#include "common/block_range.h"
#include "v3/tile_order.cuh"

namespace flash_ext::v3::backward {

// A key block of one key head. Its work is every query block that sees it, of every query head in
// the group.
struct Tile {
  int n_block;
  int kv_head_idx;
  int batch_idx;
  bool is_valid;  // false: there are no more
};

// A head's tiles come by key block, first (under a causal mask: longest) first.
struct Schedule {
  TileOrder order;  // of key blocks, of batch * heads_kv heads
  int num_tiles;
  int heads_kv;
  int num_walkers;  // thread blocks, or clusters

  __device__ __forceinline__ Tile tile(int round, int c = blockIdx.x) const {
    const unsigned index = tile_index(round, c, num_walkers);
    if (index >= static_cast<unsigned>(num_tiles)) return {0, 0, 0, false};
    const auto [n_block, head] = order.place(static_cast<int>(index));
    const int batch_idx = head / heads_kv;
    return {n_block, head - batch_idx * heads_kv, batch_idx, true};
  }
};

}  // namespace flash_ext::v3::backward
