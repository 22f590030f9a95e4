// The tile operations, compiled once per instruction set: a tile_ops_<isa>.cpp includes tile_ops.h,
// switches its instruction set on, and includes this file with
//   FLASH_CPU_ISA         the namespace of this instruction set
//   FLASH_VECTOR_BYTES    the size of its vector registers
//   FLASH_MICRO_ROWS/VECS the block of C that the registers hold
// No function of the standard library is instantiated here: a copy of one that uses, say, AVX-512
// could be the copy that the linker keeps for the whole program.
#pragma once

#include "cpu/gemm.h"
#include "cpu/simd.h"
#include "cpu/tile_loads.h"
#include "cpu/tile_ops.h"

namespace flash_ext::cpu::FLASH_CPU_ISA {

static_assert(kTileAlignment % kVectorBytes == 0, "a tile's row is a whole number of vectors");

template <typename T>
void update_lane_max(int rows, int lanes, const T* scores, int64_t ld, T* lane_max) {
  for (int lane = 0; lane < lanes; lane += Simd<T>::kLanes) {
    Vec<T> max = load<T>(lane_max + lane);
    for (int i = 0; i < rows; ++i) {
      const Vec<T> s = load<T>(scores + i * ld + lane);
      max = s > max ? s : max;
    }
    store<T>(lane_max + lane, max);
  }
}

template <typename T>
void exp_and_sum(int rows, int lanes, T* scores, int64_t ld, const T* shift, T* lane_sum) {
  for (int lane = 0; lane < lanes; lane += Simd<T>::kLanes) {
    const Vec<T> lane_shift = load<T>(shift + lane);
    Vec<T> sum = {};
    for (int i = 0; i < rows; ++i) {
      T* s = scores + i * ld + lane;
      const Vec<T> p = exp<T>(load<T>(s) - lane_shift);
      store<T>(s, p);
      sum += p;
    }
    store<T>(lane_sum + lane, sum);
  }
}

template <typename T>
void exp_lanes(int lanes, T* x) {
  for (int lane = 0; lane < lanes; lane += Simd<T>::kLanes) {
    store<T>(x + lane, exp<T>(load<T>(x + lane)));
  }
}

template <typename T>
void scale_rows(int rows, int cols, const T* factor, T* tile, int64_t ld) {
  for (int i = 0; i < rows; ++i) {
    if (factor[i] == T{1}) continue;
    for (int c = 0; c < cols; c += Simd<T>::kLanes) {
      store<T>(tile + i * ld + c, factor[i] * load<T>(tile + i * ld + c));
    }
  }
}

// A statistic of row i, or of the lanes from `lane` on.
template <bool kPerLane, typename T>
inline Vec<T> statistic(const T* values, int i, int lane) {
  return kPerLane ? load<T>(values + lane) : broadcast<T>(values[i]);
}

template <typename T, bool kPerLane>
void probabilities(int rows, int lanes, T* scores, int64_t ld, const T* lse) {
  for (int i = 0; i < rows; ++i) {
    for (int lane = 0; lane < lanes; lane += Simd<T>::kLanes) {
      T* s = scores + i * ld + lane;
      store<T>(s, exp<T>(load<T>(s) - statistic<kPerLane>(lse, i, lane)));
    }
  }
}

template <typename T, bool kPerLane>
void score_gradients(int rows, int lanes, const T* p, T* dp, int64_t ld, const T* delta) {
  for (int i = 0; i < rows; ++i) {
    for (int lane = 0; lane < lanes; lane += Simd<T>::kLanes) {
      const Vec<T> weight = load<T>(p + i * ld + lane);
      T* x = dp + i * ld + lane;
      const Vec<T> ds = weight * (load<T>(x) - statistic<kPerLane>(delta, i, lane));
      store<T>(x, weight == Vec<T>{} ? Vec<T>{} : ds);
    }
  }
}

template <typename T>
void add_lane_sums(int rows, int lanes, const T* tile, int64_t ld, T* lane_sum) {
  for (int lane = 0; lane < lanes; lane += Simd<T>::kLanes) {
    Vec<T> sum = load<T>(lane_sum + lane);
    for (int i = 0; i < rows; ++i) sum += load<T>(tile + i * ld + lane);
    store<T>(lane_sum + lane, sum);
  }
}

template <typename T>
constexpr TileOps<T> make_tile_ops() {
  TileOps<T> ops{};
  ops.gemm_nn = gemm<T, false>;
  ops.gemm_tn = gemm<T, true>;
  ops.update_lane_max = update_lane_max<T>;
  ops.exp_and_sum = exp_and_sum<T>;
  ops.exp = exp_lanes<T>;
  ops.scale_rows = scale_rows<T>;
  ops.probabilities_per_lane = probabilities<T, true>;
  ops.probabilities_per_row = probabilities<T, false>;
  ops.score_gradients_per_lane = score_gradients<T, true>;
  ops.score_gradients_per_row = score_gradients<T, false>;
  ops.add_lane_sums = add_lane_sums<T>;
  return ops;
}

extern const TileTables tables;
const TileTables tables = {
    make_tile_ops<float>(),    make_tile_ops<double>(),      make_tile_loads<float>(),
    make_tile_loads<double>(), make_tile_loads<c10::Half>(), make_tile_loads<c10::BFloat16>(),
};

}  // namespace flash_ext::cpu::FLASH_CPU_ISA
