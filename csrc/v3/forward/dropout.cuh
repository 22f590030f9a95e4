// Dropout of a warpgroup's weights, after their sum is taken and before they are packed. Which are
// kept is common/philox.h's: one evaluation serves a thread's two rows and a column of four tiles.
#pragma once

#include "v3/dropout_numbers.cuh"
#include "v3/forward/kernel_params.cuh"
#include "v3/forward/pin_before_wait.cuh"

namespace flash_ext::v3::forward {

// Of kernels without dropout.
struct NoDropout {
  struct Drawn {};

  __device__ __forceinline__ explicit NoDropout(const KernelParams&) {}
  __device__ __forceinline__ void begin_tile(const WarpgroupTile&, int, int) {}
  __device__ __forceinline__ Drawn draw(int, float*) { return {}; }
  template <int kN>
  __device__ __forceinline__ void drop(float (&)[kN][4], const Drawn&, int) {}
  __device__ __forceinline__ float factor_log2() const { return 0.f; }
  __device__ __forceinline__ float sum_factor() const { return 1.f; }
  __device__ __forceinline__ float out_factor() const { return 1.f; }
};

// kEarlyGroups: of 32 columns each, whose numbers are drawn while S is computed and held in 16
// registers. The others' are drawn where they are used.
template <int kBlockN, int kEarlyGroups>
class WeightDropout {
  static constexpr int kGroups = kBlockN / 32;
  static_assert(kBlockN % 32 == 0 && kRowsPerWarpgroup % 16 == 0, "blocks are whole groups");

 public:
  struct Drawn {
    Philox4 numbers[kEarlyGroups > 0 ? kEarlyGroups : 1][2];  // of a thread's two columns
  };

  __device__ __forceinline__ explicit WeightDropout(const GeneralKernelParams& p)
      : p_(p), numbers_(p.dropout.rng_state) {}

  __device__ __forceinline__ void begin_tile(const WarpgroupTile& tile, int warp_idx,
                                             int lane_idx) {
    // A warpgroup's first row is a multiple of 64.
    numbers_.begin_rows(tile.batch_idx * p_.schedule.heads_q + tile.head_idx,
                        tile.row0 / 2 + 8 * warp_idx + lane_idx / 4);
    column0_ = lane_idx % 4 * 2;
  }

  // Before the wait for S.
  __device__ __forceinline__ Drawn draw(int n_block, float* never_written) {
    Drawn drawn{};
    if constexpr (kEarlyGroups > 0) {
      numbers_.forget_keys();
      uint32_t all = 0;
#pragma unroll
      for (int g = 0; g < kEarlyGroups; ++g) {
        draw_group(drawn.numbers[g], n_block, g);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          all ^= drawn.numbers[g][i].word[0] ^ drawn.numbers[g][i].word[2];
        }
      }
      pin_before_wait(__uint_as_float(all & 0x7fffffffu), never_written);
    }
    return drawn;
  }

  // Sets weights to 0.
  __device__ __forceinline__ void drop(float (&weights)[kBlockN / 8][4], const Drawn& drawn,
                                       int n_block) {
    if (kEarlyGroups < kGroups) numbers_.forget_keys();
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      Philox4 late[2];
      const bool is_late = g >= kEarlyGroups;
      if (is_late) draw_group(late, n_block, g);
      const auto& numbers = is_late ? late : drawn.numbers[is_late ? 0 : g];
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
