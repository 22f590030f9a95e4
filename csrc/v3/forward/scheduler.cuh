// Which tiles a thread block computes, and in which order.
#pragma once

#include "common/block_range.h"
#include "common/mask.h"
#include "common/splits.h"
#include "v3/tile_order.cuh"

namespace flash_ext::v3::forward {

inline constexpr int kRowsPerWarpgroup = 64;  // as many as a wgmma has

// The rows of one thread block, kRowsPerWarpgroup for each consumer warpgroup. Where they do not
// fill a whole number of tiles it is the first tile that is short, by warpgroups before row 0:
// under a causal mask the first rows have the fewest keys, and the fewest warpgroups idle.
struct Tile {
  int m_block;
  int head_idx;
  int batch_idx;
  int split;     // which share of the keys
  int is_valid;  // 0: there are no more
};

// A tile of a general call.
struct PlacedTile {
  int row0;  // may be negative, see Tile
  int head_idx;
  int batch_idx;
  int seqlen_q;  // of its batch entry
  int seqlen_k;
  int is_valid;
};

// Where the rows of a tile begin, of those of its sequence counted from the last.
FLASH_HOST_DEVICE int first_row(int seqlen_q, int rank, int block_m) {
  return ceil_div(seqlen_q, kRowsPerWarpgroup) * kRowsPerWarpgroup - (rank + 1) * block_m;
}

// What a consumer warpgroup is told of its part of a tile.
struct alignas(16) WarpgroupTile {
  int row0;  // the first of its query rows; negative: it has none
  int head_idx;
  int batch_idx;
  int begin, end;  // K/V blocks that it computes; none if its rows see none of the tile's
  int full_end;    // those before it need no mask
  int skipped;     // blocks from `end` on that only other warpgroups see
  int16_t split;
  bool is_half;  // of its last block it sees at most the first half
  bool is_valid;
};

// The same for general calls.
struct GeneralTile : WarpgroupTile {
  int seqlen_q;  // of the batch entry
  int seqlen_k;
  int diagonal;        // of its band
  int q_begin;         // its first row, where packed
  int full_begin;      // blocks before it need a mask, too: the window's left edge
  int skipped_behind;  // blocks before `begin` that only other warpgroups see
  float slope;         // of ALiBi, in the units of scores
  float sink;          // -inf: none
};

// K/V blocks that are computed for `rows` query rows from row0 on. Rows that see nothing take one
// block, all masked, which gives them the output 0 like any other; those before row 0 take none.
FLASH_HOST_DEVICE int num_key_blocks(const Mask& mask, int row0, int rows, int block_n) {
  if (row0 + rows <= 0) return 0;
  const int blocks = key_blocks(mask, row0, rows, block_n).end;
  return blocks > 0 ? blocks : 1;
}

// The same of a band, whose first block need not be block 0.
FLASH_HOST_DEVICE BlockRange band_blocks(const BandMask& band, int row0, int rows, int block_n) {
  if (row0 + rows <= 0) return {0, 0};
  const int first = row0 > 0 ? row0 : 0;
  const BlockRange blocks = key_blocks(band, first, row0 + rows - first, block_n);
  if (blocks.begin < blocks.end) return blocks;
  const int last_block = ceil_div(band.seqlen_k, block_n) - 1;
  const int masked = blocks.begin < last_block ? blocks.begin : last_block;
  return {masked, masked + 1};
}

// How many keys the warpgroup whose rows begin at row0 sees.
FLASH_HOST_DEVICE int keys_seen(const Mask& mask, int row0) {
  const int last = row0 + kRowsPerWarpgroup - 1;
  return mask.key_end(last < mask.seqlen_q ? last : mask.seqlen_q - 1);
}

// A head's tiles come by query block, last (under a causal mask: longest) first. Where the keys are
// split, all tiles come once for each share.
struct Schedule {
  TileOrder order;  // of query blocks, of batch * heads_q heads
  int num_splits;
  int num_tiles;
  int heads_q;
  int num_thread_blocks;

  __device__ __forceinline__ int first_row(const Tile& tile, int seqlen_q, int block_m) const {
    const int past_last = ceil_div(seqlen_q, kRowsPerWarpgroup) * kRowsPerWarpgroup;
    return past_last - (order.tiles_per_head - tile.m_block) * block_m;
  }

  template <bool kSplitsKeys>
  __device__ __forceinline__ Tile tile(int round) const {
    const unsigned index = tile_index(round, static_cast<int>(blockIdx.x), num_thread_blocks);
    if (index >= static_cast<unsigned>(num_tiles)) return {0, 0, 0, 0, 0};
    const int tiles_per_split = order.num_heads * order.tiles_per_head;
    const int split = kSplitsKeys ? static_cast<int>(index) / tiles_per_split : 0;
    const auto [rank, head] = order.place(static_cast<int>(index) - split * tiles_per_split);
    const int batch_idx = head / heads_q;
    return {order.tiles_per_head - 1 - rank, head - batch_idx * heads_q, batch_idx, split, 1};
  }
};

}  // namespace flash_ext::v3::forward
