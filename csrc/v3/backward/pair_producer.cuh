// The producer warpgroup at head_dim 256: three threads that feed the consumers by TMA.
#pragma once

#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/griddepcontrol.cuh"
#include "sm90/copy_tile.cuh"
#include "v3/backward/pair_config.cuh"

namespace flash_ext::v3::backward {

// K and V of one tile after another; behind the last one the end mark.
template <typename Config>
__device__ __forceinline__ void produce_keys(typename Config::SharedStorage& smem,
                                             const KernelParams& p) {
  using KTile = typename Config::Tile;
  using OtherKTile = typename Config::HalfTile;
  constexpr int kThreadBlockN = Config::kThreadBlockN;
  const int rank = ptx::cluster_block_rank();
  sm90::RingPosition<1> at;
  for (int round = 0;; ++round) {
    const Tile tile = p.schedule.tile(round, blockIdx.x / Config::kClusterSize);
    const int pair_key0 = tile.n_block * Config::kBlockN;
    const int key0 = pair_key0 + rank * kThreadBlockN;
    const int other_key0 = pair_key0 + (1 - rank) * kThreadBlockN;
    const BlockRange blocks = query_blocks(p.mask, pair_key0, Config::kBlockM);
    sm90::wait_empty(smem.k_barriers, at);
    smem.tile[round % 2] = {key0,         tile.kv_head_idx, tile.batch_idx,
                            blocks.begin, blocks.end,       tile.is_valid};
    ptx::Mbarrier& k_full = smem.k_barriers.full[0];
    ptx::Mbarrier& v_full = smem.v_barriers.full[0];
    if (!tile.is_valid) {
      ptx::mbarrier_arrive(k_full);
      ptx::mbarrier_arrive(v_full);
      return;
    }
    ptx::mbarrier_arrive_expect_tx(k_full, KTile::kBytes + OtherKTile::kBytes);
    sm90::load_slabs(smem.k, p.k_map, k_full, {key0, tile.kv_head_idx, tile.batch_idx});
    sm90::load_slabs(smem.other_k, p.k_map, k_full,
                     {other_key0, tile.kv_head_idx, tile.batch_idx, rank * Config::kHalfDim});
    sm90::wait_empty(smem.v_barriers, at);
    sm90::load_tile(smem.v, p.v_map, v_full, {key0, tile.kv_head_idx, tile.batch_idx});
    at.advance();
  }
}

// Calls visit(from, row_block) for the query blocks of one tile after another, head after head.
template <typename Config, typename Visit>
__device__ __forceinline__ void for_each_query_block(const KernelParams& p, Visit visit) {
  constexpr int kBlockM = Config::kBlockM;
#pragma unroll 1
  for (int round = 0;; ++round) {
    const Tile tile = p.schedule.tile(round, blockIdx.x / Config::kClusterSize);
    if (!tile.is_valid) return;
    const BlockRange blocks = query_blocks(p.mask, tile.n_block * Config::kBlockN, kBlockM);
    const int first_head = tile.kv_head_idx * p.group_size;
#pragma unroll 1
    for (int head_idx = first_head; head_idx < first_head + p.group_size; ++head_idx) {
#pragma unroll 1
      for (int m_block = blocks.begin; m_block < blocks.end; ++m_block) {
        visit(sm90::TileCoords{m_block * kBlockM, head_idx, tile.batch_idx},
              row_block(p, tile.batch_idx, head_idx, m_block));
      }
    }
  }
}

// Q of every query block, with L and delta.
template <typename Config>
__device__ __forceinline__ void produce_queries(typename Config::SharedStorage& smem,
                                                const KernelParams& p) {
  using Statistics = RowStatistics<Config::kBlockM>;
  constexpr int kDeltaBytes = Config::kBlockM * static_cast<int>(sizeof(float));
  constexpr int kBytes = Config::Tile::kBytes + static_cast<int>(sizeof(Statistics)) + kDeltaBytes;
  const auto* statistics = reinterpret_cast<const Statistics*>(p.row_statistics);
  sm90::RingPosition<Config::kStages> at;
  ptx::griddepcontrol_wait();  // L and delta are the preprocess kernel's
  for_each_query_block<Config>(p, [&](sm90::TileCoords from, int64_t block) {
    ptx::Mbarrier& full = smem.q_barriers.full[at.stage];
    sm90::wait_empty(smem.q_barriers, at);
    ptx::mbarrier_arrive_expect_tx(full, kBytes);
    sm90::load_slabs(smem.q[at.stage], p.q_map, full, from);
    ptx::bulk_load(&smem.statistics[at.stage], statistics + block, sizeof(Statistics), full);
    ptx::bulk_load(smem.delta[at.stage], p.delta + block * Config::kBlockM, kDeltaBytes, full);
    at.advance();
  });
  ptx::griddepcontrol_launch_dependents();
}

// Its dO, in halves of the columns.
template <typename Config>
__device__ __forceinline__ void produce_douts(typename Config::SharedStorage& smem,
                                              const KernelParams& p) {
  sm90::RingPosition<Config::kDoutStages> at;
  for_each_query_block<Config>(p, [&](sm90::TileCoords from, int64_t) {
    for (; from.col < Config::kHeadDim; from.col += Config::kHalfDim) {
      sm90::wait_empty(smem.dout_barriers, at);
      sm90::load_tile(smem.dout[at.stage], p.dout_map, smem.dout_barriers.full[at.stage], from);
      at.advance();
    }
  });
}

}  // namespace flash_ext::v3::backward
