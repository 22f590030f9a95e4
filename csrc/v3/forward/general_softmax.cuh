// The online softmax of general calls, which takes a part of what happens to scores into its
// exponents: they are computed beside the exp2, which wait for the special functions, and not
// before the row maximum, for which everything waits.
#pragma once

#include "v3/forward/general_scores.cuh"
#include "v3/forward/softmax.cuh"

namespace flash_ext::v3::forward {

// kInExponents: for that. It costs five registers, which kernels with dropout have not.
template <bool kInExponents>
struct GeneralSoftmax : Softmax {
  // Of this block's scores. Exponents are scores * scale - max_log2 - offset_log2, or, under a
  // softcap, scores * cap_factor(scores) - max_log2.
  float offset[2] = {0.f, 0.f};  // what the scores of a row are too large by
  float polynomial[3];

  // From Q K^T to what update_max() takes, but for what the band hides. `row0`, `col0`: the
  // thread's first row and column.
  template <int kN>
  __device__ __forceinline__ void finish_scores(float (&acc_s)[kN][4], const GeneralKernelParams& p,
                                                float slope, int distance) {
    offset[0] = offset[1] = 0.f;
    polynomial[0] = polynomial[1] = polynomial[2] = 0.f;
    if (p.softcap.is_on) cap_scores(acc_s, p.softcap);
    if (p.alibi_slopes.data != nullptr) add_alibi(acc_s, slope, distance);
  }

  template <int kN>
  __device__ __forceinline__ void update_max(float (&acc_s)[kN][4], const GeneralKernelParams& p,
                                             float factor_log2) {
    float block_max[2];
    bool grows[2];
    const bool is_capped_later = is_in_exponents(p.softcap);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      block_max[half] = max_of_row(acc_s, half) - offset[half];
      if (is_capped_later) {
        // By the factor of a score of 0, from which others differ by 2%: 0.2 at a cap of 30.
        grows[half] = fmaf(block_max[half], polynomial[0], -row_max[half]) > kMaxLagLog2;
        block_max[half] *= cap_factor(block_max[half], polynomial);
      } else {
        grows[half] = exceeds_lag(block_max[half], half, p.scale.log2);
      }
    }
    raise_max(acc_s, block_max, grows, p.scale.log2, factor_log2);
  }

  template <int kBegin, int kEnd, int kN>
  __device__ __forceinline__ void weights(float (&acc_s)[kN][4], const GeneralKernelParams& p) {
    if (is_in_exponents(p.softcap)) {
      Softmax::weights<kBegin, kEnd>(acc_s, [&](float s, int half) {
        return fmaf(s, cap_factor(s, polynomial), -max_log2[half]);
      });
      return;
    }
    const float base[2] = {fmaf(offset[0], p.scale.log2, max_log2[0]),
                           fmaf(offset[1], p.scale.log2, max_log2[1])};
    Softmax::weights<kBegin, kEnd>(
        acc_s, [&](float s, int half) { return __fmaf_rn(s, p.scale.log2, -base[half]); });
  }

 private:
  __device__ __forceinline__ static bool is_in_exponents(const Softcap& softcap) {
    return kInExponents && softcap.is_on && softcap.is_in_exponent;
  }

  // softcap * tanh(s * scale / softcap), in units of log2 and to 2^-21 of the cap (2^-24 in the
  // mean). Where no score of the warp's comes near the cap, as is usual, a polynomial does, which
  // needs no special function: exp2 alone takes them as long as the tensor cores take both products
  // at d=64. (tanh.approx is right to 2^-11 only: at a cap of 30 that is 1.5% of weight.)
  template <int kN>
  __device__ __forceinline__ void cap_scores(float (&acc_s)[kN][4], const Softcap& softcap) {
    const bool is_near = is_near_cap(acc_s, softcap);
    if (is_near) {
      cap_by_exponential(acc_s, softcap);
    } else if (!is_in_exponents(softcap)) {
      cap_by_polynomial(acc_s, softcap);
    }
    // Of scores that have been capped: 1, and for -inf not 0 * inf.
    polynomial[0] = is_near ? 1.f : softcap.polynomial[0];
    polynomial[1] = is_near ? 0.f : softcap.polynomial[1];
    polynomial[2] = is_near ? 1e-37f : softcap.polynomial[2];
  }

  // Left or right of the diagonal the distance grows by columns, and what it is in the first one is
  // for the exponents to subtract: one instruction a score instead of two.
  template <int kN>
  __device__ __forceinline__ void add_alibi(float (&acc_s)[kN][4], float slope, int distance) {
    const bool is_left = distance >= 8 * kN;
    const bool is_right = distance + 8 <= 0;
    const float sign = is_left ? 1.f : -1.f;
    if (!kInExponents) {
      add_distances(acc_s, slope, distance);
    } else if (__all_sync(0xffffffffu, is_left) || __all_sync(0xffffffffu, is_right)) {
      add_columns(acc_s, sign * slope);
      offset[0] = sign * slope * static_cast<float>(distance);
      offset[1] = sign * slope * static_cast<float>(distance + 8);
    } else {
      add_distances(acc_s, slope, distance);
    }
  }
};

}  // namespace flash_ext::v3::forward
