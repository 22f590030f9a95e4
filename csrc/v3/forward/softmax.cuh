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
inline constexpr float kMaxLagLog2 = 8.f;

struct Softmax {
  float row_max[2] = {-INFINITY, -INFINITY};  // of the unscaled scores; lags
  float row_sum[2] = {0.f, 0.f};              // this thread's columns only
  float max_log2[2] = {0.f, 0.f};             // what the exponents subtract
  float rescale[2];                           // what earlier weights are to be multiplied by
  bool rescales = false;                      // in this warp: some rescale is not 1
  bool shifts = false;                        // in this warp: huge scores, see ExponentBase
  bool is_settled = false;  // in this warp: all rows have seen a score, and none is huge

  // Takes in the block's scores. Afterwards weights() may turn them into weights, times
  // 2^factor_log2. `max_lag_log2`: by how much the maximum may lag.
  template <int kN>
  __device__ __forceinline__ void update_max(float (&acc_s)[kN][4], float scale_log2,
                                             float factor_log2, float max_lag_log2) {
    float block_max[2];
    bool grows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      block_max[half] = quad_max(own_max_of_row(acc_s, half));
      grows[half] = exceeds(block_max[half], half, scale_log2, max_lag_log2);
    }
    raise_max(acc_s, block_max, grows, scale_log2, factor_log2);
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

  __device__ __forceinline__ bool exceeds(float block_max, int half, float scale_log2,
                                          float lag_log2) const {
    return (block_max - row_max[half]) * scale_log2 > lag_log2;
  }

  template <int kN>
  __device__ __forceinline__ void raise_max(float (&acc_s)[kN][4], const float (&block_max)[2],
                                            const bool (&grows)[2], float scale_log2,
                                            float factor_log2) {
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

  // What 2 is raised to: a function of (score, half).
  __device__ __forceinline__ auto exponent(float scale_log2) const {
    return
        [this, scale_log2](float s, int half) { return __fmaf_rn(s, scale_log2, -max_log2[half]); };
  }

  // Scores to weights, and their sum, for the 8-column tiles [kBegin, kEnd).
  template <int kBegin, int kEnd, int kN, typename Exponent>
  __device__ __forceinline__ void weights(float (&acc_s)[kN][4], const Exponent& exponent) {
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int n = kBegin; n < kEnd; ++n) try_weights(acc_s[n], acc_s[n], sum, exponent);
    row_sum[0] += sum[0] + sum[1];
    row_sum[1] += sum[2] + sum[3];
  }

  // Of one such tile, by the maximum so far; `sum`: of this thread's weights of the block.
  template <typename Exponent>
  __device__ __forceinline__ static void try_weights(float (&weight)[4], const float (&score)[4],
                                                     float (&sum)[4], const Exponent& exponent) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weight[i] = ptx::exp2_approx(exponent(score[i], i / 2));
      sum[i] += weight[i];
    }
  }

  // Whether the weights that were tried stand, for the whole warp: none exceeds 2^kMaxLagLog2 where
  // the sums of a thread's do not, which NaN is not either. If not, update_max() and weights() are
  // to follow.
  __device__ __forceinline__ bool accept(const float (&sums)[2]) {
    constexpr float kMostSum = 256.f;
    const bool stand = sums[0] <= kMostSum && sums[1] <= kMostSum;
    if (!__all_sync(0xffffffffu, stand && is_settled)) return false;
    row_sum[0] += sums[0];
    row_sum[1] += sums[1];
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
