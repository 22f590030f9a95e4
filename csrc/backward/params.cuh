// What every kernel of the backward gets, and the arithmetic they share.
#pragma once

#include "backward/workspace.h"
#include "common/online_softmax.cuh"
#include "common/tile_order.cuh"
#include "params.h"
#include "sm80/warp_gemm.cuh"

namespace flash_ext::backward {

struct KernelParams {
  TensorView q, k, v, out, dout, dq, dk, dv;
  const float* lse;
  const float* dlse;  // nullptr: no gradient reached L
  Mask mask;
  SoftmaxScale scale;
  float softmax_scale;
  int head_dim;
  Divisor heads_q;
  Divisor heads_kv;
  Divisor group_size;
  Divisor num_parts;           // of a group, see backward/parts.h
  Divisor parts_per_sequence;  // heads_kv * num_parts
  int heads_per_part;
  int padded_seqlen_q;
  TileOrder order{};  // of the kernel's own tiles
  // Sections of the workspace, see BackwardWorkspace.
  float* lse_log2;
  float* delta;
  float* dq_row_sum;  // -dL, and where dQ comes from K as it is, rowsum(dS) - dL
  float* key_mean;
  float* dq_accum;
  float* dk_parts;
  float* dv_parts;

  KernelParams(const BackwardParams& params, int64_t num_parts)
      : q(params.q),
        k(params.k),
        v(params.v),
        out(params.out),
        dout(params.dout),
        dq(params.dq),
        dk(params.dk),
        dv(params.dv),
        lse(static_cast<const float*>(params.lse)),
        dlse(static_cast<const float*>(params.dlse)),
        mask(params.mask),
        scale(params.softmax_scale),
        softmax_scale(static_cast<float>(params.softmax_scale)),
        head_dim(static_cast<int>(params.shape.head_dim)),
        heads_q(params.shape.heads_q),
        heads_kv(params.shape.heads_kv),
        group_size(params.shape.group_size()),
        num_parts(num_parts),
        parts_per_sequence(params.shape.heads_kv * num_parts),
        heads_per_part(static_cast<int>(params.shape.group_size() / num_parts)) {
    const BackwardWorkspace sections(params, num_parts);
    padded_seqlen_q = static_cast<int>(sections.padded_seqlen_q);
    lse_log2 = params.workspace + sections.lse_log2;
    delta = params.workspace + sections.delta;
    dq_row_sum = params.workspace + sections.dq_row_sum;
    key_mean = params.workspace + sections.key_mean;
    dq_accum =
        BackwardWorkspace::accumulates_dq(params) ? params.workspace + sections.dq_accum : nullptr;
    dk_parts = params.workspace + sections.dk_parts;
    dv_parts = params.workspace + sections.dv_parts;
  }
};

// P = exp2(S - L) in place; hidden scores give exactly 0. `row0`: the thread's first row of the
// block.
//
// Where |L| is huge, one rounding of it is more than any difference between scores. The forward's L
// is then the rounded scaled maximum itself, and so is `lse`, L in natural units: rounded in the
// same way, the scores meet it exactly.
template <int kM, int kN>
__device__ __forceinline__ void recompute_p(float (&acc_s)[kM][kN][4], const float* lse_log2,
                                            const float* lse, const SoftmaxScale& scale, int row0) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 16 * m + 8 * half;
      const float row_lse_log2 = lse_log2[row];
      const bool is_huge = fabsf(row_lse_log2) > kHugeLog2 && row_lse_log2 != INFINITY;
      const float factor = is_huge ? static_cast<float>(kLog2e) : scale.log2;
      const float subtrahend = is_huge ? 0.f : row_lse_log2;
      if (is_huge) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          float* s = &acc_s[m][n][2 * half];
          s[0] = fminf(__fmul_rn(s[0], scale.natural) - lse[row], 0.f);
          s[1] = fminf(__fmul_rn(s[1], scale.natural) - lse[row], 0.f);
        }
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& s = acc_s[m][n][2 * half + i];
          s = ptx::exp2_approx(__fmaf_rn(s, factor, -subtrahend));
        }
      }
    }
  }
}

// dS = P * (dP - delta), in place of dP.
template <int kM, int kN>
__device__ __forceinline__ void compute_ds(float (&acc_dp)[kM][kN][4],
                                           const float (&acc_p)[kM][kN][4], const float* delta,
                                           int row0) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float d = delta[row0 + 16 * m + 8 * half];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& dp = acc_dp[m][n][2 * half + i];
          dp = acc_p[m][n][2 * half + i] * (dp - d);
        }
      }
    }
  }
}

// The last step of dQ = scale * (dS K - (rowsum(dS) - dL) mean(K)^T), or of the same from K without
// its mean, scale * (dS K' + dL mean(K)^T). Exactly, a row of dS sums to dL, the gradient of its
// log-sum-exp; rounded, it does not, and the remainder times a large mean of K is an error of 10 to
// 50% in dQ on biased keys. Any vector near the mean removes it.
template <int kM, int kN>
__device__ __forceinline__ void correct_and_scale_dq(float (&acc_dq)[kM][kN][4],
                                                     const float (&row_sum_error)[kM][2],
                                                     const float* key_mean, float softmax_scale,
                                                     int col0) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 mean = *reinterpret_cast<const float2*>(key_mean + col0 + 8 * n);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* dq = &acc_dq[m][n][2 * half];
        dq[0] = softmax_scale * (dq[0] - row_sum_error[m][half] * mean.x);
        dq[1] = softmax_scale * (dq[1] - row_sum_error[m][half] * mean.y);
      }
    }
  }
}

}  // namespace flash_ext::backward
