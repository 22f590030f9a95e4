// Views of a shared-memory tile as an operand of a warp's matrix product: who loads which word.
//
// K-major: the contraction runs along a row of the tile (Q and K in Q K^T).
// MN-major: it runs down the rows (V in P V, and both operands of dK = dS^T Q).
#pragma once

#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "sm80/mma.cuh"
#include "sm80/smem_tile.cuh"

namespace flash_ext::sm80 {

// The order in which fp32 rows enter an MN-major operand. Paired rows 2t, 2t+1 are what an
// accumulator holds (Mma<float>::from_accumulator) and meet no bank conflicts; the natural order t,
// t+4 is what ldmatrix gives a K-major partner, and meets two-way ones. 16-bit operands have one
// order.
enum class KOrder { kNatural, kPaired };

// The address a lane passes to ldmatrix, moved by compile-time constants. Rows move in multiples of
// 8, so the row's swizzle is the lane's own. Chunks move within a power of two that the lane's
// first chunk is aligned to (or differs from by its lowest bit), so adding is XOR, and XOR commutes
// with the swizzle: one LOP3 a step, the rest is the instruction's immediate offset.
template <typename Tile>
struct LaneAddress {
  uint32_t first;

  __device__ __forceinline__ LaneAddress(const Tile& tile, int row, int chunk)
      : first(ptx::smem_addr(tile.data) + Tile::chunk_offset(row, chunk)) {}

  __device__ __forceinline__ uint32_t at(int rows, int chunks) const {
    return (first ^ (chunks % 8 * 16)) + rows * Tile::kRowBytes + chunks / 8 * 128;
  }
};

template <typename Tile>
struct KMajorA {
  using M = Mma<typename Tile::Element>;
  static constexpr int kUnroll = M::kUnroll;
  LaneAddress<Tile> lane;
  __device__ __forceinline__ KMajorA(const Tile& tile, int m0, int lane_idx)
      : lane(tile, m0 + lane_idx % 16, lane_idx / 16) {}
  // Rows m0 + 16 m .. + 15, k-step k.
  __device__ __forceinline__ typename M::FragmentA load(int m, int k) const {
    typename M::FragmentA a;
#pragma unroll
    for (int piece = 0; piece < M::kPieces; ++piece) {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, lane.at(16 * m, 2 * (M::kPieces * k + piece)));
      a.set(piece, r);
    }
    return a;
  }
};

template <typename Tile>
struct KMajorB {
  using M = Mma<typename Tile::Element>;
  LaneAddress<Tile> lane;
  __device__ __forceinline__ KMajorB(const Tile& tile, int n0, int lane_idx)
      : lane(tile, n0 + lane_idx % 8 + lane_idx / 16 * 8, lane_idx / 8 % 2) {}
  // Columns n0 + 16 n .. + 15 as two fragments.
  __device__ __forceinline__ void load(typename M::FragmentB (&b)[2], int n, int k) const {
#pragma unroll
    for (int piece = 0; piece < M::kPieces; ++piece) {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, lane.at(16 * n, 2 * (M::kPieces * k + piece)));
      b[0].set(piece, r[0], r[1]);
      b[1].set(piece, r[2], r[3]);
    }
  }
};

template <typename Tile, KOrder kOrder, typename Element = typename Tile::Element>
struct MNMajorA {
  using M = Mma<Element>;
  static constexpr int kUnroll = M::kUnroll;
  LaneAddress<Tile> lane;
  __device__ __forceinline__ MNMajorA(const Tile& tile, int m0, int lane_idx)
      : lane(tile, lane_idx % 8 + lane_idx / 16 * 8, m0 / Tile::kChunk + lane_idx / 8 % 2) {}
  __device__ __forceinline__ typename M::FragmentA load(int m, int k) const {
    uint32_t r[4];
    ptx::ldmatrix_x4_trans(r, lane.at(kMmaK * k, 2 * m));
    typename M::FragmentA a;
    a.set(0, r);
    return a;
  }
};

template <typename Tile, KOrder kOrder, typename Element = typename Tile::Element>
struct MNMajorB {
  using M = Mma<Element>;
  LaneAddress<Tile> lane;
  // The contraction starts at row k0 of the tile, a multiple of 8.
  __device__ __forceinline__ MNMajorB(const Tile& tile, int n0, int lane_idx, int k0 = 0)
      : lane(tile, k0 + lane_idx % 16, n0 / Tile::kChunk + lane_idx / 16) {}
  __device__ __forceinline__ void load(typename M::FragmentB (&b)[2], int n, int k) const {
    uint32_t r[4];
    ptx::ldmatrix_x4_trans(r, lane.at(kMmaK * k, 2 * n));
    b[0].set(0, r[0], r[1]);
    b[1].set(0, r[2], r[3]);
  }
};

// fp32 has no transposing ldmatrix: the words of rows k and k' of a lane one by one.
template <typename Tile, KOrder kOrder>
struct WordRows {
  LaneAddress<Tile> first, second;

  __device__ __forceinline__ WordRows(const Tile& tile, int k0, int col0, int lane_idx)
      : first(word(tile, k0 + lane_idx % 4 * (kOrder == KOrder::kPaired ? 2 : 1),
                   col0 + lane_idx / 4)),
        second(word(tile,
                    k0 + (kOrder == KOrder::kPaired ? lane_idx % 4 * 2 + 1 : lane_idx % 4 + 4),
                    col0 + lane_idx / 4)) {}

  __device__ static __forceinline__ LaneAddress<Tile> word(const Tile& tile, int row, int col) {
    LaneAddress<Tile> address(tile, row, col / 4);
    address.first += col % 4 * 4;
    return address;
  }
};

template <typename Tile, KOrder kOrder>
struct MNMajorA<Tile, kOrder, float> {
  using M = Mma<float>;
  static constexpr int kUnroll = M::kUnroll;
  WordRows<Tile, kOrder> words;
  __device__ __forceinline__ MNMajorA(const Tile& tile, int m0, int lane_idx)
      : words(tile, 0, m0, lane_idx) {}
  __device__ __forceinline__ M::FragmentA load(int m, int k) const {
    M::FragmentA a;
#pragma unroll
    for (int piece = 0; piece < M::kPieces; ++piece) {
      const int row = kMmaK * k + 8 * piece;
      a.set(piece, {ptx::ld_shared_b32(words.first.at(row, 4 * m)),
                    ptx::ld_shared_b32(words.first.at(row, 4 * m + 2)),
                    ptx::ld_shared_b32(words.second.at(row, 4 * m)),
                    ptx::ld_shared_b32(words.second.at(row, 4 * m + 2))});
    }
    return a;
  }
};

template <typename Tile, KOrder kOrder>
struct MNMajorB<Tile, kOrder, float> {
  using M = Mma<float>;
  WordRows<Tile, kOrder> words;
  __device__ __forceinline__ MNMajorB(const Tile& tile, int n0, int lane_idx, int k0 = 0)
      : words(tile, k0, n0, lane_idx) {}
  __device__ __forceinline__ void load(M::FragmentB (&b)[2], int n, int k) const {
#pragma unroll
    for (int piece = 0; piece < M::kPieces; ++piece) {
      const int row = kMmaK * k + 8 * piece;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        b[i].set(piece, ptx::ld_shared_b32(words.first.at(row, 4 * n + 2 * i)),
                 ptx::ld_shared_b32(words.second.at(row, 4 * n + 2 * i)));
      }
    }
  }
};

// The accumulator of an earlier product, rounded to Element: P of P V.
template <typename Element, int kM, int kN>
struct AccumulatorA {
  using M = Mma<Element>;
  static constexpr int kUnroll = kN;  // registers cannot be indexed at run time
  const float (&acc)[kM][kN][4];
  __device__ __forceinline__ typename M::FragmentA load(int m, int k) const {
    return M::from_accumulator(acc[m], k);
  }
};

template <typename Element, int kM, int kN>
__device__ __forceinline__ AccumulatorA<Element, kM, kN> accumulator_a(
    const float (&acc)[kM][kN][4]) {
  return {acc};
}

}  // namespace flash_ext::sm80
