// What general calls do to the scores of a warpgroup's 64 rows: softcap, ALiBi, both edges of a
// window, sinks. A thread holds the columns 8 n and 8 n + 1 from its first one, of two rows eight
// apart. Every branch is one that all threads of a warp take alike.
#pragma once

#include "common/mask.h"
#include "common/softmax_math.h"
#include "ptx/math.cuh"
#include "v3/forward/kernel_params.cuh"
#include "v3/forward/softmax.cuh"

namespace flash_ext::v3::forward {

// Scores of which some are near the cap: tanh(y) = 1 - 2 / (1 + e^2y). Four share a reciprocal,
// for special functions are what limits it. Beyond e^2y = 2^30 the tanh is 1, and the product of
// four does not overflow. A NaN takes no part: it may be that of a key which is hidden later.
__device__ __forceinline__ void cap_by_exponential(float (&s)[4], const Softcap& softcap) {
  constexpr float kMaxExponent = 30.f;
  float a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a[i] = 1.f + ptx::exp2_approx(fminf(s[i] * softcap.exponent, kMaxExponent));
  }
  const float ab = a[0] * a[1];
  const float cd = a[2] * a[3];
  const float inverse = ptx::rcp_approx(ab * cd);
  const float inverse_ab = inverse * cd;
  const float inverse_cd = inverse * ab;
  const float inverses[4] = {inverse_ab * a[1], inverse_ab * a[0], inverse_cd * a[3],
                             inverse_cd * a[2]};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float capped = fmaf(-2.f * softcap.cap, inverses[i], softcap.cap);
    s[i] = s[i] == s[i] ? capped : s[i];
  }
}

// Whether any score of the warp's is near the cap.
template <int kN>
__device__ __forceinline__ bool is_near_cap(const float (&acc_s)[kN][4], const Softcap& softcap) {
  float largest[2] = {0.f, 0.f};
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) largest[i % 2] = fmaxf(largest[i % 2], fabsf(acc_s[n][i]));
  }
  return __any_sync(0xffffffffu, fmaxf(largest[0], largest[1]) > softcap.max_polynomial);
}

// c0 + c1 s^2 + c2 s^4: times s it is the capped score.
__device__ __forceinline__ float cap_factor(float s, const float (&polynomial)[3]) {
  const float square = s * s;
  return fmaf(square, fmaf(square, polynomial[2], polynomial[1]), polynomial[0]);
}

template <int kN>
__device__ __forceinline__ void cap_by_exponential(float (&acc_s)[kN][4], const Softcap& softcap) {
#pragma unroll
  for (int n = 0; n < kN; ++n) cap_by_exponential(acc_s[n], softcap);
}

template <int kN>
__device__ __forceinline__ void cap_by_polynomial(float (&acc_s)[kN][4], const Softcap& softcap) {
  const float tanh[3] = {Softcap::kTanh0, Softcap::kTanh1, Softcap::kTanh2};
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Not the factors of CappedExponent, which ptxas would keep until here.
      const float y = acc_s[n][i] * softcap.inverse;
      acc_s[n][i] = softcap.cap * y * cap_factor(y, tanh);
    }
  }
}

// softcap * tanh(s * scale / softcap), in units of log2 and to 2^-21 of the cap (2^-24 in the
// mean). Where no score of the warp's comes near the cap, as is usual, a polynomial does, which
// needs no special function: exp2 alone takes them as long as the tensor cores take both products
// at d=64. (tanh.approx is right to 2^-11 only: at a cap of 30 that is 1.5% of weight.)
template <int kN>
__device__ __forceinline__ void cap_scores(float (&acc_s)[kN][4], const Softcap& softcap) {
  if (is_near_cap(acc_s, softcap)) {
    cap_by_exponential(acc_s, softcap);
  } else {
    cap_by_polynomial(acc_s, softcap);
  }
}

// How large a weight may be that is tried by CappedExponent. Known before: between the weights and
// the vote on them it is waited for, which takes 1.05 times as long at d=64, 1.03 at d=128 (H200).
struct CappedSoftmax : Softmax {
  float most_weight[2];

  __device__ __forceinline__ void limit_weights(const Softcap& softcap) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float limit = ptx::exp2_approx(softcap.limit_log2 - max_log2[half]);
      most_weight[half] = max_log2[half] < 0.f ? -1.f : fminf(kMostWeight, limit);
    }
  }
};

// The polynomial as a part of the exponents, beside the exp2 and not before the row maximum, for
// weights that are tried by the maximum so far. That it holds, for all scores of a row, shows in
// their sum: none is larger than the weight of the last score for which it does. Of scores as far
// below 0 it makes too little, by less than 2^-18 of the weight of a score of 0, see Softcap: rows
// whose maximum is below that are not tried.
struct CappedExponent {
  float polynomial[3];
  float max_log2[2];
  float most_weight[2];

  __device__ __forceinline__ CappedExponent(const Softcap& softcap, const CappedSoftmax& softmax)
      : polynomial{softcap.polynomial[0], softcap.polynomial[1], softcap.polynomial[2]},
        max_log2{softmax.max_log2[0], softmax.max_log2[1]},
        most_weight{softmax.most_weight[0], softmax.most_weight[1]} {}

  __device__ __forceinline__ float operator()(float s, int half) const {
    return fmaf(s, cap_factor(s, polynomial), -max_log2[half]);
  }
  __device__ __forceinline__ float most(int half) const { return most_weight[half]; }
};

// Subtracts slope * |i + diagonal - j|. `distance`: of the thread's first row and column. In fp32,
// where one beyond 2^24 is rounded as its product with the slope is anyway.
template <int kN>
__device__ __forceinline__ void add_distances(float (&acc_s)[kN][4], float slope, int distance) {
  const float first = static_cast<float>(distance);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float offset = static_cast<float>(8 * (i / 2) - 8 * n - i % 2);
      acc_s[n][i] = fmaf(-slope, fabsf(first + offset), acc_s[n][i]);
    }
  }
}

// Sets the scores behind the band to -inf: beyond the window's right edge, the diagonal of a causal
// mask or the last key. Two functions, as few blocks lie on both edges.
template <int kN>
__device__ __forceinline__ void hide_keys_behind(float (&acc_s)[kN][4], const BandMask& band,
                                                 int row0, int col0) {
  const int end[2] = {band.key_end(row0) - col0, band.key_end(row0 + 8) - col0};
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (8 * n + i % 2 >= end[i / 2]) acc_s[n][i] = -INFINITY;
    }
  }
}

// The same before the band: the window's left edge.
template <int kN>
__device__ __forceinline__ void hide_keys_before(float (&acc_s)[kN][4], const BandMask& band,
                                                 int row0, int col0) {
  const int begin[2] = {band.key_begin(row0) - col0, band.key_begin(row0 + 8) - col0};
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (8 * n + i % 2 < begin[i / 2]) acc_s[n][i] = -INFINITY;
    }
  }
}

// Takes a row's sink (-inf: none), a logit without a value, into its maximum and sum. Returns what
// the weights so far are to be multiplied by.
__device__ __forceinline__ float join_sink(float sink, float& max, float& sum) {
  const float own_max = max;
  max = fmaxf(own_max, sink);
  const float base = guarded_max(max);
  const float factor = ptx::exp2_approx((own_max - base) * static_cast<float>(kLog2e));
  sum = sum * factor + ptx::exp2_approx((sink - base) * static_cast<float>(kLog2e));
  return factor;
}

}  // namespace flash_ext::v3::forward
