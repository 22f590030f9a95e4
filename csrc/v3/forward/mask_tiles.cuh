// attn_mask: every consumer warp fetches its own 16 rows of it by TMA, block by block, and one
// block ahead. What it reads of a block is free for the next one as soon as the warp has read it,
// so nobody else takes part:
//
//   full, a warp and slab      lane 0, then TMA's bytes -> the warp
//
// A tile of 16 rows is cut into slabs of 128 bytes a row, swizzled as sm90/smem_tile.cuh has it:
// eight rows of a column group lie in different banks. Of a mask that is the same for all rows
// there is one row.
#pragma once

#include "common/numeric.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/smem_tile.cuh"
#include "v3/forward/kernel_params.cuh"

namespace flash_ext::v3::forward {

inline constexpr int kRowsPerWarp = 16;

// Of kernels without a mask; and what those with one do not do.
struct NoMask {
  struct Storage {
    __device__ __forceinline__ void init_mask() {}
  };
  NoMask() = default;
  __device__ __forceinline__ NoMask(Storage&, const KernelParams&) {}

  // Fetches the mask of a tile's last block, its first one to be computed.
  __device__ __forceinline__ void begin_tile(const WarpgroupTile&, int) {}
  // What Q K^T is added to, if kIsUnderScores; then, while it is computed, fetches the mask of the
  // block before if that is computed, too.
  static constexpr bool kIsUnderScores = false;
  template <int kN>
  __device__ __forceinline__ void begin_scores(float (&)[kN][4]) {}
  __device__ __forceinline__ void fetch_behind(const WarpgroupTile&, bool, int) {}
  // Or takes in the mask of a block when its scores are there, and fetches the same.
  template <int kN>
  __device__ __forceinline__ void apply(float (&)[kN][4], const WarpgroupTile&, bool, int) {}
};

// The tiles of one warp. MaskElement: bool, or the type of q, of a float mask.
template <typename MaskElement, int kBlockN, int kWarps>
class WarpMask : public NoMask {
 protected:
  static constexpr int kSlabColumns = sm90::kSlabRowBytes / static_cast<int>(sizeof(MaskElement));
  static constexpr int kSlabs = kBlockN / kSlabColumns;
  static constexpr int kSlabBytes = kRowsPerWarp * sm90::kSlabRowBytes;
  static_assert(kBlockN % kSlabColumns == 0);

 public:
  struct Storage {
    alignas(1024) char mask_tile[kWarps][kSlabs * kSlabBytes];
    ptx::Mbarrier full_mask[kWarps][kSlabs];

    __device__ __forceinline__ void init_mask() {
      for (auto& barriers : full_mask) {
        for (auto& barrier : barriers) ptx::mbarrier_init(barrier, 1);
      }
    }
  };

  __device__ __forceinline__ WarpMask(Storage& smem, const GeneralKernelParams& p)
      : smem_(smem),
        p_(p.attn_mask),
        warp_idx_(ptx::warp_uniform(threadIdx.x / 32 - 4)),
        lane_idx_(threadIdx.x % 32) {}

  // All tiles that were fetched before have been read.
  __device__ __forceinline__ void begin_tile(const WarpgroupTile& tile, int last_block) {
    fetch(tile, last_block);
  }

 protected:
  __device__ __forceinline__ void fetch(const WarpgroupTile& tile, int n_block) {
    if (lane_idx_ != 0) return;
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      ptx::Mbarrier& full = smem_.full_mask[warp_idx_][s];
      ptx::mbarrier_arrive_expect_tx(full, p_.has_rows ? kSlabBytes : sm90::kSlabRowBytes);
      ptx::tma_load_4d(smem_.mask_tile[warp_idx_] + s * kSlabBytes, p_.map, full,
                       n_block * kBlockN + s * kSlabColumns,
                       p_.has_rows ? tile.row0 + warp_idx_ % 4 * kRowsPerWarp : 0, tile.head_idx,
                       tile.batch_idx);
    }
  }

  __device__ __forceinline__ void await_slab(int slab) const {
    ptx::mbarrier_wait(smem_.full_mask[warp_idx_][slab], phase_);
  }
  __device__ __forceinline__ void await_tile() {
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) await_slab(s);
    phase_ ^= 1;
  }

  Storage& smem_;
  const KernelMask& p_;
  const int warp_idx_;  // among all consumers'
  const int lane_idx_;
  uint32_t phase_ = 0;
};

// A bool mask: scores are -inf where it is false.
template <int kBlockN, int kWarps>
class BoolMask : public WarpMask<bool, kBlockN, kWarps> {
  using Base = WarpMask<bool, kBlockN, kWarps>;

 public:
  using Base::Base;

  template <int kN>
  __device__ __forceinline__ void apply(float (&acc_s)[kN][4], const WarpgroupTile& tile,
                                        bool has_next, int next_block) {
    static_assert(8 * kN == kBlockN);
    this->await_tile();
    const int row = this->p_.has_rows ? this->lane_idx_ / 4 : 0;
    const int to_lower = this->p_.has_rows ? 8 * sm90::kSlabRowBytes : 0;
    const uint32_t first = ptx::smem_addr(this->smem_.mask_tile[this->warp_idx_]) +
                           row * sm90::kSlabRowBytes + this->lane_idx_ % 4 * 2;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const uint32_t pair = first + ((n / 2) ^ (row & 7)) * 16 + n % 2 * 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t x = ptx::ld_shared_u16(pair + half * to_lower);
        if ((x & 0xff) == 0) acc_s[n][2 * half] = -INFINITY;
        if (x < 0x100) acc_s[n][2 * half + 1] = -INFINITY;
      }
    }
    __syncwarp();  // all lanes have read the tile
    if (has_next) this->fetch(tile, next_block);
  }
};

// A float mask. ldmatrix hands out eight columns as accumulators have them.
//
// Q K^T is accumulated on it where that can be: while it waits for its turn, a warp has the time to
// unpack the mask, and S comes with it. Otherwise (a softcap comes before the mask; with dropout
// there are no registers) it is added to S, for which the softmax waits. At 4k the former takes
// 0.86 of the latter's time, at both head_dim (H200).
template <typename Element, int kBlockN, int kWarps, bool kUnderScores>
class FloatMask : public WarpMask<Element, kBlockN, kWarps> {
  using Base = WarpMask<Element, kBlockN, kWarps>;
  static constexpr int kSlabN = Base::kSlabColumns / 8;

 public:
  static constexpr bool kIsUnderScores = kUnderScores;

  __device__ __forceinline__ FloatMask(typename Base::Storage& smem, const GeneralKernelParams& p)
      : Base(smem, p) {
    const int row = this->p_.has_rows ? this->lane_idx_ % 16 : 0;
    first_chunk_ = ptx::smem_addr(smem.mask_tile[0]) + row * sm90::kSlabRowBytes +
                   (this->lane_idx_ / 16 ^ (row & 7)) * 16;
  }

  template <int kN>
  __device__ __forceinline__ void begin_scores(float (&acc_s)[kN][4]) {
    if constexpr (!kUnderScores) return;
    static_assert(8 * kN == kBlockN);
#pragma unroll
    for (int s = 0; s < Base::kSlabs; ++s) {  // one after another: half as many registers
      this->await_slab(s);
      uint32_t bits[kSlabN / 2][4];
#pragma unroll
      for (int n = 0; n < kSlabN; n += 2) load(bits[n / 2], s * kSlabN + n);
#pragma unroll
      for (int n = 0; n < kSlabN; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 mask = unpack_pair(bits[n / 2][n % 2 * 2 + half]);
          acc_s[s * kSlabN + n][2 * half] = mask.x * this->p_.mask_factor;
          acc_s[s * kSlabN + n][2 * half + 1] = mask.y * this->p_.mask_factor;
        }
      }
    }
    this->phase_ ^= 1;
    __syncwarp();  // all lanes have read the tile
  }

  __device__ __forceinline__ void fetch_behind(const WarpgroupTile& tile, bool has_next,
                                               int next_block) {
    if (kUnderScores && has_next) this->fetch(tile, next_block);
  }

  // s * scale + mask, in natural units.
  template <int kN>
  __device__ __forceinline__ void apply(float (&acc_s)[kN][4], const WarpgroupTile& tile,
                                        bool has_next, int next_block) {
    if constexpr (kUnderScores) return;
    static_assert(8 * kN == kBlockN);
    this->await_tile();
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t bits[4];
      load(bits, n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float (&s)[4] = acc_s[n + i / 2];
        const float2 mask = unpack_pair(bits[i]);
        s[i % 2 * 2] = fmaf(s[i % 2 * 2], this->p_.score_factor, mask.x);
        s[i % 2 * 2 + 1] = fmaf(s[i % 2 * 2 + 1], this->p_.score_factor, mask.y);
      }
    }
    __syncwarp();  // all lanes have read the tile
    if (has_next) this->fetch(tile, next_block);
  }

 private:
  // The eight columns from 8 n on and the next eight.
  __device__ __forceinline__ void load(uint32_t (&bits)[4], int n) const {
    const uint32_t tile = first_chunk_ + this->warp_idx_ * Base::kSlabs * Base::kSlabBytes;
    ptx::ldmatrix_x4(bits, (tile ^ n % kSlabN * 16) + n / kSlabN * Base::kSlabBytes);
  }

  __device__ __forceinline__ static float2 unpack_pair(uint32_t bits) {
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {  // one instruction each
      return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
    } else {
      return unpack<Element>(bits);
    }
  }

  // Lane l names row l % 8 of matrix l / 8: upper and lower rows, then the next eight columns.
  // Those of the first two matrices in warp 0's tile; exclusive or with 16 n is those n chunks on.
  uint32_t first_chunk_;
};

}  // namespace flash_ext::v3::forward
