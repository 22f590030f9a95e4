// Tiles of the v1 forward, by the paper's rule.
#pragma once

#include "sm80/smem_tile.cuh"

namespace flash_ext::v1 {

// Line 1 of Algorithm 1: B_c = ceil(M / 4d), B_r = min(B_c, d), where M is the on-chip memory in
// elements and the 4 stands for the blocks of Q, K, V and O. We give those blocks 64 KB; with the
// second Q buffer and the warps' partial results a thread block then stays below the 99 KB of
// sm_86. For head dimensions of 64, 128 and 256 all of it comes out in whole tensor-core tiles:
//   16 bits: (B_c, B_r) = (128, 64), (64, 64), (32, 32)      fp32: (64, 64), (32, 32), (16, 16)
inline constexpr int kSramBytes = 64 * 1024;

template <typename Element_, int kHeadDim_>
struct Config {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kSramElements = kSramBytes / static_cast<int>(sizeof(Element));
  static constexpr int kBlockN = (kSramElements + 4 * kHeadDim - 1) / (4 * kHeadDim);  // B_c
  static constexpr int kBlockM = kBlockN < kHeadDim ? kBlockN : kHeadDim;              // B_r

  // The warps split the columns of S, and with them the keys of P V. Where shared memory allows,
  // two warps also share the rows of each slice: one warp a scheduler cannot hide its own
  // latencies.
  static constexpr int kKeyWarps = kBlockN / 16 < 4 ? kBlockN / 16 : 4;
  static constexpr int kRowWarps = kHeadDim == 64 && sizeof(Element) == 2 ? 2 : 1;
  static constexpr int kNumWarps = kKeyWarps * kRowWarps;
  static constexpr int kNumThreads = kNumWarps * 32;
  // For __launch_bounds__, 0 meaning nothing said: the choice with which ptxas spills nothing.
  static constexpr int kMinBlocks = sizeof(Element) == 4 ? 1 : 0;
  static constexpr int kWarpCols = kBlockN / kKeyWarps;
  static constexpr int kWarpRows = kBlockM / kRowWarps;
  static_assert(kWarpCols % 16 == 0 && kWarpRows % 16 == 0, "a warp owns whole tensor-core tiles");

  // O is joined 16 rows of each row warp at a time.
  static constexpr int kJoinRows = 16 * kRowWarps;
  static constexpr int kJoinPitch = kHeadDim + 4;  // rows of a fragment in different banks

  using QTile = sm80::SmemTile<Element, kBlockM, kHeadDim>;
  using KVTile = sm80::SmemTile<Element, kBlockN, kHeadDim>;

  struct SharedStorage {
    KVTile k, v;
    QTile q[2];
    alignas(16) float partial_o[kKeyWarps][kJoinRows][kJoinPitch];
    // The first slice's entries become line 12's factors of O_i and of P~ V_j.
    float partial_max[kKeyWarps][kBlockM];
    float partial_sum[kKeyWarps][kBlockM];
  };
  static_assert(sizeof(SharedStorage) <= 99 * 1024, "fits every multiprocessor from sm_80 on");
};

}  // namespace flash_ext::v1
