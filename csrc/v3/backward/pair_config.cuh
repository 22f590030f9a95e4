// Tiles of the v3 backward at head_dim 256.
#pragma once

#include "ptx/warpgroup.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/smem_tile.cuh"
#include "v3/backward/kernel_params.cuh"

namespace flash_ext::v3::backward {

// What the consumers are told of the tile whose K has arrived.
struct PairTile {
  int key0;  // the first of this thread block's keys
  int kv_head_idx;
  int batch_idx;
  int m_begin, m_end;  // query blocks that see keys of the pair
  int is_valid;        // 0: there are no more
};

// Query blocks of a tile, over all heads of the group.
__device__ __forceinline__ int num_query_blocks(const PairTile& tile, int group_size) {
  return ptx::warp_uniform(max(tile.m_end - tile.m_begin, 0)) * group_size;
}

template <typename Element_>
struct PairConfig {
  using Element = Element_;
  static constexpr int kHeadDim = 256;
  static constexpr int kHalfDim = kHeadDim / 2;
  static constexpr int kBlockM = 64;
  static constexpr int kThreadBlockN = 64;           // keys of a thread block
  static constexpr int kBlockN = 2 * kThreadBlockN;  // of the pair, the cluster
  static constexpr int kClusterSize = 2;
  static constexpr int kStages = 2;            // of Q, P and dS
  static constexpr int kDoutStages = 3;        // of halves of dO
  static constexpr bool kCentresKeys = false;  // no room for keys without their mean

  // Four warpgroups, and the registers of their threads, 4 x 128 in all: the launch gives everyone
  // as many.
  static constexpr int kNumThreads = 4 * 128;
  static constexpr int kProducerRegisters = 32;
  static constexpr int kDvRegisters = 200;
  static constexpr int kDkRegisters = 192;
  static constexpr int kDqRegisters = 88;
  static_assert(kProducerRegisters + kDvRegisters + kDkRegisters + kDqRegisters == 4 * 128);

  using Tile = sm90::SmemTile<Element, 64, kHeadDim>;
  using HalfTile = sm90::SmemTile<Element, 64, kHalfDim>;
  using ScoreTile = sm90::SmemTile<Element, 64, 64>;
  static_assert(2 * sizeof(HalfTile) == sizeof(Tile), "its slabs are the tile's");

  struct SharedStorage {
    Tile k, v;
    HalfTile other_k;  // the other thread block's keys, the columns of this one's half of dQ
    Tile q[kStages];
    HalfTile dout[kDoutStages];
    ScoreTile ds[kStages];        // P^T first, dS^T in its place afterwards: a row for each key
    ScoreTile other_ds[kStages];  // the other thread block's
    RowStatistics<kBlockM> statistics[kStages];
    alignas(16) float delta[kStages][kBlockM];
    PairTile tile[2];  // one round's and the next one's
    sm90::RingBarriers<1> k_barriers, v_barriers;
    sm90::RingBarriers<kStages> q_barriers;
    sm90::RingBarriers<kDoutStages> dout_barriers;
    ptx::Mbarrier p_full[kStages][4];  // 16 keys each
    sm90::RingBarriers<kStages> ds_barriers;
    ptx::Mbarrier other_ds_full[kStages];
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024, "what one thread block gets on sm_90");
};

// Address of this lane's row of the 8x8 matrices of its warp's 16 keys and the k-th 16 queries.
template <typename Config>
__device__ __forceinline__ uint32_t score_addr(const typename Config::ScoreTile& tile, int k) {
  const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 16;
  const int col = 16 * k + threadIdx.x / 16 % 2 * 8;
  return ptx::smem_addr(tile.data) + Config::ScoreTile::chunk_offset(row, col);
}

}  // namespace flash_ext::v3::backward
