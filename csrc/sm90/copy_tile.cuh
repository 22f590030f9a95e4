// Tiles between global and shared memory by TMA, slab by slab.
#pragma once

#include "common/numeric.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/tma.cuh"
#include "sm90/smem_tile.cuh"

namespace flash_ext::sm90 {

// Where a tile begins in a (batch, heads, seqlen, head_dim) tensor.
struct TileCoords {
  int row;
  int head;
  int batch;
  int col = 0;
};

// By one thread. The bytes count towards the phase of `full`, which has been told to expect them.
template <typename Tile>
__device__ __forceinline__ void load_slabs(Tile& tile, const CUtensorMap& map, ptx::Mbarrier& full,
                                           TileCoords from) {
#pragma unroll
  for (int s = 0; s < Tile::kSlabs; ++s) {
    ptx::tma_load_4d(tile.slab(s), map, full, from.col + s * kSlabCols, from.row, from.head,
                     from.batch);
  }
}

// By one thread. Completes the next phase of `full` when the tile has arrived.
template <typename Tile>
__device__ __forceinline__ void load_tile(Tile& tile, const CUtensorMap& map, ptx::Mbarrier& full,
                                          TileCoords from) {
  ptx::mbarrier_arrive_expect_tx(full, Tile::kBytes);
  load_slabs(tile, map, full, from);
}

// One warp writes its 16 rows of an accumulator, scaled by one factor for each of a thread's two
// rows, to rows row0.. of the tile.
template <typename Tile>
__device__ __forceinline__ void store_accumulator(Tile& tile,
                                                  const float (&acc)[Tile::kCols / 8][4],
                                                  const float (&factor)[2], int row0,
                                                  int lane_idx) {
  using Element = typename Tile::Element;
  // Lane l names row l % 8 of matrix l / 8: upper and lower rows, then the next eight columns.
  const int row = row0 + (lane_idx / 8 % 2) * 8 + lane_idx % 8;
  const uint32_t base = ptx::smem_addr(tile.data);
#pragma unroll
  for (int n = 0; n < Tile::kCols / 8; n += 2) {
    const float (&left)[4] = acc[n];
    const float (&right)[4] = acc[n + 1];
    ptx::stmatrix_x4(base + Tile::chunk_offset(row, 8 * n + lane_idx / 16 * 8),
                     pack<Element>(left[0] * factor[0], left[1] * factor[0]),
                     pack<Element>(left[2] * factor[1], left[3] * factor[1]),
                     pack<Element>(right[0] * factor[0], right[1] * factor[0]),
                     pack<Element>(right[2] * factor[1], right[3] * factor[1]));
  }
}

// By one thread: into its bulk group. Writes to the tile by ordinary stores need
// fence_proxy_async() by their threads, and a barrier, before.
template <typename Tile>
__device__ __forceinline__ void store_slabs(Tile& tile, const CUtensorMap& map, TileCoords to) {
#pragma unroll
  for (int s = 0; s < Tile::kSlabs; ++s) {
    ptx::tma_store_4d(map, tile.slab(s), to.col + s * kSlabCols, to.row, to.head, to.batch);
  }
}

}  // namespace flash_ext::sm90
