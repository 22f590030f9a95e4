// The online softmax of general calls, some of which take a part of what happens to scores into the
// exponents: it is then computed beside the exp2, which wait for the special functions, and not
// before the row maximum, for which everything waits.
#pragma once

#include "v3/forward/general_scores.cuh"
#include "v3/forward/softmax.cuh"

namespace flash_ext::v3::forward {

// What is. One at most: with both as branches of a kernel even calls without either took 9 to 12%
// longer (H200), and kernels with masks or dropout have no registers for it.
enum class InExponents { kNone, kAlibi, kSoftcap };

template <InExponents kInExponents>
struct GeneralSoftmax : Softmax {
  static constexpr bool kCaps = kInExponents == InExponents::kSoftcap;
  float excess[2] = {0.f, 0.f};  // what the block's scores of a row are too large by, see alibi.cuh

  template <int kN>
  __device__ __forceinline__ void update_max(float (&acc_s)[kN][4], float scale_log2,
                                             float factor_log2, float max_lag_log2) {
    if constexpr (kInExponents == InExponents::kNone) {
      return Softmax::update_max(acc_s, scale_log2, factor_log2, max_lag_log2);
    }
    float block_max[2];
    bool grows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      block_max[half] = quad_max(own_max_of_row(acc_s, half) - excess[half]);
      grows[half] = exceeds(block_max[half], half, scale_log2, max_lag_log2);
    }
    raise_max(acc_s, block_max, grows, scale_log2, factor_log2);
  }

  // The same of scores that have yet to be capped. Usually none of the warp's comes near the cap,
  // and its polynomial becomes a part of the exponents: as tanh is monotonous, the maximum is that
  // of the scores as they are. Whether it is so is found out with the same vote as whether the
  // maximum grows. `hide(acc_s)` sets to -inf what the band hides (`hides`: whether it does any);
  // `add_bias` comes between the cap and the band.
  template <int kN, typename AddBias, typename Hide>
  __device__ __forceinline__ void update_capped_max(float (&acc_s)[kN][4], const Softcap& softcap,
                                                    const AddBias& add_bias, bool hides,
                                                    const Hide& hide) {
#pragma unroll
    for (int i = 0; i < 3; ++i) polynomial_[i] = softcap.polynomial[i];
    uint32_t least = 0;
    if (hides) {  // without the -inf to come
      least = least_bits(acc_s);
      hide();
    }
    float block_max[2];
    bool grows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) block_max[half] = positive_max(acc_s, half);
    if (!hides) least = least_bits(acc_s);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // By the factor of a score of 0, from which others differ by 2%: 0.2 at a cap of 30.
      grows[half] = fmaf(block_max[half], polynomial_[0], -row_max[half]) > kMaxLagLog2;
    }
    const bool is_near = fmaxf(block_max[0], block_max[1]) > softcap.max_polynomial ||
                         least > __float_as_uint(-softcap.max_polynomial);
    rescales = false;
    if (!__any_sync(0xffffffffu, grows[0] || grows[1] || is_near) && !shifts && softcap.is_last) {
      return;
    }
    if (__any_sync(0xffffffffu, is_near) || !softcap.is_last) {
      cap_scores(acc_s, softcap);
      add_bias();
      if (hides) hide();
      // Scores that have been capped are multiplied by 1, and -inf not by 0 * inf.
      polynomial_[0] = 1.f;
      polynomial_[1] = 0.f;
      polynomial_[2] = 1e-37f;
      true_max(acc_s, block_max);
    } else if (__any_sync(0xffffffffu, fminf(block_max[0], block_max[1]) == 0.f)) {
      true_max(acc_s, block_max);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      block_max[half] *= cap_factor(block_max[half], polynomial_);
      grows[half] = exceeds(block_max[half], half, 1.f, kMaxLagLog2);
    }
    raise_max(acc_s, block_max, grows, 1.f, 0.f);
  }

  __device__ __forceinline__ auto exponent(float scale_log2) const {
    if constexpr (kCaps) {
      return [this](float s, int half) {
        return fmaf(s, cap_factor(s, polynomial_), -max_log2[half]);
      };
    } else if constexpr (kInExponents == InExponents::kAlibi) {
      const float upper = fmaf(excess[0], scale_log2, max_log2[0]);
      const float lower = fmaf(excess[1], scale_log2, max_log2[1]);
      return
          [=](float s, int half) { return __fmaf_rn(s, scale_log2, half == 0 ? -upper : -lower); };
    } else {
      return Softmax::exponent(scale_log2);
    }
  }

 private:
  template <int kN>
  __device__ __forceinline__ static void true_max(const float (&acc_s)[kN][4],
                                                  float (&block_max)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) block_max[half] = quad_max(own_max_of_row(acc_s, half));
  }

  // The maximum of a row, 0 if no score is positive: of positive numbers the larger ones have the
  // larger bits.
  template <int kN>
  __device__ __forceinline__ static float positive_max(const float (&acc_s)[kN][4], int half) {
    int32_t even = 0, odd = 0;
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      even = ptx::max_of_bits(even, acc_s[n][2 * half], acc_s[n][2 * half + 1]);
      odd = ptx::max_of_bits(odd, acc_s[n + 1][2 * half], acc_s[n + 1][2 * half + 1]);
    }
    int32_t largest = max(even, odd);
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    return __int_as_float(max(largest, __shfl_xor_sync(0xffffffffu, largest, 2)));
  }

  // Of this thread's scores, the bits of the least one if that is negative: of negative numbers
  // those further from 0 have the larger bits.
  template <int kN>
  __device__ __forceinline__ static uint32_t least_bits(const float (&acc_s)[kN][4]) {
    uint32_t even = 0, odd = 0;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      even = ptx::max_of_bits(even, acc_s[n][0], acc_s[n][2]);
      odd = ptx::max_of_bits(odd, acc_s[n][1], acc_s[n][3]);
    }
    return max(even, odd);
  }

  float polynomial_[3];  // exponents are cap_factor() times the block's scores
};

}  // namespace flash_ext::v3::forward
