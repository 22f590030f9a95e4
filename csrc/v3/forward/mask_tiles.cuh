// attn_mask: every consumer warp fetches its own 16 rows of it by TMA, block by block, and one
// block ahead. What it reads of a block is free for the next one as soon as the warp has read it,
// so nobody else takes part:
//
//   full, a warp       lane 0, then TMA's bytes -> the warp
//
// A tile of 16 rows is cut into slabs of 128 bytes a row, swizzled as sm90/smem_tile.cuh has it:
// eight rows of a column group lie in different banks. Of a mask that is the same for all rows
// there is one row.
#pragma once

#include "common/numeric.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/tma.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/smem_tile.cuh"
#include "v3/forward/kernel_params.cuh"

namespace flash_ext::v3::forward {

inline constexpr int kRowsPerWarp = 16;

// Of kernels without a mask.
struct NoMask {
  struct Storage {
    __device__ __forceinline__ void init_mask() {}
  };
  __device__ __forceinline__ NoMask(Storage&, const KernelParams&) {}
  __device__ __forceinline__ void begin_tile(const WarpgroupTile&, int) {}
  template <int kN>
  __device__ __forceinline__ void apply(float (&)[kN][4], const WarpgroupTile&, bool, int) {}
};

// MaskElement: bool, or the type of q, of a float mask.
template <typename MaskElement, int kBlockN, int kWarps>
class WarpMask {
  static constexpr bool kIsBool = std::is_same_v<MaskElement, bool>;
  static constexpr int kElementBytes = kIsBool ? 1 : 2;
  static constexpr int kSlabColumns = sm90::kSlabRowBytes / kElementBytes;
  static constexpr int kSlabs = kBlockN / kSlabColumns;
  static constexpr int kSlabBytes = kRowsPerWarp * sm90::kSlabRowBytes;
  static_assert(kBlockN % kSlabColumns == 0);

 public:
  struct Storage {
    alignas(1024) char mask_tile[kWarps][kSlabs * kSlabBytes];
    ptx::Mbarrier full_mask[kWarps];

    __device__ __forceinline__ void init_mask() {
      for (auto& barrier : full_mask) ptx::mbarrier_init(barrier, 1);
    }
  };

  __device__ __forceinline__ WarpMask(Storage& smem, const GeneralKernelParams& p)
      : smem_(smem), p_(p), warp_idx_(threadIdx.x / 32 - 4), lane_idx_(threadIdx.x % 32) {}

  // Fetches the first block's tile; all that were fetched before have been read.
  __device__ __forceinline__ void begin_tile(const WarpgroupTile& tile, int last_block) {
    fetch(tile, last_block);
  }

  // Takes in the mask of a block, of all its keys, and fetches the block before it if there
  // is one that is computed.
  template <int kN>
  __device__ __forceinline__ void apply(float (&acc_s)[kN][4], const WarpgroupTile& tile,
                                        bool has_next, int next_block) {
    static_assert(8 * kN == kBlockN);
    ptx::mbarrier_wait(smem_.full_mask[warp_idx_], phase_);
    phase_ ^= 1;
    if constexpr (kIsBool) {
      hide(acc_s);
    } else {
      add(acc_s);
    }
    __syncwarp();  // all lanes have read the tile
    if (has_next) fetch(tile, next_block);
  }

 private:
  __device__ __forceinline__ void fetch(const WarpgroupTile& tile, int n_block) {
    if (lane_idx_ != 0) return;
    ptx::Mbarrier& full = smem_.full_mask[warp_idx_];
    const bool has_rows = p_.attn_mask.has_rows;
    ptx::mbarrier_arrive_expect_tx(full, kSlabs * (has_rows ? kSlabBytes : sm90::kSlabRowBytes));
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      ptx::tma_load_4d(smem_.mask_tile[warp_idx_] + s * kSlabBytes, p_.attn_mask.map, full,
                       n_block * kBlockN + s * kSlabColumns,
                       has_rows ? tile.row0 + warp_idx_ % 4 * kRowsPerWarp : 0, tile.head_idx,
                       tile.batch_idx);
    }
  }

  // s * scale + mask, in natural units. ldmatrix hands out eight columns as accumulators have them.
  template <int kN>
  __device__ __forceinline__ void add(float (&acc_s)[kN][4]) const {
    // Lane l names row l % 8 of matrix l / 8: upper and lower rows, then the next eight columns.
    const int row = p_.attn_mask.has_rows ? lane_idx_ % 16 : 0;
    const uint32_t row_address =
        ptx::smem_addr(smem_.mask_tile[warp_idx_]) + row * sm90::kSlabRowBytes;
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      const int chunk = (n % 8 + lane_idx_ / 16) ^ (row & 7);
      uint32_t x[4];
      ptx::ldmatrix_x4(x, row_address + n / 8 * kSlabBytes + chunk * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float (&s)[4] = acc_s[n + i / 2];
        const float2 mask = unpack<MaskElement>(x[i]);
        s[i % 2 * 2] = fmaf(s[i % 2 * 2], p_.attn_mask.scale, mask.x);
        s[i % 2 * 2 + 1] = fmaf(s[i % 2 * 2 + 1], p_.attn_mask.scale, mask.y);
      }
    }
  }

  // -inf where the mask is false.
  template <int kN>
  __device__ __forceinline__ void hide(float (&acc_s)[kN][4]) const {
    const int row = p_.attn_mask.has_rows ? lane_idx_ / 4 : 0;
    const int to_lower = p_.attn_mask.has_rows ? 8 * sm90::kSlabRowBytes : 0;
    const uint32_t first =
        ptx::smem_addr(smem_.mask_tile[warp_idx_]) + row * sm90::kSlabRowBytes + lane_idx_ % 4 * 2;
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
  }

  Storage& smem_;
  const GeneralKernelParams& p_;
  const int warp_idx_;  // among all consumers'
  const int lane_idx_;
  uint32_t phase_ = 0;
};

}  // namespace flash_ext::v3::forward
