// Tiles of the v2 forward. Shared memory holds a tile of Q and one or two each of K and V.
#pragma once

#include "ptx/mbarrier.cuh"
#include "sm80/smem_tile.cuh"
#include "v2/splits.h"

namespace flash_ext::v2 {

// Aligned rows begin, and end, at multiples of 16 bytes: what cp.async copies. Their kernel spares
// the code for others, which costs 2% at seqlen 512, and keeps two tiles each of K and V where a
// multiprocessor holds two thread blocks even so: the next ones then arrive behind both products,
// and no warp waits for another that still reads (4x16x4096, d=128 on an H200: 1.04 times as fast).
enum class Rows { kAny, kAligned };

// A kernel of its own where the keys are split, see splits.h.
enum class Keys { kAll, kShare };

// The warps of a thread block split the query rows. With more than one key group they also split
// the keys of every block, each group with a softmax of its own, joined once at the end.
template <int kBlockM_, int kBlockN_, int kKeyGroups_ = 1>
struct Shape {
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kKeyGroups = kKeyGroups_;
};

// 16-bit elements, full grid: 32 query rows a warp let every K and V fragment serve two row tiles,
// which halves the shared-memory traffic; at head_dim 256 the accumulator leaves room for 16.
// H200, bf16, batch x heads x seqlen 2x32x8192, d=64, against torch's flash: 128x128 1.05, 128x64
// 0.92. 4x1x1024, d=64: 32x256 in four key groups takes 10.5 us, 32x128 in four 12.2, 64x256 in
// four 15.7, 64x64 in one 17.6 (fp16; torch's best backend 13.1). 2x16x8192, d=128: 128x64 1.02,
// 128x32 0.91, 64x64 0.89. 2x8x8192, d=256: 64x64 0.97, 128x64 0.86.
template <int kElementBytes, int kHeadDim, Grid kGrid>
struct TileShape;
template <>
struct TileShape<2, 64, Grid::kFull> : Shape<128, 128> {};
template <>
struct TileShape<2, 64, Grid::kSmall> : Shape<32, 256, 4> {};
template <>
struct TileShape<2, 128, Grid::kFull> : Shape<128, 64> {};
template <>
struct TileShape<2, 128, Grid::kSmall> : Shape<64, 128, 2> {};
template <Grid kGrid>
struct TileShape<2, 256, kGrid> : Shape<64, 64> {};

// fp32. H200, 4x1x1024, d=64: 32x128 in four key groups takes 32 us, 64x128 in four 52, 64x64 in
// one 90. 8x32x2048, d=64: 64x64 in one group 5.3 ms, 64x128 in four 6.2.
template <>
struct TileShape<4, 64, Grid::kFull> : Shape<64, 64> {};
template <>
struct TileShape<4, 64, Grid::kSmall> : Shape<32, 128, 4> {};
template <>
struct TileShape<4, 128, Grid::kFull> : Shape<64, 32> {};
template <>
struct TileShape<4, 128, Grid::kSmall> : Shape<32, 64, 4> {};
template <Grid kGrid>
struct TileShape<4, 256, kGrid> : Shape<32, 32, 2> {};

template <typename Element_, int kHeadDim_, Grid kGrid, Rows kRows = Rows::kAny,
          Keys kKeys = Keys::kAll>
struct Config : TileShape<sizeof(Element_), kHeadDim_, kGrid> {
  using Element = Element_;
  using Base = TileShape<sizeof(Element), kHeadDim_, kGrid>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kAligned = kRows == Rows::kAligned;
  static constexpr bool kSplitsKeys = kKeys == Keys::kShare;
  static_assert(Base::kBlockM == forward_block_m(sizeof(Element), kHeadDim, kGrid));
  static constexpr int kStages = kAligned && kHeadDim <= 128 ? 2 : 1;
  static constexpr int kWarpRows = Base::kBlockM == 128 ? 32 : 16;
  static constexpr int kWarpKeys = Base::kBlockN / Base::kKeyGroups;
  static constexpr int kRowWarps = Base::kBlockM / kWarpRows;
  static constexpr int kNumWarps = kRowWarps * Base::kKeyGroups;
  static constexpr int kNumThreads = kNumWarps * 32;

  using QTile = sm80::SmemTile<Element, Base::kBlockM, kHeadDim>;
  using KVTile = sm80::SmemTile<Element, Base::kBlockN, kHeadDim>;

  struct SharedStorage {
    QTile q;                        // the output tile at the end
    KVTile k[kStages], v[kStages];  // the other key groups' accumulators at the end
    // Phase i of each is K/V block i's; of those of a stage, one in kStages.
    ptx::Mbarrier k_full[kStages], v_full[kStages];  // a block has arrived
    ptx::Mbarrier k_read, v_read;                    // no warp reads it any more
    BlockRange share;                                // of the keys, where they are split
  };
  // sm_86 and sm_89 give a thread block no more.
  static_assert(kAligned || sizeof(SharedStorage) <= 99 * 1024, "fits every GPU from sm_80 on");
  static_assert(sizeof(float) * (Base::kKeyGroups - 1) * Base::kBlockM * (kHeadDim + 8) <=
                    2 * sizeof(KVTile),
                "the join of the key groups fits where K and V were");
};

}  // namespace flash_ext::v2
