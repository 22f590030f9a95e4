// The online softmax of general calls, some of which take a part of what happens to scores into the
// exponents: it is then computed beside the exp2, which wait for the special functions, and not
// before the row maximum, for which everything waits.
#pragma once

#include "v3/forward/general_scores.cuh"
#include "v3/forward/softmax.cuh"

namespace flash_ext::v3::forward {

// What is. One at most: as two branches of a kernel they made even calls without either 8% slower
// (H200), and kernels with masks or dropout have no registers for it.
enum class InExponents { kNone, kAlibi, kSoftcap };

template <InExponents kInExponents>
struct GeneralSoftmax : Softmax {
  static constexpr bool kCaps = kInExponents == InExponents::kSoftcap;

  // softcap * tanh(s * scale / softcap), in units of log2 and to 2^-21 of the cap (2^-24 in the
  // mean). Where no score of the warp's comes near the cap, as is usual, a polynomial does, which
  // needs no special function: exp2 alone takes them as long as the tensor cores take both products
  // at d=64. (tanh.approx is right to 2^-11 only: at a cap of 30 that is 1.5% of weight.)
  template <int kN>
  __device__ __forceinline__ void cap_scores(float (&acc_s)[kN][4], const Softcap& softcap) {
    const bool is_near = is_near_cap(acc_s, softcap);
    if (is_near) {
      cap_by_exponential(acc_s, softcap);
    } else if (!kCaps || !softcap.is_last) {
      cap_by_polynomial(acc_s, softcap);
    }
    // Scores that have been capped are multiplied by 1, and -inf not by 0 * inf.
    const bool is_done = is_near || !softcap.is_last;
    polynomial_[0] = is_done ? 1.f : softcap.polynomial[0];
    polynomial_[1] = is_done ? 0.f : softcap.polynomial[1];
    polynomial_[2] = is_done ? 1e-37f : softcap.polynomial[2];
  }

  // Left or right of the diagonal the distance grows by columns, and what it is in the first one is
  // for the exponents to subtract: one instruction a score instead of two. `distance`: see
  // add_distances().
  template <int kN>
  __device__ __forceinline__ void add_alibi(float (&acc_s)[kN][4], float slope, int distance) {
    if constexpr (kInExponents != InExponents::kAlibi) return add_distances(acc_s, slope, distance);
    const bool is_left = distance >= 8 * kN;
    const bool is_right = distance + 8 <= 0;
    if (__all_sync(0xffffffffu, is_left) || __all_sync(0xffffffffu, is_right)) {
      const float signed_slope = is_left ? slope : -slope;
      add_columns(acc_s, signed_slope);
      offset_[0] = signed_slope * static_cast<float>(distance);
      offset_[1] = signed_slope * static_cast<float>(distance + 8);
    } else {
      add_distances(acc_s, slope, distance);
      offset_[0] = offset_[1] = 0.f;
    }
  }

  template <int kN>
  __device__ __forceinline__ void update_max(float (&acc_s)[kN][4], float scale_log2,
                                             float factor_log2) {
    if constexpr (kInExponents == InExponents::kNone) {
      return Softmax::update_max(acc_s, scale_log2, factor_log2);
    }
    float block_max[2];
    bool grows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      block_max[half] = quad_max(own_max_of_row(acc_s, half) - offset_[half]);
      if constexpr (kCaps) {
        // By the factor of a score of 0, from which others differ by 2%: 0.2 at a cap of 30.
        grows[half] = fmaf(block_max[half], polynomial_[0], -row_max[half]) > kMaxLagLog2;
        block_max[half] *= cap_factor(block_max[half], polynomial_);
      } else {
        grows[half] = exceeds_lag(block_max[half], half, scale_log2);
      }
    }
    raise_max(acc_s, block_max, grows, scale_log2, factor_log2);
  }

  template <int kBegin, int kEnd, int kN>
  __device__ __forceinline__ void weights(float (&acc_s)[kN][4], float scale_log2) {
    if constexpr (kCaps) {
      Softmax::weights<kBegin, kEnd>(acc_s, [&](float s, int half) {
        return fmaf(s, cap_factor(s, polynomial_), -max_log2[half]);
      });
    } else if constexpr (kInExponents == InExponents::kAlibi) {
      const float base[2] = {fmaf(offset_[0], scale_log2, max_log2[0]),
                             fmaf(offset_[1], scale_log2, max_log2[1])};
      Softmax::weights<kBegin, kEnd>(
          acc_s, [&](float s, int half) { return __fmaf_rn(s, scale_log2, -base[half]); });
    } else {
      Softmax::weights<kBegin, kEnd>(acc_s, scale_log2);
    }
  }

 private:
  float offset_[2] = {0.f, 0.f};  // what the block's scores of a row are too large by
  float polynomial_[3];           // exponents are cap_factor() times the block's scores
};

}  // namespace flash_ext::v3::forward
