// The producer warpgroup: two threads that feed the consumers by TMA.
#pragma once

#include "params.h"
#include "sm90/copy_tile.cuh"
#include "v3/forward/config.cuh"
#include "v3/forward/kernel_params.cuh"
#include "v3/forward/placed_tile.cuh"

namespace flash_ext::v3::forward {

// The K/V blocks of a tile whose rows begin at row0.
template <typename Config>
__device__ __forceinline__ BlockRange tile_blocks(const typename Config::Params& p,
                                                  const typename Config::Tile& tile, int row0) {
  if constexpr (Config::kIsGeneral) {
    return band_blocks(band_of(p, tile), row0, Config::kBlockM, Config::kBlockN);
  } else {
    const int blocks = num_key_blocks(p.mask, row0, Config::kBlockM, Config::kBlockN);
    if (!Config::kSplitsKeys) return {0, blocks};
    return split_blocks(blocks, tile.split, p.schedule.num_splits);
  }
}

// K and V blocks of one tile after another, the last visible block first.
template <typename Config>
__device__ __forceinline__ void produce_kv(typename Config::SharedStorage& smem,
                                           const typename Config::Params& p) {
  sm90::RingPosition<Config::kKStages> k_at;
  sm90::RingPosition<Config::kVStages> v_at;
  typename Config::Tile tile = take_kv_tile<Config>(p, 0);
  for (int round = 1; tile.is_valid; ++round) {
    const int kv_head_idx = tile.head_idx / p.group_size;
    const int row0 = first_row_of<Config>(p, tile);
    const BlockRange blocks = tile_blocks<Config>(p, tile, row0);
    const EntryMap maps = kv_maps<Config>(p, tile.batch_idx);
    typename Config::Tile next;
    if (Config::kSplitsKeys && blocks.begin == blocks.end) next = take_kv_tile<Config>(p, round);
    for (int n_block = blocks.end - 1; n_block >= blocks.begin; --n_block) {
      const sm90::TileCoords from{n_block * Config::kBlockN, kv_head_idx, maps.batch_idx};
      sm90::wait_empty(smem.k_barriers, k_at);
      sm90::load_tile(smem.k[k_at.stage], maps.map[0], smem.k_barriers.full[k_at.stage], from);
      k_at.advance();
      sm90::wait_empty(smem.v_barriers, v_at);
      sm90::load_tile(smem.v[v_at.stage], maps.map[1], smem.v_barriers.full[v_at.stage], from);
      v_at.advance();
      // Behind the first block: its divisions must not keep the consumers waiting.
      if (n_block == blocks.end - 1) next = take_kv_tile<Config>(p, round);
    }
    tile = next;
  }
}

// What a tile's results depend on besides Q, K and V; read once a tile.
template <typename Config>
struct HeadFacts {
  float slope = 0.f;
  float sink = -INFINITY;
  int q_begin = 0;

  __device__ __forceinline__ HeadFacts(const typename Config::Params& p,
                                       const typename Config::Tile& tile) {
    if constexpr (Config::kIsGeneral) {
      if (!tile.is_valid) return;
      if (p.sequences.is_packed()) {
        q_begin = static_cast<int>(p.sequences[tile.batch_idx].q_begin);
      }
      if (p.alibi_slopes.data != nullptr) {
        slope =
            *p.alibi_slopes.template at<const float>(tile.batch_idx, tile.head_idx) * p.bias_factor;
      }
      if (p.sinks.data != nullptr) {
        sink = *p.sinks.template at<const float>(tile.batch_idx, tile.head_idx);
      }
    }
  }
};

// The blocks of a tile that are the warpgroup's whose rows begin at row0.
template <typename Config>
__device__ __forceinline__ BlockRange own_blocks(const typename Config::Params& p,
                                                 const typename Config::Tile& tile,
                                                 const BlockRange& blocks, int row0) {
  if constexpr (Config::kIsGeneral) {
    const BlockRange own = band_blocks(band_of(p, tile), row0, kRowsPerWarpgroup, Config::kBlockN);
    return own.begin < own.end ? own : BlockRange{blocks.begin, blocks.begin};
  } else {
    const int end = num_key_blocks(p.mask, row0, kRowsPerWarpgroup, Config::kBlockN);
    return {blocks.begin, max(blocks.begin, min(blocks.end, end))};
  }
}

// The O that a warpgroup has staged in a Q buffer.
template <typename Config>
__device__ __forceinline__ void send_output(typename Config::SharedStorage& smem,
                                            const typename Config::Params& p, int stage,
                                            int warpgroup_idx) {
  const typename Config::WarpgroupTile& tile = smem.tile[stage][warpgroup_idx];
  if (tile.begin == tile.end) return;
  const EntryMap to = out_map<Config>(p, tile.batch_idx);
  sm90::store_slabs(smem.q[stage][warpgroup_idx], *to.map,
                    {tile.row0, tile.head_idx, to.batch_idx});
  ptx::tma_store_commit_group();
}

// Each warpgroup's rows of Q, with the tile they belong to; behind the last one the end mark.
// Before a buffer is filled again, the O in it is sent off.
template <typename Config>
__device__ __forceinline__ void produce_q(typename Config::SharedStorage& smem,
                                          const typename Config::Params& p) {
  constexpr int kBlockN = Config::kBlockN;
  sm90::RingPosition<Config::kQBuffers> at;
  typename Config::Tile tile;
  int round = 0;
  [[maybe_unused]] TileQueue::Position queue_at;
  do {
    if constexpr (Config::kIsUniform) {
      tile = take_q_tile<Config>(p, smem.tiles.follow(queue_at));
      ++round;
    } else {
      tile = take_q_tile<Config>(p, round++);
    }
    const int tile_row0 = first_row_of<Config>(p, tile);
    const BlockRange blocks = tile_blocks<Config>(p, tile, tile_row0);
    const HeadFacts<Config> head(p, tile);
#pragma unroll 1
    for (int c = 0; c < Config::kConsumers; ++c) {
      auto& ring = smem.q_barriers[c];
      const int row0 = tile_row0 + kRowsPerWarpgroup * c;
      const BlockRange own = own_blocks<Config>(p, tile, blocks, row0);
      sm90::wait_empty(ring, at);
      if (Config::kStagesOutput && round > Config::kQBuffers) {
        send_output<Config>(smem, p, at.stage, c);
        ptx::tma_store_wait_read();
      }
      const auto full_end = [&](const auto& mask) { return mask.key_end(row0) / kBlockN; };
      if constexpr (Config::kIsGeneral) {
        const BandMask band = band_of(p, tile);
        const int last_row = min(row0 + kRowsPerWarpgroup, band.seqlen_q) - 1;
        smem.tile[at.stage][c] = {
            {row0, tile.head_idx, tile.batch_idx, own.begin, own.end, full_end(band),
             blocks.end - own.end, 0, false, tile.is_valid != 0},
            band.seqlen_q,
            band.seqlen_k,
            band.diagonal,
            head.q_begin,
            ceil_div(band.key_begin(last_row), kBlockN),
            own.begin - blocks.begin,
            head.slope,
            head.sink};
      } else {
        smem.tile[at.stage][c] = {
            row0,
            tile.head_idx,
            tile.batch_idx,
            own.begin,
            own.end,
            max(blocks.begin, full_end(p.mask)),
            blocks.end - own.end,
            static_cast<int16_t>(tile.split),
            Config::kHalvesFirst && keys_seen(p.mask, row0) <= own.end * kBlockN - kBlockN / 2,
            tile.is_valid != 0};
      }
      if (tile.is_valid) {
        const EntryMap from = q_map<Config>(p, tile.batch_idx);
        sm90::load_tile(smem.q[at.stage][c], *from.map, ring.full[at.stage],
                        {row0, tile.head_idx, from.batch_idx});
      } else {
        ptx::mbarrier_arrive(ring.full[at.stage]);
      }
    }
    at.advance();
  } while (tile.is_valid);
  // Of the lengths that the GPU reads there may be none for a thread block, which has no O then.
  if (!Config::kStagesOutput || (Config::kIsGeneral && round == 1)) return;
  static_assert(!Config::kStagesOutput || Config::kQBuffers == 2);  // one beside the end mark's
  for (int c = 0; c < Config::kConsumers; ++c) {
    sm90::wait_empty(smem.q_barriers[c], at);
    send_output<Config>(smem, p, at.stage, c);
  }
  ptx::tma_store_wait_read();
}

}  // namespace flash_ext::v3::forward
