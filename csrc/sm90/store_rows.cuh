// Accumulators from registers to rows in global memory.
#pragma once

#include "common/numeric.cuh"

namespace flash_ext::sm90 {

// A quad holds of each 8-column tile two columns a lane; afterwards lane c holds all eight of tile
// c, in x[0..3]. `x`: packed pairs of four tiles.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4], int lane_in_quad) {
  const bool is_odd = lane_in_quad & 1;
  const bool is_upper = lane_in_quad & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, is_odd ? x[i] : x[i + 1], 1);
    (is_odd ? x[i] : x[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, is_upper ? x[i] : x[i + 2], 2);
    (is_upper ? x[i] : x[i + 2]) = got;
  }
}

// One warp stores its 16 rows of an accumulator times `factor`, the first `cols` columns (a
// multiple of eight), in pieces of 16 bytes. `first_row`: where the warp's rows begin; of these the
// first `rows` exist.
template <typename Element, int kN>
__device__ __forceinline__ void store_rows(Element* first_row, int64_t row_stride, int rows,
                                           int cols, const float (&acc)[kN][4], float factor,
                                           int lane_idx) {
  const int lane_in_quad = lane_idx % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane_idx / 4 + 8 * half;
    Element* const to = first_row + row * row_stride + lane_in_quad * 8;
#pragma unroll
    for (int n = 0; n < kN; n += 4) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = pack<Element>(acc[n + i][2 * half] * factor, acc[n + i][2 * half + 1] * factor);
      }
      transpose_quad(x, lane_in_quad);
      if (row < rows && (n + lane_in_quad) * 8 < cols) {
        *reinterpret_cast<uint4*>(to + n * 8) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  }
}

}  // namespace flash_ext::sm90
