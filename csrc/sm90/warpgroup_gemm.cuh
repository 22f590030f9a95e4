// Products of a warpgroup's 64-row tile: chains of wgmma along k, one group each. The caller fences
// before and waits after.
#pragma once

#include "common/numeric.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/smem_tile.cuh"

namespace flash_ext::sm90 {

inline constexpr int kWgmmaK = 16;

// acc (+)= A B^T, of the first kN rows of B: both tiles lie in shared memory with k along their
// rows. Of A's rows the 64 count at which the descriptor begins.
template <typename ATile, typename BTile, int kN = BTile::kRows>
__device__ __forceinline__ void gemm_abt(float (&acc)[kN / 8][4], Descriptor a, Descriptor b,
                                         bool accumulates = false) {
  using Element = typename ATile::Element;
  static_assert(ATile::kRows % 64 == 0 && ATile::kCols == BTile::kCols);
#pragma unroll
  for (int k = 0; k < ATile::kCols; k += kWgmmaK) {
    const int slab = k / kSlabCols;
    const int in_row = k % kSlabCols * static_cast<int>(sizeof(Element));
    ptx::Wgmma<Element, kN>::template ss<ptx::Major::kK, ptx::Major::kK>(
        acc, a.at(slab * ATile::kSlabBytes + in_row), b.at(slab * BTile::kSlabBytes + in_row),
        accumulates || k > 0);
  }
  ptx::wgmma_commit_group();
}

// The same; the first kSteps steps along k find A in registers, which halves what they read.
template <typename ATile, typename BTile, int kN, int kSteps>
__device__ __forceinline__ void gemm_abt(float (&acc)[kN / 8][4], const uint32_t (&frag)[kSteps][4],
                                         Descriptor a, Descriptor b) {
  using Element = typename ATile::Element;
  static_assert(ATile::kRows % 64 == 0 && ATile::kCols == BTile::kCols);
#pragma unroll
  for (int k = 0; k < ATile::kCols; k += kWgmmaK) {
    const int slab = k / kSlabCols;
    const int in_row = k % kSlabCols * static_cast<int>(sizeof(Element));
    const uint64_t b_bits = b.at(slab * BTile::kSlabBytes + in_row);
    if (k < kSteps * kWgmmaK) {
      ptx::Wgmma<Element, kN>::template rs<ptx::Major::kK>(acc, frag[k / kWgmmaK], b_bits, k > 0);
    } else {
      ptx::Wgmma<Element, kN>::template ss<ptx::Major::kK, ptx::Major::kK>(
          acc, a.at(slab * ATile::kSlabBytes + in_row), b_bits, k > 0);
    }
  }
  ptx::wgmma_commit_group();
}

// One warp's 16 rows of that A, the first of the tile's rows `row0`.
template <typename ATile, int kSteps>
__device__ __forceinline__ void load_operand(uint32_t (&frag)[kSteps][4], const ATile& tile,
                                             int row0, int lane_idx) {
  const int row = row0 + lane_idx % 16;
  const uint32_t base = ptx::smem_addr(tile.data);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    ptx::ldmatrix_x4(frag[k], base + ATile::chunk_offset(row, k * kWgmmaK + lane_idx / 16 * 8));
  }
}

// An accumulator as the A operand of the next product; zeros where that has more columns.
template <typename Element, int kSteps, int kN>
__device__ __forceinline__ void pack_operand(uint32_t (&frag)[kSteps][4],
                                             const float (&acc)[kN][4]) {
#pragma unroll
  for (int n = 0; n < 2 * kSteps; ++n) {
    frag[n / 2][n % 2 * 2] = n < kN ? pack<Element>(acc[n % kN][0], acc[n % kN][1]) : 0;
    frag[n / 2][n % 2 * 2 + 1] = n < kN ? pack<Element>(acc[n % kN][2], acc[n % kN][3]) : 0;
  }
}

// acc (+)= A B: A's fragments are in registers, B's rows in shared memory run along k.
template <typename BTile>
__device__ __forceinline__ void gemm_ab(float (&acc)[BTile::kCols / 8][4],
                                        const uint32_t (&a)[BTile::kRows / kWgmmaK][4],
                                        Descriptor b, bool accumulates) {
  using Element = typename BTile::Element;
#pragma unroll
  for (int k = 0; k < BTile::kRows / kWgmmaK; ++k) {
    ptx::Wgmma<Element, BTile::kCols>::template rs<ptx::Major::kMN>(
        acc, a[k], b.at(k * kWgmmaK * kSlabRowBytes), accumulates || k > 0);
  }
  ptx::wgmma_commit_group();
}

// acc (+)= A B: both in shared memory, k along the rows of A (64, as above), and B's rows run along
// k.
template <typename ATile, typename BTile>
__device__ __forceinline__ void gemm_ab(float (&acc)[BTile::kCols / 8][4], Descriptor a,
                                        Descriptor b, bool accumulates = false) {
  using Element = typename ATile::Element;
  static_assert(ATile::kRows % 64 == 0 && ATile::kCols == BTile::kRows);
#pragma unroll
  for (int k = 0; k < ATile::kCols; k += kWgmmaK) {
    const int slab = k / kSlabCols;
    const int in_row = k % kSlabCols * static_cast<int>(sizeof(Element));
    ptx::Wgmma<Element, BTile::kCols>::template ss<ptx::Major::kK, ptx::Major::kMN>(
        acc, a.at(slab * ATile::kSlabBytes + in_row), b.at(k * kSlabRowBytes),
        accumulates || k > 0);
  }
  ptx::wgmma_commit_group();
}

}  // namespace flash_ext::sm90
