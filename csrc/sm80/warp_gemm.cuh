// A warp's share of a matrix product: acc[m][n] is the 16x8 tile m, n of the warp's rows and
// columns.
#pragma once

#include "sm80/operand.cuh"

namespace flash_ext::sm80 {

template <int kM, int kN>
__device__ __forceinline__ void clear(float (&acc)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.f;
}

// acc += A B over kKSteps k-steps.
template <int kKSteps, int kM, int kN, typename A, typename B>
__device__ __forceinline__ void warp_gemm(float (&acc)[kM][kN][4], const A& a_operand,
                                          const B& b_operand) {
  using M = typename A::M;
#pragma unroll A::kUnroll
  for (int k = 0; k < kKSteps; ++k) {
    typename M::FragmentA a[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) a[m] = a_operand.load(m, k);
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {
      typename M::FragmentB b[2];
      b_operand.load(b, n, k);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        M::mma(acc[m][2 * n], a[m], b[0]);
        M::mma(acc[m][2 * n + 1], a[m], b[1]);
      }
    }
  }
}

// Rounds a warp's accumulator into a tile in shared memory, at row0, col0.
template <typename Tile, int kM, int kN>
__device__ __forceinline__ void store_accumulator(Tile& tile, const float (&acc)[kM][kN][4],
                                                  int row0, int col0, int lane_idx) {
  using Element = typename Tile::Element;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 16 * m + 8 * half + lane_idx / 4;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        store_pair(&tile.at(row, col0 + 8 * n + lane_idx % 4 * 2), acc[m][n][2 * half],
                   acc[m][n][2 * half + 1]);
      }
    }
  }
}

// The reverse, for a tile whose elements need no conversion.
template <typename Tile, int kM, int kN>
__device__ __forceinline__ void load_accumulator(float (&acc)[kM][kN][4], Tile& tile, int row0,
                                                 int col0, int lane_idx) {
  static_assert(sizeof(typename Tile::Element) == sizeof(float), "fp32 tiles only");
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 16 * m + 8 * half + lane_idx / 4;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float2 x =
            *reinterpret_cast<const float2*>(&tile.at(row, col0 + 8 * n + lane_idx % 4 * 2));
        acc[m][n][2 * half] = x.x;
        acc[m][n][2 * half + 1] = x.y;
      }
    }
  }
}

}  // namespace flash_ext::sm80
