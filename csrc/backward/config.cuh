// Tiles of the backward kernels.
#pragma once

#include <type_traits>

#include "backward/workspace.h"
#include "ptx/mbarrier.cuh"
#include "sm80/smem_tile.cuh"

namespace flash_ext::backward {

// How the warps of a thread block divide the rows and columns of one product.
template <int kRows_, int kCols_>
struct WarpGrid {
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
};

// dK and dV: a thread block owns kBlockN keys and walks over blocks of kBlockM queries. The three
// kinds of product have a warp grid each: S and dP (M x N), dV and dK (N x head_dim), dQ (M x
// head_dim).
template <int kBlockM_, int kBlockN_, int kNumWarps_, int kStages_, int kMinBlocks_,
          bool kCentresKeys_, typename ScoreWarps_, typename KVWarps_, typename QWarps_>
struct KVShape {
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kNumWarps = kNumWarps_;
  static constexpr int kStages = kStages_;        // of Q and dO
  static constexpr int kMinBlocks = kMinBlocks_;  // thread blocks a multiprocessor has to hold
  // dQ comes from a second tile of K without its mean. Where there is no room for that, the rows of
  // dS are summed up for the last kernel to take the mean out, which costs 2 to 5% of the time.
  static constexpr bool kCentresKeys = kCentresKeys_;
  // With twice as many warps as the score tile needs, one half computes P and the other dP.
  static constexpr bool kSplitScores = kNumWarps == 2 * ScoreWarps_::kRows * ScoreWarps_::kCols;
  using ScoreWarps = ScoreWarps_;
  using KVWarps = KVWarps_;
  using QWarps = QWarps_;
};

// Preferred first: a launch takes the first that the GPU's shared memory holds (a thread block gets
// 227 KB on sm_90, 163 on sm_80, 99 on sm_86 and sm_89). At head_dim 256 nothing fits in 99 KB.
template <typename... Shapes>
struct ShapeList {};

// H200, bf16, 4x32x4096, d=64, against torch's flash: 64x64 0.97 where a multiprocessor holds three
// thread blocks (which spills 20 bytes), 0.86 where two, 128x64 0.66, 64x128 0.77; then 1.02 with K
// without its mean. 4x16x4096, d=128: 64x128 0.95, 64x64 in two thread blocks 0.94; then 0.99.
// d=256: 64x64 1.00, with one stage and K without its mean 0.93.
template <int kElementBytes, int kHeadDim>
struct KVShapes;
template <>
struct KVShapes<2, 64> {
  using type =
      ShapeList<KVShape<64, 64, 4, 2, 3, true, WarpGrid<2, 2>, WarpGrid<2, 2>, WarpGrid<2, 2>>>;
};
template <>
struct KVShapes<2, 128> {
  template <bool kCentresKeys>
  using Large =
      KVShape<64, 128, 8, 2, 1, kCentresKeys, WarpGrid<2, 4>, WarpGrid<4, 2>, WarpGrid<2, 4>>;
  using Small = KVShape<64, 64, 4, 1, 1, true, WarpGrid<2, 2>, WarpGrid<2, 2>, WarpGrid<2, 2>>;
  using type = ShapeList<Large<true>, Large<false>, Small>;
};
template <>
struct KVShapes<2, 256> {
  using type =
      ShapeList<KVShape<64, 64, 8, 2, 1, false, WarpGrid<4, 2>, WarpGrid<2, 4>, WarpGrid<2, 4>>,
                KVShape<64, 64, 8, 1, 1, false, WarpGrid<4, 2>, WarpGrid<2, 4>, WarpGrid<2, 4>>>;
};
template <>
struct KVShapes<4, 64> {
  using type =
      ShapeList<KVShape<64, 32, 8, 2, 2, true, WarpGrid<4, 2>, WarpGrid<2, 4>, WarpGrid<4, 2>>>;
};
template <>
struct KVShapes<4, 128> {
  template <bool kCentresKeys>
  using Large =
      KVShape<32, 64, 8, 2, 1, kCentresKeys, WarpGrid<2, 4>, WarpGrid<2, 4>, WarpGrid<2, 4>>;
  using Small = KVShape<32, 32, 8, 1, 1, true, WarpGrid<2, 2>, WarpGrid<2, 4>, WarpGrid<2, 4>>;
  using type = ShapeList<Large<true>, Large<false>, Small>;
};
template <>
struct KVShapes<4, 256> {
  using type =
      ShapeList<KVShape<32, 32, 8, 1, 1, false, WarpGrid<2, 2>, WarpGrid<1, 8>, WarpGrid<1, 8>>>;
};

template <typename Element_, int kHeadDim_, typename Shape>
struct KVConfig : Shape {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kNumThreads = Shape::kNumWarps * 32;
  static_assert(kBackwardRowPadding % Shape::kBlockM == 0, "padded rows hold whole tiles");

  using QTile = sm80::SmemTile<Element, Shape::kBlockM, kHeadDim>;
  using KVTile = sm80::SmemTile<Element, Shape::kBlockN, kHeadDim>;
  using ScoreTile = sm80::SmemTile<Element, Shape::kBlockM, Shape::kBlockN>;

  struct Tiles {
    KVTile k, v;  // dK and dV at the end
    QTile q[Shape::kStages], dout[Shape::kStages];
    ScoreTile p, ds;
    alignas(16) float lse_log2[Shape::kStages][Shape::kBlockM];
    alignas(16) float delta[Shape::kStages][Shape::kBlockM];
    // Phase i of each is iteration i's; of `full`, one in kStages.
    ptx::Mbarrier full[Shape::kStages];  // a query block has arrived
    ptx::Mbarrier p_ready, ds_ready;     // P or dS is in shared memory
    ptx::Mbarrier read;                  // nobody reads this iteration's tiles any more
  };
  struct TilesAndCentredKeys : Tiles {
    KVTile k_centred;
  };
  using SharedStorage = std::conditional_t<Shape::kCentresKeys, TilesAndCentredKeys, Tiles>;
  static_assert(sizeof(SharedStorage) <= 227 * 1024, "fits the largest GPU");
};

// dQ on its own: a thread block owns kBlockM queries, each warp 16 of them.
template <int kBlockM_, int kBlockN_>
struct QShape {
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kNumWarps = kBlockM / 16;
};

template <int kElementBytes, int kHeadDim>
struct QTileShape;
template <>
struct QTileShape<2, 64> : QShape<64, 64> {};
template <>
struct QTileShape<2, 128> : QShape<64, 64> {};
template <>
struct QTileShape<2, 256> : QShape<64, 32> {};
template <>
struct QTileShape<4, 64> : QShape<64, 32> {};
template <>
struct QTileShape<4, 128> : QShape<64, 32> {};
template <>
struct QTileShape<4, 256> : QShape<32, 16> {};

template <typename Element_, int kHeadDim_>
struct QConfig : QTileShape<sizeof(Element_), kHeadDim_> {
  using Element = Element_;
  using Base = QTileShape<sizeof(Element), kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kNumThreads = Base::kNumWarps * 32;

  using QTile = sm80::SmemTile<Element, Base::kBlockM, kHeadDim>;
  using KVTile = sm80::SmemTile<Element, Base::kBlockN, kHeadDim>;

  struct SharedStorage {
    QTile q, dout;  // q becomes dQ at the end
    KVTile k, v;
  };
  static_assert(sizeof(SharedStorage) <= 99 * 1024, "fits every multiprocessor from sm_80 on");
};

}  // namespace flash_ext::backward
