// The online softmax of a warpgroup's 64 rows, in pieces that run between matrix products. A thread
// holds two rows, lane / 4 and lane / 4 + 8 of its warp's sixteen.
#pragma once

#include "common/numeric.cuh"
#include "common/online_softmax.cuh"

namespace flash_ext::v3::forward {

// The maximum that weights are relative to may lag behind the true one by a factor of 2^8 of
// weight: only beyond that does it move and is O rescaled, which most blocks are thus spared.
// Weights up to 256 round as well as those up to 1 in fp16 and bf16, and O / l and m + log l do not
// depend on m.
//
// Most blocks are therefore spared their maximum, too: their weights are tried relative to the one
// so far, beside the scores, which stay, and taken unless their sum exceeds 2^8. What lies between
// S and its weights otherwise, a maximum, shuffles and a vote, is what the tensor cores wait for.
// After kTrials in a row in vain, as where scores rise from block to block, the maximum comes
// first, and there is another trial once that no longer moves.
inline constexpr float kMaxLagLog2 = 8.f;
inline constexpr float kMostWeight = 256.f;  // 2^kMaxLagLog2
inline constexpr int kTrials = 2;

struct Softmax {
  float row_max[2] = {-INFINITY, -INFINITY};  // of the unscaled scores; lags
  float row_sum[2] = {0.f, 0.f};              // this thread's columns only
  float max_log2[2] = {0.f, 0.f};             // what the exponents subtract
  float rescale[2];                           // what earlier weights are to be multiplied by
  bool rescales = false;                      // in this warp: some rescale is not 1
  bool shifts = false;                        // in this warp: huge scores, see ExponentBase
  bool is_settled = false;  // in this warp: all have seen a score, none a huge one
  int trials = kTrials;     // in this warp: left, of kTrials

  // Takes in the block's scores. Afterwards weights() may turn them into weights, times
  // 2^factor_log2. `max_lag_log2`: by how much the maximum may lag.
  template <int kN>
  __device__ __forceinline__ void update_max(float (&acc_s)[kN][4], float scale_log2,
                                             float factor_log2, float max_lag_log2) {
    const float block_max[2] = {quad_max(own_max_of_row(acc_s, 0)),
                                quad_max(own_max_of_row(acc_s, 1))};
    follow(acc_s, block_max, scale_log2, factor_log2, max_lag_log2);
  }

  // Of this thread's columns.
  template <int kN>
  __device__ __forceinline__ static float own_max_of_row(const float (&acc_s)[kN][4], int half) {
    // Two chains, for the latency of one is what the tensor cores wait for.
    float even = fmaxf(acc_s[0][2 * half], acc_s[0][2 * half + 1]);
    float odd = fmaxf(acc_s[1][2 * half], acc_s[1][2 * half + 1]);
#pragma unroll
    for (int n = 2; n < kN; n += 2) {
      even = fmaxf(even, fmaxf(acc_s[n][2 * half], acc_s[n][2 * half + 1]));
      odd = fmaxf(odd, fmaxf(acc_s[n + 1][2 * half], acc_s[n + 1][2 * half + 1]));
    }
    return fmaxf(even, odd);
  }

  // Raises the maximum where it lags too far behind the block's.
  template <int kN>
  __device__ __forceinline__ void follow(float (&acc_s)[kN][4], const float (&block_max)[2],
                                         float scale_log2, float factor_log2, float max_lag_log2) {
    const bool grows[2] = {(block_max[0] - row_max[0]) * scale_log2 > max_lag_log2,
                           (block_max[1] - row_max[1]) * scale_log2 > max_lag_log2};
    rescales = __any_sync(0xffffffffu, grows[0] || grows[1]);
    if (!rescales && !shifts) return;
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float old_max = row_max[half];
      if (grows[half]) row_max[half] = block_max[half];
      const ExponentBase base(row_max[half], scale_log2);
      shift[half] = base.shift;
      max_log2[half] = base.max_log2 - factor_log2;
      rescale[half] = base.rescale(old_max, scale_log2);
      row_sum[half] *= rescale[half];
    }
    shifts = __any_sync(0xffffffffu, shift[0] != 0.f || shift[1] != 0.f);
    is_settled =
        __all_sync(0xffffffffu, !shifts && row_max[0] > -INFINITY && row_max[1] > -INFINITY);
    if (!shifts) return;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc_s[n][i] -= shift[i / 2];
    }
  }

  // What 2 is raised to, of a score of row `half`.
  struct Exponent {
    float scale_log2;
    float subtrahend[2];

    __device__ __forceinline__ float operator()(float s, int half) const {
      return __fmaf_rn(s, scale_log2, -subtrahend[half]);
    }
    // How large a weight that is tried may be.
    __device__ __forceinline__ float most(int) const { return kMostWeight; }
  };
  __device__ __forceinline__ Exponent exponent(float scale_log2) const {
    return {scale_log2, {max_log2[0], max_log2[1]}};
  }

  // Scores to weights, and their sum, for the 8-column tiles [kBegin, kEnd).
  template <int kBegin, int kEnd, int kN, typename AnyExponent>
  __device__ __forceinline__ void weights(float (&acc_s)[kN][4], const AnyExponent& exponent) {
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int n = kBegin; n < kEnd; ++n) try_weights(acc_s[n], acc_s[n], sum, exponent);
    row_sum[0] += sum[0] + sum[1];
    row_sum[1] += sum[2] + sum[3];
  }

  // Of one such tile, by the maximum so far; `sum`: of this thread's weights of the block.
  template <typename AnyExponent>
  __device__ __forceinline__ static void try_weights(float (&weight)[4], const float (&score)[4],
                                                     float (&sum)[4], const AnyExponent& exponent) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weight[i] = ptx::exp2_approx(exponent(score[i], i / 2));
      sum[i] += weight[i];
    }
  }

  // Whether the weights that were tried stand, for the whole warp: there was a maximum, and none is
  // larger than it may be where the sums of a thread's are not. NaN is no such sum. If not,
  // update_max() and weights() are to follow.
  template <typename AnyExponent>
  __device__ __forceinline__ bool accept(const float (&sums)[2], const AnyExponent& exponent) {
    const bool stand = sums[0] <= exponent.most(0) && sums[1] <= exponent.most(1);
    if (!__all_sync(0xffffffffu, stand && is_settled)) return false;
    row_sum[0] += sums[0];
    row_sum[1] += sums[1];
    trials = kTrials;
    return true;
  }

  template <int kN>
  __device__ __forceinline__ void rescale_accumulator(float (&acc_o)[kN][4]) const {
    if (!rescales) return;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc_o[n][i] *= rescale[i / 2];
    }
  }
};

// Sets the scores that the mask hides to -inf. `row0`, `col0`: the thread's first row and column.
// Unlike the common apply_mask() it compares with constants, which spills nothing here; v2 would be
// 4 to 9% slower with it.
template <int kN>
__device__ __forceinline__ void mask_scores(float (&acc_s)[kN][4], const Mask& mask, int row0,
                                            int col0) {
  const int end[2] = {mask.key_end(row0) - col0, mask.key_end(row0 + 8) - col0};
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (8 * n + i % 2 >= end[i / 2]) acc_s[n][i] = -INFINITY;
    }
  }
}

}  // namespace flash_ext::v3::forward
