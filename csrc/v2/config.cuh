// Tiles of the v2 forward. Shared memory holds one tile each of Q, K and V.
#pragma once

#include "sm80/smem_tile.cuh"

namespace flash_ext::v2 {

// How many thread blocks a launch has to hand out decides how tall they are.
enum class Grid {
  kFull,   // enough Q tiles for every multiprocessor
  kSmall,  // too few: half-height tiles, twice as many thread blocks
};

template <int kBlockM_, int kBlockN_, int kNumWarps_>
struct Shape {
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kNumWarps = kNumWarps_;
};

// 16-bit elements. 32 query rows a warp let every K and V fragment serve two row tiles, which halves
// the shared-memory traffic; at head_dim 256 the accumulator leaves room for 16.
// kBlockN is the same for both grids: a row's bits then do not depend on the size of its batch.
template <int kElementBytes, int kHeadDim, Grid kGrid>
struct TileShape;
template <>
struct TileShape<2, 64, Grid::kFull> : Shape<128, 64, 4> {};
template <>
struct TileShape<2, 64, Grid::kSmall> : Shape<64, 64, 4> {};
template <>
struct TileShape<2, 128, Grid::kFull> : Shape<128, 64, 4> {};
template <>
struct TileShape<2, 128, Grid::kSmall> : Shape<64, 64, 4> {};
template <Grid kGrid>
struct TileShape<2, 256, kGrid> : Shape<64, 64, 4> {};

// fp32: operands are twice as wide and split in two TF32 halves, so 16 rows a warp.
template <Grid kGrid>
struct TileShape<4, 64, kGrid> : Shape<64, 64, 4> {};
template <Grid kGrid>
struct TileShape<4, 128, kGrid> : Shape<64, 32, 4> {};
template <Grid kGrid>
struct TileShape<4, 256, kGrid> : Shape<32, 32, 2> {};

template <typename Element_, int kHeadDim_, Grid kGrid>
struct Config : TileShape<sizeof(Element_), kHeadDim_, kGrid> {
  using Element = Element_;
  using Base = TileShape<sizeof(Element), kHeadDim_, kGrid>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kNumThreads = Base::kNumWarps * 32;
  static constexpr int kWarpRows = Base::kBlockM / Base::kNumWarps;
  static_assert(kWarpRows % 16 == 0, "a warp owns whole 16-row tiles");

  using QTile = sm80::SmemTile<Element, Base::kBlockM, kHeadDim>;
  using KVTile = sm80::SmemTile<Element, Base::kBlockN, kHeadDim>;

  struct SharedStorage {
    QTile q;  // holds the output tile at the end
    KVTile k, v;
  };
  // sm_86 and sm_89 give a thread block no more.
  static_assert(sizeof(SharedStorage) <= 99 * 1024, "fits every multiprocessor from sm_80 on");
};

}  // namespace flash_ext::v2
