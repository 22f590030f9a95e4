// The inner loops of the CPU kernels, as a table of functions on tiles. Each table is compiled once
// per instruction set (tile_ops_<isa>.cpp) and chosen at run time, so that the algorithms
// themselves are compiled once and the library runs on machines other than the one that built it.
//
// A tile is row-major in memory that the kernels own: its row stride `ld` is a multiple of
// kTileAlignment bytes, so vector loops run over whole vectors and never need a remainder. A row of
// a tile that holds scores has one "lane" per query (S^T) or per key (S), whichever the caller
// owns.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace flash_ext::cpu {

constexpr int kTileAlignment = 64;

// What values of type Scalar are computed in.
template <typename Scalar>
using Accum = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

template <typename T>
struct TileOps {
  // C = alpha * A B, or C += alpha * A B; the columns of B and C are whole vectors. A is
  // (rows, depth) for gemm_nn and stored as its transpose (depth, rows) for gemm_tn.
  using Gemm = void (*)(int rows, int cols, int depth, T alpha, const T* a, int64_t lda, const T* b,
                        int64_t ldb, bool accumulate, T* c, int64_t ldc);
  Gemm gemm_nn;
  Gemm gemm_tn;

  // lane_max[lane] = max(lane_max[lane], column of scores).
  void (*update_lane_max)(int rows, int lanes, const T* scores, int64_t ld, T* lane_max);

  // scores = exp(scores - shift[lane]); lane_sum[lane] = sum of the column.
  void (*exp_and_sum)(int rows, int lanes, T* scores, int64_t ld, const T* shift, T* lane_sum);

  // x = exp(x).
  void (*exp)(int lanes, T* x);

  // Each row of the tile times its own factor.
  void (*scale_rows)(int rows, int cols, const T* factor, T* tile, int64_t ld);

  // P = exp(scores - lse), in place, with one lse per lane or per row.
  using Probabilities = void (*)(int rows, int lanes, T* scores, int64_t ld, const T* lse);
  Probabilities probabilities_per_lane;
  Probabilities probabilities_per_row;

  // dS = P * (dP - delta), in place of dP, with one delta per lane or per row. 0 where P is 0, also
  // where dP is not a number there.
  using ScoreGradients = void (*)(int rows, int lanes, const T* p, T* dp, int64_t ld,
                                  const T* delta);
  ScoreGradients score_gradients_per_lane;
  ScoreGradients score_gradients_per_row;

  // lane_sum[lane] += column of the tile.
  void (*add_lane_sums)(int rows, int lanes, const T* tile, int64_t ld, T* lane_sum);
};

template <typename Scalar>
struct TileLoads {
  // Converts `rows` x `cols` elements into a tile, or into its transpose; the rest of each row of
  // the tile, up to `ld`, becomes 0. `src` is read at these elements and nowhere else.
  using Load = void (*)(int rows, int cols, const Scalar* src, int64_t row_stride,
                        Accum<Scalar>* tile, int64_t ld);
  Load load;
  Load load_transposed;
};

struct TileTables {
  TileOps<float> float_ops;
  TileOps<double> double_ops;
  TileLoads<float> float_loads;
  TileLoads<double> double_loads;
  TileLoads<c10::Half> half_loads;
  TileLoads<c10::BFloat16> bfloat16_loads;
};

// The entries for the machine the process runs on.
template <typename T>
const TileOps<T>& tile_ops();

template <typename Scalar>
const TileLoads<Scalar>& tile_loads();

}  // namespace flash_ext::cpu
