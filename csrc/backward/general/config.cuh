// Tiles of the general backward's dK and dV; dQ's are QConfig's. At most kMaxGeneralTile high and
// wide.
#pragma once

#include "backward/config.cuh"
#include "common/score_rule.cuh"

namespace flash_ext::backward {

template <int kBlockM_, int kBlockN_, int kNumWarps_, int kStages_, typename ScoreWarps_,
          typename KVWarps_>
struct GeneralKVShape {
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kNumWarps = kNumWarps_;
  static constexpr int kStages = kStages_;  // of Q and dO
  using ScoreWarps = ScoreWarps_;
  using KVWarps = KVWarps_;
  static_assert(kBlockM <= kMaxGeneralTile && kBlockN <= kMaxGeneralTile);
  // Others wait while these compute the scores.
  static_assert(kNumWarps >= ScoreWarps::kRows * ScoreWarps::kCols);
  static_assert(kNumWarps == KVWarps::kRows * KVWarps::kCols);
};

// As KVShapes: preferred first, the last one for GPUs with 99 KB, where one fits there.
template <int kElementBytes, int kHeadDim>
struct GeneralKVShapes;
template <>
struct GeneralKVShapes<2, 64> {
  using type = ShapeList<GeneralKVShape<64, 64, 4, 2, WarpGrid<2, 2>, WarpGrid<2, 2>>>;
};
template <>
struct GeneralKVShapes<2, 128> {
  template <int kStages>
  using Staged = GeneralKVShape<64, 64, 8, kStages, WarpGrid<4, 2>, WarpGrid<4, 2>>;
  using type = ShapeList<Staged<2>, Staged<1>>;
};
template <>
struct GeneralKVShapes<2, 256> {
  using type = ShapeList<GeneralKVShape<64, 64, 8, 1, WarpGrid<4, 2>, WarpGrid<2, 4>>>;
};
template <>
struct GeneralKVShapes<4, 64> {
  using type = ShapeList<GeneralKVShape<64, 32, 8, 2, WarpGrid<4, 2>, WarpGrid<2, 4>>>;
};
template <>
struct GeneralKVShapes<4, 128> {
  using type = ShapeList<GeneralKVShape<32, 32, 4, 1, WarpGrid<2, 2>, WarpGrid<1, 4>>>;
};
template <>
struct GeneralKVShapes<4, 256> {
  using type = ShapeList<GeneralKVShape<32, 32, 8, 1, WarpGrid<2, 2>, WarpGrid<1, 8>>>;
};

template <typename Element_, int kHeadDim_, typename Shape>
struct GeneralKVConfig : Shape {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kNumThreads = Shape::kNumWarps * 32;
  static_assert(kBackwardRowPadding % Shape::kBlockM == 0, "padded rows hold whole tiles");

  using QTile = sm80::SmemTile<Element, Shape::kBlockM, kHeadDim>;
  using KVTile = sm80::SmemTile<Element, Shape::kBlockN, kHeadDim>;
  using ScoreTile = sm80::SmemTile<Element, Shape::kBlockM, Shape::kBlockN>;

  struct SharedStorage {
    KVTile k, v;  // dK and dV at the end
    QTile q[Shape::kStages], dout[Shape::kStages];
    ScoreTile p, ds;
    alignas(16) float lse_log2[Shape::kStages][Shape::kBlockM];
    alignas(16) float delta[Shape::kStages][Shape::kBlockM];
  };
  static_assert(sizeof(SharedStorage) <= 163 * 1024, "fits an A100");
};

}  // namespace flash_ext::backward
