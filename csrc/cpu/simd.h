// SIMD vectors, by the vector extensions that GCC and clang share. Part of tile_ops_impl.h.
#pragma once

#include <cstdint>

namespace flash_ext::cpu::FLASH_CPU_ISA {

constexpr int kVectorBytes = FLASH_VECTOR_BYTES;

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / sizeof(float);
  static constexpr int kMantissaBits = 23;
  static constexpr int kMinExponent = -126;
  static constexpr int kMaxExponent = 127;
  static constexpr int kExp2Degree = 7;  // truncation 0.5 * 2^-24 of the result, |r| <= 1/2
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / sizeof(double);
  static constexpr int kMantissaBits = 52;
  static constexpr int kMinExponent = -1022;
  static constexpr int kMaxExponent = 1023;
  static constexpr int kExp2Degree = 13;
};

template <typename T>
using Vec = typename Simd<T>::Vec;

template <typename T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <typename T>
inline Vec<T> broadcast(T x) {
  return Vec<T>{} + x;
}

// The coefficients ln(2)^k / k! of 2^r.
template <typename T>
struct Exp2Series {
  T coefficient[Simd<T>::kExp2Degree + 1];

  constexpr Exp2Series() : coefficient() {
    double term = 1.0;
    for (int k = 0; k <= Simd<T>::kExp2Degree; ++k) {
      coefficient[k] = static_cast<T>(term);
      term *= 0.69314718055994530942 / (k + 1);
    }
  }
};

// 2^x: with n = round(x) and r = x - n, which is exact, a series for 2^r and n added to the exponent.
// Below the smallest normal number the result is 0; above the largest power of two it stays there.
template <typename T>
inline Vec<T> exp2(Vec<T> x) {
  using S = Simd<T>;
  using Int = typename S::Int;
  constexpr Exp2Series<T> series;
  // Adding this rounds to an integer and leaves it in the low bits of the sum's mantissa.
  constexpr T kRound = static_cast<T>(int64_t{3} << (S::kMantissaBits - 1));

  const Vec<T> upper = broadcast<T>(S::kMaxExponent);
  const Vec<T> clamped = x > upper ? upper : x;
  const Vec<T> rounded = clamped + kRound;
  const Vec<T> r = clamped - (rounded - kRound);
  Vec<T> result = broadcast<T>(series.coefficient[S::kExp2Degree]);
#pragma GCC unroll 16
  for (int k = S::kExp2Degree - 1; k >= 0; --k) result = result * r + series.coefficient[k];
  const Int n = (Int)rounded - (Int)broadcast<T>(kRound);
  const Vec<T> power = (Vec<T>)((n + S::kMaxExponent) << S::kMantissaBits);
  return x < broadcast<T>(S::kMinExponent) ? Vec<T>{} : result * power;
}

}  // namespace flash_ext::cpu::FLASH_CPU_ISA
