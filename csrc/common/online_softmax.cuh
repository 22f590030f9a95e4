// Online softmax on mma accumulators. A thread of a warp holds, of each 16x8 tile, two rows
// (lane / 4 and lane / 4 + 8) and two columns; the four threads of a quad share a row.
#pragma once

#include "common/mask.h"
#include "common/softmax_math.h"
#include "ptx/math.cuh"

namespace flash_ext {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// The scale as kernels apply it: |scale| goes into the exponent's FMA, the sign into the scores,
// for the running maximum must be that of the scaled scores.
struct SoftmaxScale {
  float natural;  // |softmax_scale|
  float log2;     // |softmax_scale| * log2(e)
  bool negate;    // softmax_scale < 0

  explicit SoftmaxScale(double softmax_scale)
      : natural(static_cast<float>(std::fabs(softmax_scale))),
        log2(static_cast<float>(std::fabs(softmax_scale_log2(softmax_scale)))),
        negate(softmax_scale < 0) {}

  template <int kM, int kN>
  __device__ __forceinline__ void apply_sign(float (&acc_s)[kM][kN][4]) const {
    if (!negate) return;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc_s[m][n][i] = -acc_s[m][n][i];
  }
};

// Sets the scores that the mask hides to -inf. `row0`, `col0`: the thread's first row and column.
template <int kM, int kN>
__device__ __forceinline__ void apply_mask(float (&acc_s)[kM][kN][4], const Mask& mask, int row0,
                                           int col0) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key_end = mask.key_end(row0 + 16 * m + 8 * half);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (col0 + 8 * n + i >= key_end) acc_s[m][n][2 * half + i] = -INFINITY;
        }
      }
    }
  }
}

// In units of log2, logits beyond this are huge: their rounding, 2^-4, is no longer small
// against 1.
inline constexpr float kHugeLog2 = 1048576.f;

// What is subtracted in the exponent of a row: exp2((s - shift) * scale_log2 - max_log2). Usually
// it is the rounded max_log2 alone, so that a weight is one FMA and one exp2. But the FMA does not
// round s * scale_log2, and the rounded maximum of huge scores may lie far from it: there the
// maximum itself is subtracted first.
struct ExponentBase {
  float shift;
  float max_log2;

  __device__ __forceinline__ ExponentBase(float row_max, float scale_log2) {
    const float scaled = guarded_max(row_max) * scale_log2;
    const bool is_huge = fabsf(scaled) > kHugeLog2;
    shift = is_huge ? row_max : 0.f;
    max_log2 = is_huge ? 0.f : scaled;
  }

  // What weights relative to `old_max` are multiplied by to be relative to this base. Both maxima
  // are scaled and rounded before they are subtracted, exactly as in the exponents: at logits of
  // 1e5 the rounding alone would otherwise be a factor of 1.005. Hence no FMA; and a maximum that
  // has not moved gives exactly 1, where 1 + 2^-23 a block would be 3% after 33 million keys.
  __device__ __forceinline__ float rescale(float old_max, float scale_log2) const {
    return ptx::exp2_approx(__fsub_rn(__fmul_rn(old_max - shift, scale_log2), max_log2));
  }
};

template <int kM>
struct OnlineSoftmax {
  float row_max[kM][2];  // of the unscaled scores
  float row_sum[kM][2];  // this thread's columns only, until finalize()

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      row_max[m][0] = row_max[m][1] = -INFINITY;
      row_sum[m][0] = row_sum[m][1] = 0.f;
    }
  }

  // Turns scores into weights and brings row_sum and acc_o to the new maximum.
  template <int kN, int kNO>
  __device__ __forceinline__ void update(float (&acc_s)[kM][kN][4], float (&acc_o)[kM][kNO][4],
                                         float scale_log2) {
    bool max_moved = false;
    bool shifts = false;
    float max_log2[kM][2];
    float rescale[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float new_max = row_max[m][half];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          new_max = fmaxf(new_max, fmaxf(acc_s[m][n][2 * half], acc_s[m][n][2 * half + 1]));
        }
        new_max = quad_max(new_max);
        const ExponentBase base(new_max, scale_log2);
        max_log2[m][half] = base.max_log2;
        rescale[m][half] = base.rescale(row_max[m][half], scale_log2);
        max_moved |= new_max > row_max[m][half];
        shifts |= base.shift != 0.f;
        row_max[m][half] = new_max;
      }
    }
    // Multiplying by 1 changes nothing, so a warp none of whose rows met a new maximum does not.
    if (__any_sync(0xffffffffu, max_moved)) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) row_sum[m][half] *= rescale[m][half];
#pragma unroll
        for (int n = 0; n < kNO; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc_o[m][n][i] *= rescale[m][i / 2];
        }
      }
    }
    if (shifts) shift_scores(acc_s, scale_log2);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& s = acc_s[m][n][i];
          s = ptx::exp2_approx(__fmaf_rn(s, scale_log2, -max_log2[m][i / 2]));
          row_sum[m][i / 2] += s;
        }
      }
    }
  }

  // For the rare rows with huge scores, see ExponentBase.
  template <int kN>
  __device__ __forceinline__ void shift_scores(float (&acc_s)[kM][kN][4], float scale_log2) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float shift = ExponentBase(row_max[m][half], scale_log2).shift;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          acc_s[m][n][2 * half] -= shift;
          acc_s[m][n][2 * half + 1] -= shift;
        }
      }
    }
  }

  // Takes in another walk over other keys of the same row: its maximum and this thread's share of
  // its sum. Returns the factors of this walk's and of the other's acc_o.
  __device__ __forceinline__ float2 join_row(int m, int half, float other_max, float other_sum,
                                             float scale_log2) {
    const float new_max = fmaxf(row_max[m][half], other_max);
    const ExponentBase base(new_max, scale_log2);
    const float2 rescale = make_float2(base.rescale(row_max[m][half], scale_log2),
                                       base.rescale(other_max, scale_log2));
    row_max[m][half] = new_max;
    row_sum[m][half] = row_sum[m][half] * rescale.x + other_sum * rescale.y;
    return rescale;
  }

  // Joins the quad's sums, divides acc_o by them and leaves the log-sum-exp in row_max.
  template <int kNO>
  __device__ __forceinline__ void finalize(float (&acc_o)[kM][kNO][4], float scale_natural) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(row_sum[m][half]);
        const float inverse = inverse_sum(sum);
        row_max[m][half] = log_sum_exp(row_max[m][half] * scale_natural, sum);
#pragma unroll
        for (int n = 0; n < kNO; ++n) {
          acc_o[m][n][2 * half] *= inverse;
          acc_o[m][n][2 * half + 1] *= inverse;
        }
      }
    }
  }

  // The same where a logit `sink` takes part in the softmax of every row (-inf: none does), and
  // acc_o is multiplied by `out_factor` besides.
  template <int kNO>
  __device__ __forceinline__ void finalize(float (&acc_o)[kM][kNO][4], float scale_natural,
                                           float sink, float out_factor) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float own_max = row_max[m][half] * scale_natural;
        const float joint_max = fmaxf(own_max, sink);
        const float base = guarded_max(joint_max);
        const float own_factor = ptx::exp2_approx((own_max - base) * static_cast<float>(kLog2e));
        const float sum = quad_sum(row_sum[m][half]) * own_factor +
                          ptx::exp2_approx((sink - base) * static_cast<float>(kLog2e));
        const float factor = inverse_sum(sum) * own_factor * out_factor;
        row_max[m][half] = log_sum_exp(joint_max, sum);
#pragma unroll
        for (int n = 0; n < kNO; ++n) {
          acc_o[m][n][2 * half] *= factor;
          acc_o[m][n][2 * half + 1] *= factor;
        }
      }
    }
  }
};

}  // namespace flash_ext
