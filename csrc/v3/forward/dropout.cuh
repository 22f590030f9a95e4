// Dropout of a warpgroup's weights, after their sum is taken and before they are packed. Which are
// kept is common/philox.h's: one evaluation serves a thread's two rows and a column of four tiles.
#pragma once

#include "v3/dropout_numbers.cuh"
#include "v3/forward/kernel_params.cuh"

namespace flash_ext::v3::forward {

// Of kernels without dropout.
struct NoDropout {
  __device__ __forceinline__ explicit NoDropout(const KernelParams&) {}
  __device__ __forceinline__ void begin_tile(const WarpgroupTile&, int, int) {}
  template <int kN>
  __device__ __forceinline__ void drop(float (&)[kN][4], int) {}
  __device__ __forceinline__ float factor_log2() const { return 0.f; }
  __device__ __forceinline__ float sum_factor() const { return 1.f; }
  __device__ __forceinline__ float out_factor() const { return 1.f; }
};

// Drawn beside exp2 and not while S is computed, where they would wait in registers: H200, d=128,
// 0.89 of the time.
template <int kBlockN>
class WeightDropout {
  static constexpr int kGroups = kBlockN / 32;
  static_assert(kBlockN % 32 == 0 && kRowsPerWarpgroup % 16 == 0, "blocks are whole groups");

 public:
  __device__ __forceinline__ explicit WeightDropout(const GeneralKernelParams& p)
      : p_(p), numbers_(p.dropout.rng_state) {}

  __device__ __forceinline__ void begin_tile(const WarpgroupTile& tile, int warp_idx,
                                             int lane_idx) {
    // A warpgroup's first row is a multiple of 64.
    numbers_.begin_rows(tile.batch_idx * p_.schedule.heads_q + tile.head_idx,
                        tile.row0 / 2 + 8 * warp_idx + lane_idx / 4);
    column0_ = lane_idx % 4 * 2;
  }

  // Sets weights to 0.
  __device__ __forceinline__ void drop(float (&weights)[kBlockN / 8][4], int n_block) {
    numbers_.forget_keys();
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      Philox4 numbers[2];  // of the thread's two columns
      draw_group(numbers, n_block, g);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float (&tile)[4] = weights[4 * g + n];
          // One instruction that sets two predicates; nobody reads the maximum.
          bool keeps_upper, keeps_lower;  // row
          __vibmax_u16x2(numbers[i].word[n], p_.dropout.thresholds, &keeps_lower, &keeps_upper);
          tile[i] = keeps_upper ? tile[i] : 0.f;
          tile[i + 2] = keeps_lower ? tile[i + 2] : 0.f;
        }
      }
    }
  }

  __device__ __forceinline__ float factor_log2() const { return p_.dropout.factor_log2; }
  __device__ __forceinline__ float sum_factor() const { return p_.dropout.sum_factor; }
  __device__ __forceinline__ float out_factor() const { return p_.dropout.out_factor; }

 private:
  __device__ __forceinline__ void draw_group(Philox4 (&numbers)[2], int n_block, int g) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      numbers[i] = numbers_.group((n_block * kGroups + g) * 8 + column0_ + i);
    }
  }

  const GeneralKernelParams& p_;
  DropoutNumbers numbers_;
  int column0_;
};

}  // namespace flash_ext::v3::forward
