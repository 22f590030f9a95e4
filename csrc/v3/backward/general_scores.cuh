// What window, softcap and ALiBi do to the scores of a block, as scores.cuh holds them: rows are
// keys, columns are queries.
#pragma once

#include "common/numeric.cuh"
#include "common/online_softmax.cuh"
#include "v3/backward/scores.cuh"

namespace flash_ext::v3::backward {

// As for a Mask, with an end, too; `hidden` takes the place of scores that the band hides.
template <int kN>
__device__ __forceinline__ void hide_scores(float (&acc_s)[kN][4], const BandMask& mask,
                                            float hidden, int key0, int row0) {
  int begin[2], end[2];  // the columns that see the key
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = key0 + 8 * half;
    const bool is_key = key < mask.seqlen_k;
    begin[half] = is_key ? mask.row_begin(key) - row0 : 8 * kN;
    end[half] = is_key ? mask.row_end(key) - row0 : 0;
  }
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int col = 8 * n + i % 2;
      if (col < begin[i / 2] || col >= end[i / 2]) acc_s[n][i] = hidden;
    }
  }
}

template <int kN>
__device__ __forceinline__ void mask_scores(float (&acc_s)[kN][4], const BandMask& mask,
                                            bool negate, int key0, int row0) {
  hide_scores(acc_s, mask, negate ? INFINITY : -INFINITY, key0, row0);
}

// |i + diagonal - j| of an element, from what is in it of the thread's first query and key.
__device__ __forceinline__ float distance_of(float first, int n, int i) {
  return fabsf(first + static_cast<float>(8 * n + i % 2 - 8 * (i / 2)));
}

template <int kN>
__device__ __forceinline__ void add_alibi(float (&acc_s)[kN][4], float slope,
                                          float first_distance) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc_s[n][i] = __fmaf_rn(slope, distance_of(first_distance, n, i), acc_s[n][i]);
    }
  }
}

// Scores under a softcap become t = tanh(score / cap). tanh.approx errs by 2^-11 of its result,
// which a cap makes 1% of a weight; this by 2^-22 of 1, wherefore v3 refuses large caps
// (kMaxSoftcap).
template <int kN>
__device__ __forceinline__ void apply_tanh(float (&acc_s)[kN][4], float tanh_exponent) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float inverse = ptx::rcp_approx(1.f + ptx::exp2_approx(acc_s[n][i] * tanh_exponent));
      acc_s[n][i] = __fmaf_rn(-2.f, inverse, 1.f);
    }
  }
}

// Stands for the t of a hidden score. Its weight becomes 0, and so does weight * t^2, as of -inf it
// would not.
inline constexpr float kHiddenTanh = -1e18f;

// From these t, P in their place, and dS times the softcap's derivative, 1 - t^2, in place of dP.
// Both at once, for which dP has to be there: beside t, dP in flight and the operand P there is no
// room for P (1 - t^2). `lse_log2`, `delta`: of the thread's first column.
template <bool kHasAlibi, int kN>
__device__ __forceinline__ void compute_capped_p_ds(float (&acc_t)[kN][4], float (&acc_dp)[kN][4],
                                                    const float* lse_log2, const float* delta,
                                                    float cap_log2, float slope,
                                                    float first_distance) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 lse = *reinterpret_cast<const float2*>(lse_log2 + 8 * n);
    const float2 d = *reinterpret_cast<const float2*>(delta + 8 * n);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float t = acc_t[n][i];
      float x = __fmaf_rn(t, cap_log2, -(i % 2 == 0 ? lse.x : lse.y));
      if (kHasAlibi) x = __fmaf_rn(slope, distance_of(first_distance, n, i), x);
      const float p = ptx::exp2_approx(x);
      acc_t[n][i] = p;
      acc_dp[n][i] = __fmaf_rn(-p * t, t, p) * (acc_dp[n][i] - (i % 2 == 0 ? d.x : d.y));
    }
  }
}

}  // namespace flash_ext::v3::backward
