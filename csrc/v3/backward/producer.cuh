// The producer warpgroup: a thread that feeds the consumers by TMA, one that adds their dQ to
// memory, and two warps that subtract the mean from K.
#pragma once

#include <type_traits>

#include "ptx/bulk_copy.cuh"
#include "ptx/griddepcontrol.cuh"
#include "sm90/copy_tile.cuh"
#include "v3/backward/config.cuh"

namespace flash_ext::v3::backward {

// Calls visit(head_idx, m_block) for each step of a tile.
template <typename Visit>
__device__ __forceinline__ void for_each_step(const KernelParams& p, const TileWork& tile,
                                              Visit visit) {
  const int first_head = tile.kv_head_idx * p.group_size;
#pragma unroll 1
  for (int head_idx = first_head; head_idx < first_head + p.group_size; ++head_idx) {
#pragma unroll 1
    for (int m_block = tile.m_begin; m_block < tile.m_end; ++m_block) visit(head_idx, m_block);
  }
}

// By one thread: announces the tiles and loads them.
template <typename Config>
class Producer {
  using SharedStorage = typename Config::SharedStorage;
  using QTile = typename Config::QTile;
  static constexpr int kBlockM = Config::kBlockM;

 public:
  __device__ __forceinline__ Producer(SharedStorage& smem, const KernelParams& params)
      : smem_(smem), p_(params) {}

  __device__ __forceinline__ void run() {
    bool is_valid = true;
    for (int round = 0; is_valid; ++round) {
      const TileWork tile = announce(p_.schedule.tile(round));
      is_valid = tile.is_valid;
      bool is_first = true;
      for_each_step(p_, tile, [&](int head_idx, int m_block) {
        load_queries(tile, head_idx, m_block);
        if (is_first) load_keys(tile);
        is_first = false;
        load_statistics(tile, head_idx, m_block);
        at_.advance();
      });
    }
    ptx::griddepcontrol_launch_dependents();
  }

 private:
  __device__ __forceinline__ TileWork announce(const Tile& tile) {
    const BlockRange blocks =
        query_blocks(p_.mask, tile.n_block * Config::kBlockN, Config::kBlockM);
    const TileWork work{tile.n_block,  tile.kv_head_idx, tile.batch_idx,
                        blocks.begin, tile.is_valid ? blocks.end : blocks.begin, tile.is_valid};
    sm90::wait_empty(smem_.tile_barriers, tile_at_);
    smem_.tile[tile_at_.stage] = work;
    ptx::mbarrier_arrive(smem_.tile_barriers.full[tile_at_.stage]);
    tile_at_.advance();
    return work;
  }

  __device__ __forceinline__ void load_queries(const TileWork& tile, int head_idx, int m_block) {
    constexpr int kStatisticsBytes = sizeof(smem_.statistics[0]) + sizeof(smem_.delta[0]);
    const sm90::TileCoords from{m_block * kBlockM, head_idx, tile.batch_idx};
    auto& full = smem_.query_barriers.full[at_.stage];
    sm90::wait_empty(smem_.query_barriers, at_);
    ptx::mbarrier_arrive_expect_tx(full, 2 * QTile::kBytes + kStatisticsBytes);
    sm90::load_slabs(smem_.q[at_.stage], p_.q_map, full, from);
    sm90::load_slabs(smem_.dout[at_.stage], p_.dout_map, full, from);
  }

  __device__ __forceinline__ void load_keys(const TileWork& tile) {
    const sm90::TileCoords from{tile.n_block * Config::kBlockN, tile.kv_head_idx, tile.batch_idx};
    sm90::wait_empty(smem_.k_barriers, kv_at_);
    sm90::load_tile(smem_.k, p_.k_map, smem_.k_barriers.full[0], from);
    sm90::wait_empty(smem_.v_barriers, kv_at_);
    sm90::load_tile(smem_.v, p_.v_map, smem_.v_barriers.full[0], from);
    kv_at_.advance();
  }

  // Last, for the very first of them have to wait for the preprocess kernel.
  __device__ __forceinline__ void load_statistics(const TileWork& tile, int head_idx,
                                                  int m_block) {
    if (!may_read_statistics_) ptx::griddepcontrol_wait();
    may_read_statistics_ = true;
    const int64_t block = row_block(p_, tile.batch_idx, head_idx, m_block);
    auto& full = smem_.query_barriers.full[at_.stage];
    ptx::bulk_load(&smem_.statistics[at_.stage],
                   reinterpret_cast<const RowStatistics<kBlockM>*>(p_.row_statistics) + block,
                   sizeof(smem_.statistics[0]), full);
    ptx::bulk_load(smem_.delta[at_.stage], p_.delta + block * kBlockM, sizeof(smem_.delta[0]),
                   full);
  }

  SharedStorage& smem_;
  const KernelParams& p_;
  sm90::RingPosition<Config::kStages> at_;
  sm90::RingPosition<2> tile_at_;
  sm90::RingPosition<1> kv_at_;
  bool may_read_statistics_ = false;
};

// By one thread: the dQ of one step after another from shared memory to the accumulator, where
// other thread blocks add, too.
template <typename Config>
__device__ __forceinline__ void reduce_dq(typename Config::SharedStorage& smem,
                                          const KernelParams& p) {
  constexpr int kFloats = Config::kBlockM * Config::kHeadDim;
  sm90::RingPosition<1> dq_at;
  for (sm90::RingPosition<2> at;; at.advance()) {
    sm90::wait_full(smem.tile_barriers, at);
    const TileWork tile = smem.tile[at.stage];
    if (!tile.is_valid) break;
    ptx::mbarrier_arrive(smem.tile_barriers.empty[at.stage]);
    for_each_step(p, tile, [&](int head_idx, int m_block) {
      const int64_t block = row_block(p, tile.batch_idx, head_idx, m_block);
      sm90::wait_full(smem.dq_barriers, dq_at);
      ptx::bulk_reduce_add(p.dq_accum + block * kFloats, smem.dq, sizeof(smem.dq));
      ptx::tma_store_commit_group();
      ptx::tma_store_wait_read();
      ptx::mbarrier_arrive(smem.dq_barriers.empty[0]);
      dq_at.advance();
    });
  }
  ptx::bulk_wait();
}

// Two warps, of which one sends dK off and the other dV, and which together compute K minus its
// mean. From that dQ = dS K is computed: exactly, a row of dS sums to 0 (or to dL, see the
// postprocess kernel); rounded it does not, and the remainder times a large mean of K is an error
// of 10 to 50% in dQ on biased keys.
inline constexpr int kKeyWarps = 2;

template <typename Config>
class KeyWarp {
  using Element = typename Config::Element;
  using Pair = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;
  using KVTile = typename Config::KVTile;
  using SharedStorage = typename Config::SharedStorage;
  static constexpr int kRowsPerPass = kKeyWarps * 4;  // eight columns a lane

 public:
  __device__ __forceinline__ KeyWarp(SharedStorage& smem, const KernelParams& params, int warp_idx)
      : smem_(smem), p_(params), warp_idx_(warp_idx), lane_idx_(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    ptx::griddepcontrol_wait();
    uint32_t phase = 0, work_phase = 0;
    for (sm90::RingPosition<2> at;; at.advance()) {
      sm90::wait_full(smem_.tile_barriers, at);
      const TileWork tile = smem_.tile[at.stage];
      if (!tile.is_valid) break;
      if (p_.dq_accum != nullptr && tile.m_begin < tile.m_end) {
        centre(tile, phase, work_phase);
        work_phase ^= 1;
      }
      ptx::mbarrier_wait(smem_.gradients_full, phase);
      if (lane_idx_ == 0) {
        send(tile);
        ptx::mbarrier_arrive(smem_.tile_barriers.empty[at.stage]);
        ptx::mbarrier_arrive(smem_.gradients_sent);
      }
      phase ^= 1;
    }
  }

 private:
  __device__ __forceinline__ void centre(const TileWork& tile, uint32_t phase,
                                         uint32_t work_phase) {
    const int col_in_slab = lane_idx_ % 8 * 8;
    const float* mean = p_.key_mean + (int64_t{tile.batch_idx} * p_.heads_kv + tile.kv_head_idx) *
                                          Config::kHeadDim;
    Pair m[KVTile::kSlabs][4];
#pragma unroll
    for (int slab = 0; slab < KVTile::kSlabs; ++slab) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int col = slab * sm90::kSlabCols + col_in_slab + 2 * i;
        const float2 x = *reinterpret_cast<const float2*>(mean + col);
        const uint32_t bits = pack<Element>(x.x, x.y);
        m[slab][i] = reinterpret_cast<const Pair&>(bits);
      }
    }
    ptx::mbarrier_wait(smem_.k_barriers.full[0], work_phase);
    ptx::mbarrier_wait(smem_.gradients_sent, phase ^ 1);
    const int row0 = warp_idx_ * 4 + lane_idx_ / 8;
#pragma unroll
    for (int slab = 0; slab < KVTile::kSlabs; ++slab) {
#pragma unroll 2
      for (int row = row0; row < KVTile::kRows; row += kRowsPerPass) {
        const int offset = KVTile::chunk_offset(row, slab * sm90::kSlabCols + col_in_slab);
        uint4 bits = *reinterpret_cast<const uint4*>(smem_.k.data + offset);
        auto* x = reinterpret_cast<Pair*>(&bits);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = __hsub2(x[i], m[slab][i]);
        *reinterpret_cast<uint4*>(smem_.k_centred.data + offset) = bits;
      }
    }
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane_idx_ == 0) {
      ptx::mbarrier_arrive(smem_.k_barriers.empty[0]);
      ptx::mbarrier_arrive(smem_.k_centred_full);
    }
  }

  __device__ __forceinline__ void send(const TileWork& tile) {
    const bool sends_dk = warp_idx_ == 0;
    if ((sends_dk ? p_.dk : p_.dv).data == nullptr) return;
    for (int part = 0; part < Config::kConsumers; ++part) {
      const sm90::TileCoords to{tile.n_block * Config::kBlockN + 64 * part, tile.kv_head_idx,
                                tile.batch_idx};
      sm90::store_slabs(sends_dk ? smem_.dk[part] : smem_.dv[part],
                        sends_dk ? p_.dk_map : p_.dv_map, to);
    }
    ptx::tma_store_commit_group();
    ptx::tma_store_wait_read();
  }

  SharedStorage& smem_;
  const KernelParams& p_;
  const int warp_idx_;
  const int lane_idx_;
};

}  // namespace flash_ext::v3::backward
