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

// The order in which fp32 rows enter a k-step; see Mma<float>::from_accumulator. 16-bit operands have
// the same order either way.
enum class KOrder { kNatural, kAccumulator };

// The address a lane passes to ldmatrix, moved by compile-time constants. Rows move in multiples of 8,
// so the row's swizzle is the lane's own. Chunks move within a power of two that the lane's first chunk
// is aligned to (or differs from by its lowest bit), so adding is XOR, and XOR commutes with the
// swizzle: one LOP3 a step, the rest is the instruction's immediate offset.
template <typename Tile>
struct LaneAddress {
  uint32_t first;

  __device__ __forceinline__ LaneAddress(const Tile& tile, int row, int chunk)
      : first(ptx::smem_addr(tile.data) + Tile::chunk_offset(row, chunk)) {}

  __device__ __forceinline__ uint32_t at(int rows, int chunks) const {
    return (first ^ (chunks % 8 * 16)) + rows * Tile::kRowBytes + chunks / 8 * 128;
  }
};

// The word of one element of a 32-bit tile.
template <typename Tile>
__device__ __forceinline__ LaneAddress<Tile> word_address(const Tile& tile, int row, int col) {
  LaneAddress<Tile> address(tile, row, col / 4);
  address.first += col % 4 * 4;
  return address;
}

template <typename Tile>
struct KMajorA {
  using M = Mma<typename Tile::Element>;
  LaneAddress<Tile> lane;
  __device__ __forceinline__ KMajorA(const Tile& tile, int m0, int lane_idx)
      : lane(tile, m0 + lane_idx % 16, lane_idx / 16) {}
  // Rows m0 + 16 m .. + 15, k-step k.
  __device__ __forceinline__ typename M::FragmentA load(int m, int k) const {
    uint32_t r[4];
    ptx::ldmatrix_x4(r, lane.at(16 * m, 2 * k));
    return M::make_a(r);
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
    uint32_t r[4];
    ptx::ldmatrix_x4(r, lane.at(16 * n, 2 * k));
    b[0] = M::make_b(r[0], r[1]);
    b[1] = M::make_b(r[2], r[3]);
  }
};

template <typename Tile, typename Element = typename Tile::Element>
struct MNMajorA {
  using M = Mma<Element>;
  LaneAddress<Tile> lane;
  __device__ __forceinline__ MNMajorA(const Tile& tile, int m0, int lane_idx)
      : lane(tile, lane_idx % 8 + lane_idx / 16 * 8, m0 / Tile::kChunk + lane_idx / 8 % 2) {}
  __device__ __forceinline__ typename M::FragmentA load(int m, int k) const {
    uint32_t r[4];
    ptx::ldmatrix_x4_trans(r, lane.at(16 * k, 2 * m));
    return M::make_a(r);
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
    ptx::ldmatrix_x4_trans(r, lane.at(16 * k, 2 * n));
    b[0] = M::make_b(r[0], r[1]);
    b[1] = M::make_b(r[2], r[3]);
  }
};

// fp32 has no transposing ldmatrix: word by word. Natural order meets two-way bank conflicts.
template <typename Tile>
struct MNMajorA<Tile, float> {
  using M = Mma<float>;
  LaneAddress<Tile> lane[2];  // k and k + 4
  __device__ __forceinline__ MNMajorA(const Tile& tile, int m0, int lane_idx)
      : lane{word_address(tile, lane_idx % 4, m0 + lane_idx / 4),
             word_address(tile, lane_idx % 4 + 4, m0 + lane_idx / 4)} {}
  __device__ __forceinline__ typename M::FragmentA load(int m, int k) const {
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = ptx::ld_shared_b32(lane[i / 2].at(8 * k, 4 * m + i % 2 * 2));
    return M::make_a(r);
  }
};

template <typename Tile, KOrder kOrder>
struct MNMajorB<Tile, kOrder, float> {
  using M = Mma<float>;
  static constexpr bool kPermuted = kOrder == KOrder::kAccumulator;
  LaneAddress<Tile> lane[2];
  static constexpr int kStep = kPermuted ? 2 : 1;
  static constexpr int kSecond = kPermuted ? 1 : 4;
  __device__ __forceinline__ MNMajorB(const Tile& tile, int n0, int lane_idx, int k0 = 0)
      : lane{word_address(tile, k0 + lane_idx % 4 * kStep, n0 + lane_idx / 4),
             word_address(tile, k0 + lane_idx % 4 * kStep + kSecond, n0 + lane_idx / 4)} {}
  __device__ __forceinline__ void load(typename M::FragmentB (&b)[2], int n, int k) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      b[i] = M::make_b(ptx::ld_shared_b32(lane[0].at(8 * k, 4 * n + 2 * i)),
                       ptx::ld_shared_b32(lane[1].at(8 * k, 4 * n + 2 * i)));
    }
  }
};

}  // namespace flash_ext::sm80
