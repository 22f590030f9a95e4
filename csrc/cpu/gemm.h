// Tile-sized matrix products. Part of tile_ops_impl.h.
//
// The micro-kernel keeps kRows x kVecs vectors of C in registers and walks the whole depth: per
// step it loads kVecs vectors of B and multiplies them by kRows broadcast elements of A. Each
// element of C is one chain of multiply-adds in the order of the depth, whatever the tile, so q . k
// has the same bits in the forward and in both backward passes.
#pragma once

#include "cpu/simd.h"

namespace flash_ext::cpu::FLASH_CPU_ISA {

constexpr int kMicroRows = FLASH_MICRO_ROWS;
constexpr int kMicroVecs = FLASH_MICRO_VECS;

template <typename T, bool kTransposedA, int kRows, int kVecs>
void micro_kernel(int depth, T alpha, const T* a, int64_t lda, const T* b, int64_t ldb,
                  bool accumulate, T* c, int64_t ldc) {
  constexpr int kLanes = Simd<T>::kLanes;
  Vec<T> acc[kRows][kVecs] = {};
  for (int k = 0; k < depth; ++k) {
    Vec<T> b_row[kVecs];
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) b_row[j] = load<T>(b + k * ldb + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> a_ik = broadcast<T>(kTransposedA ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) acc[i][j] += a_ik * b_row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) {
      T* c_ij = c + i * ldc + j * kLanes;
      const Vec<T> product = alpha * acc[i][j];
      store<T>(c_ij, accumulate ? load<T>(c_ij) + product : product);
    }
  }
}

// kMaxRows rows of C at a time, then the rest with the micro-kernel of just that height.
template <typename T, bool kTransposedA, int kRows, int kVecs>
void column_panel(int rows, int depth, T alpha, const T* a, int64_t lda, const T* b, int64_t ldb,
                  bool accumulate, T* c, int64_t ldc) {
  const int64_t a_row_stride = kTransposedA ? 1 : lda;
  for (; rows >= kRows; rows -= kRows, a += kRows * a_row_stride, c += kRows * ldc) {
    micro_kernel<T, kTransposedA, kRows, kVecs>(depth, alpha, a, lda, b, ldb, accumulate, c, ldc);
  }
  if constexpr (kRows > 1) {
    if (rows > 0) {
      column_panel<T, kTransposedA, kRows - 1, kVecs>(rows, depth, alpha, a, lda, b, ldb,
                                                      accumulate, c, ldc);
    }
  }
}

template <typename T, bool kTransposedA, int kVecs>
void column_panels(int vecs, int rows, int depth, T alpha, const T* a, int64_t lda, const T* b,
                   int64_t ldb, bool accumulate, T* c, int64_t ldc) {
  constexpr int kCols = kVecs * Simd<T>::kLanes;
  for (; vecs >= kVecs; vecs -= kVecs, b += kCols, c += kCols) {
    column_panel<T, kTransposedA, kMicroRows, kVecs>(rows, depth, alpha, a, lda, b, ldb, accumulate,
                                                     c, ldc);
  }
  if constexpr (kVecs > 1) {
    if (vecs > 0) {
      column_panels<T, kTransposedA, kVecs - 1>(vecs, rows, depth, alpha, a, lda, b, ldb,
                                                accumulate, c, ldc);
    }
  }
}

template <typename T, bool kTransposedA>
void gemm(int rows, int cols, int depth, T alpha, const T* a, int64_t lda, const T* b, int64_t ldb,
          bool accumulate, T* c, int64_t ldc) {
  column_panels<T, kTransposedA, kMicroVecs>(cols / Simd<T>::kLanes, rows, depth, alpha, a, lda, b,
                                             ldb, accumulate, c, ldc);
}

}  // namespace flash_ext::cpu::FLASH_CPU_ISA
