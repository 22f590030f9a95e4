// attn_mask and its gradient, of a step's scores as scores.cuh holds them: rows are keys, columns
// are queries.
//
// A step's part of the mask comes by TMA to where the step's dS goes later, as soon as the product
// dQ of two steps before has read that. So it needs no shared memory of its own:
//   float mask  a DsTile: queries down the rows. A warp reads its own sixteen keys of all queries,
//               which is just what it overwrites with its dS.
//   bool mask   for each warpgroup its 64 keys in rows of 64 bytes, in the first half of its slab
//               of the DsTile. There a warp's dS overwrites what others read: before it they all
//               have read (MaskBarriers::read).
//
// Barriers                  who arrives                           who waits
//   full[stage]            the producer, then TMA's bytes         consumers, in every step
//   empty[stage]           the warps of dQ's owner: dQ is done    the producer
//   read[warpgroup]        its warps in every step, bool masks    its warps, before they store dS
//                          only
//   dv_sent                the thread that sends gradients, once  the producer, before the first
//                          a tile, where dV leaves through ds     load of the next tile
#pragma once

#include "ptx/ldmatrix.cuh"
#include "ptx/reduction.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/smem_tile.cuh"
#include "v3/backward/general_params.cuh"

namespace flash_ext::v3::backward {

struct MaskBarriers {
  sm90::RingBarriers<2> tiles;
  ptx::Mbarrier read[2];
  ptx::Mbarrier dv_sent;

  __device__ void init() {
    tiles.init(1, 4);
    for (auto& bar : read) ptx::mbarrier_init(bar, 4);
    ptx::mbarrier_init(dv_sent, 1);
  }
};

// ---- producer ----------------------------------------------------------------------------------

// By one thread: the mask of a step, into its dS's place. `from`: the first key as the column.
template <MaskKind kMask, typename DsTile>
__device__ __forceinline__ void load_mask(DsTile& ds, const CUtensorMap& map, MaskBarriers& bars,
                                          sm90::RingPosition<2> at, int key, int row, int head,
                                          int batch) {
  constexpr int kBytes = kMask == MaskKind::kBool ? DsTile::kBytes / 2 : DsTile::kBytes;
  auto& full = bars.tiles.full[at.stage];
  sm90::wait_empty(bars.tiles, at);
  ptx::mbarrier_arrive_expect_tx(full, kBytes);
#pragma unroll
  for (int slab = 0; slab < DsTile::kSlabs; ++slab) {
    ptx::tma_load_4d(ds.slab(slab), map, full, key + slab * sm90::kSlabCols, row, head, batch);
  }
}

// ---- float masks -------------------------------------------------------------------------------

// x * scale + mask in place of a warp's x, in natural units: masks may be as large as numbers get.
// Of its keys from column `col` of the tile on, and the queries from `first_row` on.
template <typename DsTile, int kN>
__device__ __forceinline__ void add_mask(float (&acc_s)[kN][4], const DsTile& tile, int first_row,
                                         int col, float scale, int lane_idx) {
  using Element = typename DsTile::Element;
  // As store_ds() names them: lane l row l % 8 of matrix l / 8, the first and the next eight keys,
  // then the next eight queries.
  const int row = first_row + lane_idx / 16 * 8 + lane_idx % 8;
  const uint32_t base =
      ptx::smem_addr(tile.data) + DsTile::chunk_offset(row, col + lane_idx / 8 % 2 * 8);
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    uint32_t bits[4];
    ptx::ldmatrix_x4_trans(bits, base + n * 8 * sm90::kSlabRowBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 mask = unpack<Element>(bits[i]);
      float* s = &acc_s[n + i / 2][i % 2 * 2];
      s[0] = __fmaf_rn(s[0], scale, mask.x);
      s[1] = __fmaf_rn(s[1], scale, mask.y);
    }
  }
}

// ---- bool masks --------------------------------------------------------------------------------

// What a bool mask lets a thread see of a block, one bit for each element acc[n][i].
template <int kN>
struct SeenElements {
  uint32_t words[kN > 0 ? kN / 8 : 1];

  __device__ __forceinline__ bool is_seen(int n, int i) const {
    return (words[n / 8] >> (8 * i + n % 8) & 1) != 0;
  }
};

// A warp's part of the mask: 16 bytes of each row. A pair of bytes counts as one element: the
// transposed 8x8 matrices give lane l queries 2 (l % 4) and the next, of keys 2 (l / 4) and the
// next. As a byte is 0 or 1, those of eight matrices fit into one register, and two shuffles bring
// the keys l / 4 and l / 4 + 8.
template <int kN>
__device__ __forceinline__ SeenElements<kN> read_bool_mask(const char* slab, int first_row,
                                                           int warp_idx, int lane_idx) {
  const uint32_t base = ptx::smem_addr(slab);
  const int source = lane_idx / 8 * 4 + lane_idx % 4;
  const uint32_t select = 0x6420 + lane_idx / 4 % 2 * 0x1111;
  SeenElements<kN> seen;
#pragma unroll
  for (int word = 0; word < kN / 8; ++word) {
    uint32_t packed = 0;
#pragma unroll
    for (int n = 0; n < 8; n += 4) {
      const int row = first_row + (8 * word + n) * 8 + lane_idx;  // of matrix lane_idx / 8
      uint32_t bytes[4];
      // The 64-byte swizzle: chunk c of row r lies at chunk c ^ (r / 2 % 4).
      ptx::ldmatrix_x4_trans(bytes, base + row * 64 + (warp_idx ^ (row / 2 % 4)) * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) packed |= (bytes[i] & 0x01010101u) << (n + i);
    }
    const uint32_t near = __shfl_sync(0xffffffffu, packed, source);
    const uint32_t far = __shfl_sync(0xffffffffu, packed, source + 16);
    seen.words[word] = __byte_perm(near, far, select);
  }
  return seen;
}

template <int kN>
__device__ __forceinline__ void hide_unseen(float (&acc_s)[kN][4], const SeenElements<kN>& seen,
                                            bool negate) {
  const float hidden = negate ? INFINITY : -INFINITY;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!seen.is_seen(n, i)) acc_s[n][i] = hidden;
    }
  }
}

// ---- a consumer warp's part in a step ----------------------------------------------------------

template <MaskKind kMask, typename DsTile>
class StepMask {
  static constexpr bool kIsBool = kMask == MaskKind::kBool;

 public:
  __device__ __forceinline__ StepMask(DsTile& tile, MaskBarriers& bars, sm90::RingPosition<2> at,
                                      int warpgroup_idx, int warp_idx, int lane_idx)
      : tile_(tile),
        bars_(bars),
        at_(at),
        warpgroup_idx_(warpgroup_idx),
        warp_idx_(warp_idx),
        lane_idx_(lane_idx) {}

  // Of a bool mask, what is seen of 8 * kN queries from `first_row` on.
  template <int kN>
  __device__ __forceinline__ auto read(int first_row) const {
    SeenElements<kIsBool ? kN : 0> seen{};
    if constexpr (kIsBool) {
      sm90::wait_full(bars_.tiles, at_);
      seen = read_bool_mask<kN>(tile_.slab(warpgroup_idx_), first_row, warp_idx_, lane_idx_);
      arrive_read();
    }
    return seen;
  }

  template <int kN, int kSeen>
  __device__ __forceinline__ void apply(float (&acc_s)[kN][4], const SeenElements<kSeen>& seen,
                                        int first_row, bool negate, float scale) const {
    if constexpr (kIsBool) {
      hide_unseen(acc_s, seen, negate);
    } else {
      sm90::wait_full(bars_.tiles, at_);
      add_mask(acc_s, tile_, first_row, 64 * warpgroup_idx_ + 16 * warp_idx_, scale, lane_idx_);
    }
  }

  // Before dS is stored: in each step one phase.
  __device__ __forceinline__ void await_read() const {
    if constexpr (kIsBool) ptx::mbarrier_wait(bars_.read[warpgroup_idx_], at_.stage);
  }
  // The same, of a step that the warpgroup does not compute.
  __device__ __forceinline__ void skip() const {
    sm90::wait_full(bars_.tiles, at_);
    if constexpr (kIsBool) arrive_read();
    await_read();
  }

  // By the owner of dQ, once that has been computed.
  __device__ __forceinline__ void release() const {
    if (lane_idx_ == 0) ptx::mbarrier_arrive(bars_.tiles.empty[at_.stage]);
  }

 private:
  __device__ __forceinline__ void arrive_read() const {
    __syncwarp();
    if (lane_idx_ == 0) ptx::mbarrier_arrive(bars_.read[warpgroup_idx_]);
  }

  DsTile& tile_;
  MaskBarriers& bars_;
  const sm90::RingPosition<2> at_;
  const int warpgroup_idx_, warp_idx_, lane_idx_;
};

// Of kernels without a mask.
struct NoStepMask {
  template <int kN>
  __device__ __forceinline__ SeenElements<0> read(int) const {
    return {};
  }
  template <int kN>
  __device__ __forceinline__ void apply(float (&)[kN][4], const SeenElements<0>&, int, bool,
                                        float) const {}
  __device__ __forceinline__ void await_read() const {}
  __device__ __forceinline__ void skip() const {}
  __device__ __forceinline__ void release() const {}
};

// ---- the gradient ------------------------------------------------------------------------------

// Adds dS to dmask: of a thread's keys key0 and key0 + 8 and its queries from row0 on.
template <int kN>
__device__ __forceinline__ void add_dmask(const ScoreTensor& dmask, const float (&acc_ds)[kN][4],
                                          int batch_idx, int head_idx, int row0, int key0,
                                          int seqlen_q, int seqlen_k) {
  float* to = static_cast<float*>(dmask.data) + dmask.offset(batch_idx, head_idx, row0, 0) + key0;
  const bool is_key[2] = {key0 < seqlen_k, key0 + 8 < seqlen_k};
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float* const row = to + i * dmask.row_stride;
      const bool is_row = row0 + 8 * n + i < seqlen_q;
      if (is_row && is_key[0]) ptx::red_add(row, acc_ds[n][i]);
      if (is_row && is_key[1]) ptx::red_add(row + 8, acc_ds[n][2 + i]);
    }
    to += 8 * dmask.row_stride;
  }
}

}  // namespace flash_ext::v3::backward
