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
  static constexpr int kExpDegree = 7;
  // ln 2 in two parts; a multiple of the first by any exponent is exact.
  static constexpr float kLn2High = 0.693359375f;
  static constexpr float kLn2Low = -2.12194440e-4f;
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  static constexpr int kLanes = kVectorBytes / sizeof(double);
  static constexpr int kMantissaBits = 52;
  static constexpr int kMinExponent = -1022;
  static constexpr int kMaxExponent = 1023;
  static constexpr int kExpDegree = 13;
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
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

// The coefficients 1 / k! of exp(r). For |r| <= ln(2) / 2 the first term left out is less than a
// tenth of the last bit.
template <typename T>
struct ExpSeries {
  T coefficient[Simd<T>::kExpDegree + 1];

  constexpr ExpSeries() : coefficient() {
    double factorial = 1.0;
    for (int k = 0; k <= Simd<T>::kExpDegree; ++k) {
      if (k > 0) factorial *= k;
      coefficient[k] = static_cast<T>(1.0 / factorial);
    }
  }
};

// exp(x): with n = round(x / ln 2) and r = x - n ln 2, the series for exp(r) and n added to the
// exponent. Below the smallest normal number the result is 0; above the largest power of two it
// stays there.
template <typename T>
inline Vec<T> exp(Vec<T> x) {
  using S = Simd<T>;
  using Int = typename S::Int;
  constexpr ExpSeries<T> series;
  constexpr T kLn2 = static_cast<T>(0.69314718055994530942);
  constexpr T kLog2e = static_cast<T>(1.4426950408889634074);
  // Adding this rounds to an integer and leaves it in the low bits of the sum's mantissa.
  constexpr T kRound = static_cast<T>(int64_t{3} << (S::kMantissaBits - 1));

  const Vec<T> upper = broadcast<T>(S::kMaxExponent * kLn2);
  const Vec<T> lower = broadcast<T>(S::kMinExponent * kLn2);
  const Vec<T> clamped = x > upper ? upper : x;
  const Vec<T> rounded = clamped * kLog2e + kRound;
  const Vec<T> n = rounded - kRound;
  const Vec<T> r = (clamped - n * S::kLn2High) - n * S::kLn2Low;
  Vec<T> result = broadcast<T>(series.coefficient[S::kExpDegree]);
#pragma GCC unroll 16
  for (int k = S::kExpDegree - 1; k >= 0; --k) result = result * r + series.coefficient[k];
  const Int exponent = (Int)rounded - (Int)broadcast<T>(kRound) + S::kMaxExponent;
  return x < lower ? Vec<T>{} : result * (Vec<T>)(exponent << S::kMantissaBits);
}

}  // namespace flash_ext::cpu::FLASH_CPU_ISA
