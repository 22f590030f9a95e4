// Tiles of the v2 forward for general attention. They are at most kMaxGeneralTile high and wide;
// 16 rows a warp leave registers to masks, distances and random numbers.
#pragma once

#include "common/score_rule.cuh"
#include "ptx/mbarrier.cuh"
#include "sm80/smem_tile.cuh"
#include "v2/config.cuh"

namespace flash_ext::v2 {

template <int kElementBytes, int kHeadDim>
struct GeneralTileShape;
template <int kHeadDim>
struct GeneralTileShape<2, kHeadDim> : Shape<64, 64> {};
template <>
struct GeneralTileShape<4, 64> : Shape<64, 64> {};
template <>
struct GeneralTileShape<4, 128> : Shape<64, 32> {};
template <>
struct GeneralTileShape<4, 256> : Shape<32, 32, 2> {};

template <typename Element_, int kHeadDim_>
struct GeneralConfig : GeneralTileShape<sizeof(Element_), kHeadDim_> {
  using Element = Element_;
  using Base = GeneralTileShape<sizeof(Element), kHeadDim_>;
  static_assert(Base::kBlockM <= kMaxGeneralTile && Base::kBlockN <= kMaxGeneralTile);
  static constexpr int kHeadDim = kHeadDim_;
  // The next tiles of K and V then arrive behind both products.
  static constexpr int kStages = sizeof(Element) == 2 && kHeadDim <= 128 ? 2 : 1;
  static constexpr int kWarpRows = 16;
  static constexpr int kWarpKeys = Base::kBlockN / Base::kKeyGroups;
  static constexpr int kRowWarps = Base::kBlockM / kWarpRows;
  static constexpr int kNumWarps = kRowWarps * Base::kKeyGroups;
  static constexpr int kNumThreads = kNumWarps * 32;

  using QTile = sm80::SmemTile<Element, Base::kBlockM, kHeadDim>;
  using KVTile = sm80::SmemTile<Element, Base::kBlockN, kHeadDim>;

  // As Config's.
  struct SharedStorage {
    QTile q;
    KVTile k[kStages], v[kStages];
    ptx::Mbarrier k_full[kStages], v_full[kStages];
    ptx::Mbarrier k_read, v_read;
  };
  static_assert(sizeof(SharedStorage) <= 99 * 1024, "fits every GPU from sm_80 on");
  static_assert(sizeof(float) * (Base::kKeyGroups - 1) * Base::kBlockM * (kHeadDim + 8) <=
                    2 * sizeof(KVTile),
                "the join of the key groups fits where K and V were");
};

}  // namespace flash_ext::v2
