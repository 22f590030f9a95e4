// Division by a number that the host knows. Hopper divides integers in some 150 clocks, and a
// thread block that finds its place in a grid divides four times before it loads anything.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace flash_ext {

// n / divisor for 0 <= n < 2^31 by a multiplication (Granlund and Montgomery 1994): with
// 2^s >= divisor and m = ceil(2^(31 + s) / divisor), n m is too large by less than 2^(31 + s).
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t divisor) : value_(static_cast<uint32_t>(divisor < 1 ? 1 : divisor)) {
    while ((int64_t{1} << (shift_ - 31)) < value_) ++shift_;
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + value_ - 1) / value_);
  }

  FLASH_HOST_DEVICE operator int() const { return static_cast<int>(value_); }
  friend __device__ __forceinline__ int operator/(int n, const Divisor& d) {
    return static_cast<int>((uint64_t{static_cast<uint32_t>(n)} * d.multiplier_) >> d.shift_);
  }
  friend __device__ __forceinline__ int operator%(int n, const Divisor& d) { return n - n / d * d; }

 private:
  uint32_t value_ = 1;
  uint32_t multiplier_ = 1u << 31;
  uint32_t shift_ = 31;
};

}  // namespace flash_ext
