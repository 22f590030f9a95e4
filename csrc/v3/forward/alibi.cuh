// ALiBi's -slope * |i + diagonal - j| on the tensor cores, as one more step along k of Q K^T. On
// either side of the diagonal it is a number that a row's scores share, which the exponents
// subtract, and +-slope * (j - the nearest column): of the slope in three bf16 parts, which are
// exact, and of a column's number in the block, which is exact, too. Only blocks on the diagonal
// are left to the other units: an FMA a score everywhere takes 1.02 to 1.07 times as long (H200).
#pragma once

#include "common/numeric.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/smem_tile.cuh"
#include "v3/forward/general_scores.cuh"
#include "v3/forward/scheduler.cuh"
#include "v3/forward/softmax.cuh"

namespace flash_ext::v3::forward {

struct AlibiSoftmax : Softmax {
  float excess[2] = {0.f, 0.f};  // what the block's scores of a row are too large by

  template <int kN>
  __device__ __forceinline__ void update_max(float (&acc_s)[kN][4], float scale_log2,
                                             float factor_log2, float max_lag_log2) {
    const float block_max[2] = {quad_max(own_max_of_row(acc_s, 0) - excess[0]),
                                quad_max(own_max_of_row(acc_s, 1) - excess[1])};
    follow(acc_s, block_max, scale_log2, factor_log2, max_lag_log2);
  }

  __device__ __forceinline__ Exponent exponent(float scale_log2) const {
    return {scale_log2,
            {fmaf(excess[0], scale_log2, max_log2[0]), fmaf(excess[1], scale_log2, max_log2[1])}};
  }
};

// Of kernels without slopes, and those that add ALiBi to the scores.
struct NoAlibi {
  struct Storage {
    __device__ __forceinline__ void number_columns() {}
  };
  __device__ __forceinline__ explicit NoAlibi(const Storage&) {}
  __device__ __forceinline__ void begin_tile(const WarpgroupTile&, int, int) {}
  template <int kN>
  __device__ __forceinline__ void issue(float (&)[kN][4]) const {}
};

template <int kBlockN>
class TensorAlibi {
 public:
  struct Storage {
    // B, column by column, the same all along k: -kBlockN .. -1 for blocks left of the diagonal,
    // then 0 .. kBlockN - 1 for those right of it.
    alignas(128) __nv_bfloat16 columns[2 * kBlockN][8];

    // By all threads.
    __device__ __forceinline__ void number_columns() {
      for (int i = threadIdx.x; i < 2 * kBlockN * 8; i += blockDim.x) {
        columns[i / 8][i % 8] = __float2bfloat16_rn(static_cast<float>(i / 8 - kBlockN));
      }
      ptx::fence_proxy_async();
    }
  };

  __device__ __forceinline__ explicit TensorAlibi(const Storage& smem)
      : columns_(sm90::Descriptor::same_along_k(smem.columns)) {}

  // Every row of A is the parts of the slope, in k = 0, 1, 2.
  __device__ __forceinline__ void begin_tile(const GeneralTile& tile, int warp_idx, int lane_idx) {
    warp_row_ = 16 * warp_idx;
    diagonal_ = tile.row0 + warp_row_ + tile.diagonal;
    slope_ = tile.slope;
    const float high = __bfloat162float(__float2bfloat16_rn(slope_));
    const float middle = __bfloat162float(__float2bfloat16_rn(slope_ - high));
    const int k = lane_idx % 4 * 2;
    parts_ = k == 0   ? pack<__nv_bfloat16>(high, middle)
             : k == 2 ? pack<__nv_bfloat16>(slope_ - high - middle, 0.f)
                      : 0;
  }

  // Before the scores of a block are issued.
  __device__ __forceinline__ void begin_block(int n_block) {
    const int distance = distance_of(n_block);
    // Behind which of B's columns is for all warps: no two lie on different sides of a block.
    first_column_ = distance - warp_row_ <= 0 ? kBlockN : 0;
    slopes_[0] = is_left(distance) ? parts_ : is_right(distance) ? parts_ ^ 0x80008000u : 0;
    slopes_[1] = slopes_[0];
  }

  // Adds to scores that are being computed what differs from column to column.
  template <int kN>
  __device__ __forceinline__ void issue(float (&acc_s)[kN][4]) const {
    static_assert(8 * kN == kBlockN);
    ptx::Wgmma<__nv_bfloat16, kBlockN>::template rs<ptx::Major::kK>(
        acc_s, slopes_, columns_.at(first_column_ * kColumnBytes), /*accumulates=*/true);
    ptx::wgmma_commit_group();
  }

  // All of it on the diagonal, and elsewhere the rest: what the scores of the thread's two rows are
  // too large by.
  template <int kN>
  __device__ __forceinline__ void finish(float (&acc_s)[kN][4], float (&excess)[2], int n_block,
                                         int lane_idx) const {
    const int distance = distance_of(n_block);
    const int row = distance + lane_idx / 4;
    if (is_left(distance)) {
      excess[0] = slope_ * static_cast<float>(row - kBlockN);
      excess[1] = slope_ * static_cast<float>(row + 8 - kBlockN);
    } else if (is_right(distance)) {
      excess[0] = -slope_ * static_cast<float>(row);
      excess[1] = -slope_ * static_cast<float>(row + 8);
    } else {
      excess[0] = excess[1] = 0.f;
      add_distances(acc_s, slope_, row - lane_idx % 4 * 2);
    }
  }

 private:
  static constexpr int kColumnBytes = 16;

  // Of the warp's first row and the block's first column.
  __device__ __forceinline__ int distance_of(int n_block) const {
    return diagonal_ - n_block * kBlockN;
  }
  // The block, of the diagonal of all the warp's rows.
  __device__ __forceinline__ static bool is_left(int distance) { return distance >= kBlockN - 1; }
  __device__ __forceinline__ static bool is_right(int distance) { return distance <= -15; }

  const sm90::Descriptor columns_;
  int warp_row_;  // the warp's first, in its warpgroup
  int diagonal_;  // where that meets the diagonal
  float slope_;
  uint32_t parts_;
  int first_column_;
  uint32_t slopes_[4] = {0, 0, 0, 0};  // of the block: A
};

}  // namespace flash_ext::v3::forward
