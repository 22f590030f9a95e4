// The scalar steps of the online softmax, shared by every kernel on every device. The CUDA kernels
// keep logits in units of log2, x = softmax_scale * log2(e) * (q . k), so that a weight is one
// exp2; the CPU kernels keep them in natural units, where L needs no conversion and loses nothing
// to one.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace flash_ext {

inline constexpr double kLog2e = 1.4426950408889634074;

// What q . k is multiplied by. A scale of 0 becomes 1e-30: every weight is still exactly 1, and the
// -inf of a masked score stays -inf instead of 0 * -inf = NaN.
inline double softmax_scale_log2(double softmax_scale) {
  return softmax_scale == 0.0 ? 1e-30 : softmax_scale * kLog2e;
}

// The value that is subtracted in the exponent. A row that has seen no key yet has the maximum
// -inf; subtracting 0 instead makes its weights exp2(-inf) = 0 where -inf - -inf would be NaN.
template <typename T>
FLASH_HOST_DEVICE T guarded_max(T row_max) {
  return row_max == static_cast<T>(-INFINITY) ? static_cast<T>(0) : row_max;
}

// 1 / l; 0 for a row with no visible key, whose output is thereby 0.
template <typename T>
FLASH_HOST_DEVICE T inverse_sum(T row_sum) {
  return row_sum > static_cast<T>(0) ? static_cast<T>(1) / row_sum : static_cast<T>(0);
}

// L = m + log l; -inf for a row with no visible key.
template <typename T>
FLASH_HOST_DEVICE T log_sum_exp(T row_max, T row_sum) {
  return row_sum > static_cast<T>(0) ? row_max + std::log(row_sum) : static_cast<T>(-INFINITY);
}

// The log-sum-exp as the backward subtracts it. An empty row gets +inf, so that its recomputed
// weights exp(x - inf) are 0.
template <typename T>
FLASH_HOST_DEVICE T backward_lse(T lse) {
  return lse == static_cast<T>(-INFINITY) ? static_cast<T>(INFINITY) : lse;
}

// The same in units of log2.
template <typename T>
FLASH_HOST_DEVICE T backward_lse_log2(T lse) {
  return backward_lse(lse) * static_cast<T>(kLog2e);
}

}  // namespace flash_ext
