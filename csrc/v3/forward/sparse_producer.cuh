// K and V under a block_mask: only the blocks that some warpgroup of the tile sees are loaded. The
// lanes of the producer's first warp read the mask, a block each; its first lane copies.
#pragma once

#include "v3/forward/producer.cuh"

namespace flash_ext::v3::forward {

// What the consumers are told of the block in a K buffer: block * 256 + kLastBlock, where it is the
// tile's last, + two bits for each warpgroup, whether it sees the first and the second 64 keys (or
// for all warpgroups, where they see the same).
// Under a mask of blocks of 128 or 256 both are the same. A tile that sees nothing has one block,
// of zeros before the first key, that no warpgroup sees.
inline constexpr int kLastBlock = 1 << 7;
inline constexpr int kBlockShift = 8;

template <typename Config>
class SparseWalk {
 public:
  __device__ __forceinline__ SparseWalk(typename Config::SharedStorage& smem,
                                        const typename Config::Params& p)
      : smem_(&smem), p_(&p) {
    static_assert(Config::kBlockN == 128 && 2 * kParts <= 7);
    advance();
  }

  // Blocks top, top - 1, .. of one tile, a lane each.
  typename Config::Tile tile;
  int begin = 0;  // of the tile's blocks
  int top = -1;
  uint32_t seen;       // this lane's block, by the warpgroups
  uint32_t remaining;  // lanes whose blocks are still to be loaded
  bool begins_tile;

  // To the next such blocks of which some warpgroup sees any, or to the next tile.
  __device__ __forceinline__ void advance() {
    begins_tile = false;
    top -= 32;
    for (;; top -= 32) {
      if (top < begin) {
        if (begins_tile) return begin_empty_tile();
        tile = take_tile<Config>(*p_, next_round());
        begins_tile = true;
        if (!tile.is_valid) return;
        const int row0 = max(tile.row0, 0);
        const BlockRange blocks = key_blocks(band_of(*p_, tile), row0,
                                             tile.row0 + Config::kBlockM - row0, Config::kBlockN);
        begin = blocks.begin;
        top = blocks.end - 1;
        if (top < begin) return begin_empty_tile();
      }
      const int n_block = top - lane_idx();
      seen = n_block >= begin ? seen_of(n_block) : 0;
      remaining = __ballot_sync(0xffffffffu, seen != 0);
      if (remaining != 0) return;
    }
  }

 private:
  // Parts of a tile's rows that see different blocks.
  static constexpr int kParts = Config::kIsUniform ? 1 : Config::kConsumers;
  static constexpr int kRowsPerPart = Config::kBlockM / kParts;

  __device__ __forceinline__ int next_round() {
    if constexpr (Config::kIsUniform) return smem_->tiles.take(queue_at_, p_->num_taken);
    return round_++;
  }

  __device__ __forceinline__ static int lane_idx() { return threadIdx.x % 32; }

  __device__ __forceinline__ void begin_empty_tile() {
    begin = 0;
    top = -1;
    seen = 0;
    remaining = 1;
  }

  __device__ __forceinline__ uint32_t seen_of(int n_block) const {
    const BlockMask& mask = p_->block_mask;
    const BandMask band = band_of(*p_, tile);
    const int shift = 31 - __clz(mask.block_size);
    const bool is_fine = mask.block_size < Config::kBlockN;
    const bool has_second = !is_fine || n_block * Config::kBlockN + mask.block_size < band.seqlen_k;
    const int first_block = n_block * Config::kBlockN >> shift;
    const int second_block = first_block + (is_fine && has_second ? 1 : 0);
    bool is_on[kParts][2];
#pragma unroll
    for (int c = 0; c < kParts; ++c) {  // without branches: all loads in flight at once
      const int row = max(tile.row0 + kRowsPerPart * c, 0);
      const bool* const flags = static_cast<const bool*>(mask.data) +
                                mask.offset(tile.batch_idx, tile.head_idx, row >> shift, 0);
      is_on[c][0] = flags[first_block * mask.key_stride];
      is_on[c][1] = flags[second_block * mask.key_stride];
    }
    uint32_t all = 0;
#pragma unroll
    for (int c = 0; c < kParts; ++c) {
      const int row0 = tile.row0 + kRowsPerPart * c;
      const BlockRange own = key_blocks(band, max(row0, 0), kRowsPerPart, Config::kBlockN);
      const bool is_own = row0 >= 0 && n_block >= own.begin && n_block < own.end;
      all |= (is_own && is_on[c][0] ? 1u << 2 * c : 0u);
      all |= (is_own && is_on[c][1] && has_second ? 2u << 2 * c : 0u);
    }
    return all;
  }

  typename Config::SharedStorage* smem_;
  const typename Config::Params* p_;
  int round_ = 0;
  [[maybe_unused]] TileQueue::Position queue_at_;
};

// By the whole first warp.
template <typename Config>
__device__ __forceinline__ void produce_sparse_kv(typename Config::SharedStorage& smem,
                                                  const typename Config::Params& p) {
  sm90::RingPosition<Config::kKStages> k_at;
  sm90::RingPosition<Config::kVStages> v_at;
  SparseWalk<Config> at(smem, p);
  while (at.tile.is_valid) {
    SparseWalk<Config> next = at;
    bool has_next = false;
    for (bool is_first = true; at.remaining != 0; is_first = false) {
      const int lane = __ffs(static_cast<int>(at.remaining)) - 1;
      at.remaining &= at.remaining - 1;
      // Behind the first block: what the mask says must not keep the consumers waiting.
      if (!has_next && (!is_first || at.remaining == 0)) {
        next.advance();
        has_next = true;
      }
      const int n_block = at.top - lane;
      const int seen = static_cast<int>(__shfl_sync(0xffffffffu, at.seen, lane));
      const bool is_last = at.remaining == 0 && next.begins_tile;
      if (threadIdx.x == 0) {
        const sm90::TileCoords from{n_block * Config::kBlockN, at.tile.head_idx / p.group_size,
                                    at.tile.batch_idx};
        sm90::wait_empty(smem.k_barriers, k_at);
        smem.k_notes.of[k_at.stage] = n_block << kBlockShift | (is_last ? kLastBlock : 0) | seen;
        sm90::load_tile(smem.k[k_at.stage], p.kv_maps[0], smem.k_barriers.full[k_at.stage], from);
        sm90::wait_empty(smem.v_barriers, v_at);
        sm90::load_tile(smem.v[v_at.stage], p.kv_maps[1], smem.v_barriers.full[v_at.stage], from);
      }
      __syncwarp();
      k_at.advance();
      v_at.advance();
    }
    at = next;
  }
}

}  // namespace flash_ext::v3::forward
