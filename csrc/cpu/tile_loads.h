// Loads of strided rows into tiles, with conversion to the accumulation type. Part of
// tile_ops_impl.h.
#pragma once

#include "cpu/simd.h"
#include "cpu/tile_ops.h"

namespace flash_ext::cpu::FLASH_CPU_ISA {

inline Vec<float> load_lanes(const float* src) { return load<float>(src); }

inline Vec<double> load_lanes(const double* src) { return load<double>(src); }

// The bits of as many 16-bit numbers as there are lanes of float, each in the low half of its lane.
inline Simd<float>::Int load_bits16(const void* src) {
  typedef uint16_t Packed __attribute__((vector_size(kVectorBytes / 2)));
  Packed packed;
  __builtin_memcpy(&packed, src, sizeof(packed));
  return __builtin_convertvector(packed, Simd<float>::Int);
}

inline Vec<float> load_lanes(const c10::BFloat16* src) {
  return (Vec<float>)(load_bits16(src) << 16);
}

// Moves exponent and mantissa to where float has them and corrects the exponent's bias by a
// product, which normalises subnormal numbers as well; only infinity and NaN need the largest
// exponent set.
inline Vec<float> load_lanes(const c10::Half* src) {
  using Int = Simd<float>::Int;
  constexpr float kBias = 0x1p112f;  // 2^(127 - 15)
  const Int bits = load_bits16(src);
  const Int magnitude = (bits & 0x7fff) << 13;
  const Int finite = (Int)((Vec<float>)magnitude * kBias);
  const Int special = magnitude | 0x7f800000;
  const Int sign = (bits & 0x8000) << 16;
  return (Vec<float>)((magnitude >= (0x7c00 << 13) ? special : finite) | sign);
}

// The first `count` lanes from memory, the others 0.
template <typename Scalar>
inline Vec<Accum<Scalar>> load_first_lanes(const Scalar* src, int count) {
  alignas(Scalar) char lanes[Simd<Accum<Scalar>>::kLanes * sizeof(Scalar)] = {};
  __builtin_memcpy(lanes, src, count * sizeof(Scalar));
  return load_lanes(reinterpret_cast<const Scalar*>(lanes));
}

template <typename Scalar>
void load_tile(int rows, int cols, const Scalar* src, int64_t row_stride, Accum<Scalar>* tile,
               int64_t ld) {
  using T = Accum<Scalar>;
  constexpr int kLanes = Simd<T>::kLanes;
  for (int i = 0; i < rows; ++i, src += row_stride, tile += ld) {
    int c = 0;
    for (; c + kLanes <= cols; c += kLanes) store<T>(tile + c, load_lanes(src + c));
    if (c < cols) {
      store<T>(tile + c, load_first_lanes(src + c, cols - c));
      c += kLanes;
    }
    for (; c < ld; c += kLanes) store<T>(tile + c, Vec<T>{});
  }
}

// A vector's worth of columns at a time, so that the rows of the tile being written stay in cache.
template <typename Scalar>
void load_tile_transposed(int rows, int cols, const Scalar* src, int64_t row_stride,
                          Accum<Scalar>* tile, int64_t ld) {
  using T = Accum<Scalar>;
  constexpr int kLanes = Simd<T>::kLanes;
  for (int c = 0; c < cols; c += kLanes, tile += kLanes * ld) {
    const int count = cols - c < kLanes ? cols - c : kLanes;
    for (int i = 0; i < rows; ++i) {
      const Scalar* from = src + i * row_stride + c;
      T lanes[kLanes];
      store<T>(lanes, count == kLanes ? load_lanes(from) : load_first_lanes(from, count));
      for (int lane = 0; lane < count; ++lane) tile[lane * ld + i] = lanes[lane];
    }
    for (int lane = 0; lane < count; ++lane) {
      for (int64_t i = rows; i < ld; ++i) tile[lane * ld + i] = T{};
    }
  }
}

template <typename Scalar>
constexpr TileLoads<Scalar> make_tile_loads() {
  TileLoads<Scalar> loads{};
  loads.load = load_tile<Scalar>;
  loads.load_transposed = load_tile_transposed<Scalar>;
  return loads;
}

}  // namespace flash_ext::cpu::FLASH_CPU_ISA
