// P and dS from the accumulators of S^T and dP^T: rows are keys, columns are queries. A thread
// holds two rows, lane / 4 and lane / 4 + 8 of its warp's sixteen, and of eight columns 2 (lane %
// 4) and the next.
#pragma once

#include "common/numeric.cuh"
#include "common/online_softmax.cuh"

namespace flash_ext::v3::backward {

template <int kN>
__device__ __forceinline__ void clear(float (&acc)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] = 0.f;
  }
}

// The scores that the mask hides become weights of 0. `key0`, `row0`: the thread's first key and
// query.
template <int kN>
__device__ __forceinline__ void mask_scores(float (&acc_s)[kN][4], const Mask& mask, bool negate,
                                            int key0, int row0) {
  const float hidden = negate ? INFINITY : -INFINITY;
  int first[2];  // column that sees the key
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = key0 + 8 * half;
    first[half] = key < mask.seqlen_k ? mask.row_begin(key) - row0 : 8 * kN;
  }
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (8 * n + i % 2 < first[i / 2]) acc_s[n][i] = hidden;
    }
  }
}

// P = exp2(S - L) in place. `lse_log2`: of the thread's first column.
template <int kN>
__device__ __forceinline__ void recompute_p(float (&acc_s)[kN][4], const float* lse_log2,
                                            float scale_log2) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 lse = *reinterpret_cast<const float2*>(lse_log2 + 8 * n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc_s[n][i] =
          ptx::exp2_approx(__fmaf_rn(acc_s[n][i], scale_log2, -(i % 2 == 0 ? lse.x : lse.y)));
    }
  }
}

// Where |L| is huge, one rounding of it is more than any difference between scores. The forward's L
// is then the rounded scaled maximum itself, and so is `lse`, L in natural units: rounded in the
// same way, the scores meet it exactly. This subtracts it from the scores of such rows, for which
// recompute_p() finds 0 as L. `lse`: of the thread's first column, the first of `rows`.
template <int kN>
__device__ __forceinline__ void subtract_huge_lse(float (&acc_s)[kN][4], const float* lse, int rows,
                                                  float scale_log2, float scale_natural) {
  const float to_score = static_cast<float>(kLog2e) * ptx::rcp_approx(scale_log2);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int col = 8 * n + i;
      const float row_lse = col < rows ? lse[col] : 0.f;
      if (!is_huge_lse(row_lse)) continue;
      float* s = &acc_s[n][i];
      s[0] = fminf(__fmul_rn(s[0], scale_natural) - row_lse, 0.f) * to_score;
      s[2] = fminf(__fmul_rn(s[2], scale_natural) - row_lse, 0.f) * to_score;
    }
  }
}

// dS = P * (dP - delta) in place of dP. Where there is dropout, negative P are what it drops:
// dP counts as 0 there. See dropout.cuh.
template <bool kHasDropout, int kN>
__device__ __forceinline__ void compute_ds(float (&acc_dp)[kN][4], const float (&acc_p)[kN][4],
                                           const float* delta) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 d = *reinterpret_cast<const float2*>(delta + 8 * n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float dp = !kHasDropout || acc_p[n][i] >= 0.f ? acc_dp[n][i] : 0.f;
      const float p = kHasDropout ? fabsf(acc_p[n][i]) : acc_p[n][i];
      acc_dp[n][i] = p * (dp - (i % 2 == 0 ? d.x : d.y));
    }
  }
}

}  // namespace flash_ext::v3::backward
