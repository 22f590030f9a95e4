// Tiles of the backward kernels.
#pragma once

#include "backward/workspace.h"
#include "sm80/smem_tile.cuh"

namespace flash_ext::backward {

// How the warps of a thread block divide the rows and columns of one product.
template <int kRows_, int kCols_>
struct WarpGrid {
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
};

// dK and dV: a thread block owns kBlockN keys and walks over blocks of kBlockM queries. The three
// kinds of product have a warp grid each: S and dP (M x N), dV and dK (N x head_dim), dQ (M x head_dim).
template <int kBlockM_, int kBlockN_, int kNumWarps_, int kStages_, typename ScoreWarps_,
          typename KVWarps_, typename QWarps_>
struct KVShape {
  static constexpr int kBlockM = kBlockM_;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kNumWarps = kNumWarps_;
  static constexpr int kStages = kStages_;  // of Q and dO
  using ScoreWarps = ScoreWarps_;
  using KVWarps = KVWarps_;
  using QWarps = QWarps_;
};

template <int kElementBytes, int kHeadDim>
struct KVTileShape;
template <>
struct KVTileShape<2, 64>
    : KVShape<64, 64, 4, 2, WarpGrid<2, 2>, WarpGrid<2, 2>, WarpGrid<2, 2>> {};
template <>
struct KVTileShape<2, 128>
    : KVShape<64, 128, 8, 2, WarpGrid<2, 4>, WarpGrid<4, 2>, WarpGrid<2, 4>> {};
template <>
struct KVTileShape<2, 256>
    : KVShape<64, 64, 8, 1, WarpGrid<4, 2>, WarpGrid<2, 4>, WarpGrid<2, 4>> {};
template <>
struct KVTileShape<4, 64> : KVShape<32, 64, 4, 1, WarpGrid<2, 2>, WarpGrid<2, 2>, WarpGrid<2, 2>> {};
template <>
struct KVTileShape<4, 128>
    : KVShape<32, 64, 8, 1, WarpGrid<2, 4>, WarpGrid<4, 2>, WarpGrid<2, 4>> {};
template <>
struct KVTileShape<4, 256>
    : KVShape<32, 32, 4, 1, WarpGrid<2, 2>, WarpGrid<2, 2>, WarpGrid<2, 2>> {};

template <typename Element_, int kHeadDim_>
struct KVConfig : KVTileShape<sizeof(Element_), kHeadDim_> {
  using Element = Element_;
  using Base = KVTileShape<sizeof(Element), kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kNumThreads = Base::kNumWarps * 32;
  static_assert(kBackwardRowPadding % Base::kBlockM == 0, "padded rows hold whole tiles");

  using QTile = sm80::SmemTile<Element, Base::kBlockM, kHeadDim>;
  using KVTile = sm80::SmemTile<Element, Base::kBlockN, kHeadDim>;
  using ScoreTile = sm80::SmemTile<Element, Base::kBlockM, Base::kBlockN>;

  struct SharedStorage {
    KVTile k, v;  // dK and dV at the end
    QTile q[Base::kStages], dout[Base::kStages];
    ScoreTile p, ds;
    alignas(16) float lse_log2[Base::kStages][Base::kBlockM];
    alignas(16) float delta[Base::kStages][Base::kBlockM];
  };
  static_assert(sizeof(SharedStorage) <= 163 * 1024, "fits an A100");
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
