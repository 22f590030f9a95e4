// The producer warpgroup: a thread that feeds the consumers by TMA, one that adds their dQ to
// memory, and two warps that subtract the mean from K.
#pragma once

#include "ptx/bulk_copy.cuh"
#include "ptx/griddepcontrol.cuh"
#include "sm90/copy_tile.cuh"
#include "v3/backward/config.cuh"

namespace flash_ext::v3::backward {

// Calls visit(tile, blocks) for each tile of this thread block that has query blocks.
template <typename Config, typename Visit>
__device__ __forceinline__ void for_each_tile(const KernelParams& p, Visit visit) {
  Tile tile = p.schedule.tile(0);
  for (int round = 1; tile.is_valid; ++round) {
    const BlockRange blocks =
        query_blocks(p.mask, tile.n_block * Config::kBlockN, Config::kBlockM);
    if (blocks.begin < blocks.end) visit(tile, blocks);
    tile = p.schedule.tile(round);
  }
}

// Calls visit(head_idx, m_block) for each step of a tile.
template <typename Visit>
__device__ __forceinline__ void for_each_step(const KernelParams& p, const Tile& tile,
                                              const BlockRange& blocks, Visit visit) {
  const int first_head = tile.kv_head_idx * p.group_size;
#pragma unroll 1
  for (int head_idx = first_head; head_idx < first_head + p.group_size; ++head_idx) {
#pragma unroll 1
    for (int m_block = blocks.begin; m_block < blocks.end; ++m_block) visit(head_idx, m_block);
  }
}

template <typename Config>
__device__ __forceinline__ void produce(typename Config::SharedStorage& smem,
                                        const KernelParams& p) {
  using QTile = typename Config::QTile;
  constexpr int kBlockM = Config::kBlockM;
  sm90::RingPosition<Config::kStages> at;
  sm90::RingPosition<1> kv_at;
  bool is_first = true;
  for_each_tile<Config>(p, [&](const Tile& tile, const BlockRange& blocks) {
    bool needs_kv = true;
    for_each_step(p, tile, blocks, [&](int head_idx, int m_block) {
      const sm90::TileCoords from{m_block * kBlockM, head_idx, tile.batch_idx};
      const int64_t block = row_block(p, tile.batch_idx, head_idx, m_block);
      auto& full = smem.query_barriers.full[at.stage];
      sm90::wait_empty(smem.query_barriers, at);
      ptx::mbarrier_arrive_expect_tx(
          full, 2 * QTile::kBytes + static_cast<int>(sizeof(smem.statistics[0])) +
                    static_cast<int>(sizeof(smem.delta[0])));
      sm90::load_slabs(smem.q[at.stage], p.q_map, full, from);
      sm90::load_slabs(smem.dout[at.stage], p.dout_map, full, from);
      if (needs_kv) {
        const sm90::TileCoords keys{tile.n_block * Config::kBlockN, tile.kv_head_idx,
                                    tile.batch_idx};
        sm90::wait_empty(smem.k_barriers, kv_at);
        sm90::load_tile(smem.k, p.k_map, smem.k_barriers.full[0], keys);
        sm90::wait_empty(smem.v_barriers, kv_at);
        sm90::load_tile(smem.v, p.v_map, smem.v_barriers.full[0], keys);
        kv_at.advance();
        needs_kv = false;
      }
      if (is_first) ptx::griddepcontrol_wait();  // the rest is the preprocess kernel's
      is_first = false;
      ptx::bulk_load(&smem.statistics[at.stage],
                     reinterpret_cast<const RowStatistics<kBlockM>*>(p.row_statistics) + block,
                     sizeof(smem.statistics[0]), full);
      ptx::bulk_load(smem.delta[at.stage], p.delta + block * kBlockM, sizeof(smem.delta[0]), full);
      at.advance();
    });
  });
  ptx::griddepcontrol_launch_dependents();
}

// By one thread: the dQ of one step after another from shared memory to the accumulator, where
// other thread blocks add, too.
template <typename Config>
__device__ __forceinline__ void reduce_dq(typename Config::SharedStorage& smem,
                                          const KernelParams& p) {
  constexpr int kFloats = Config::kBlockM * Config::kHeadDim;
  sm90::RingPosition<1> at;
  for_each_tile<Config>(p, [&](const Tile& tile, const BlockRange& blocks) {
    for_each_step(p, tile, blocks, [&](int head_idx, int m_block) {
      const int64_t block = row_block(p, tile.batch_idx, head_idx, m_block);
      sm90::wait_full(smem.dq_barriers, at);
      ptx::bulk_reduce_add(p.dq_accum + block * kFloats, smem.dq, sizeof(smem.dq));
      ptx::tma_store_commit_group();
      ptx::tma_store_wait_read();
      ptx::mbarrier_arrive(smem.dq_barriers.empty[0]);
      at.advance();
    });
  });
  ptx::bulk_wait();
}

// K minus its mean, from which dQ = dS K is computed. Exactly, a row of dS sums to 0 (or to dL, see
// the postprocess kernel); rounded it does not, and the remainder times a large mean of K is an
// error of 10 to 50% in dQ on biased keys.
template <typename Config, int kThreads>
__device__ __forceinline__ void centre_keys(typename Config::SharedStorage& smem,
                                            const KernelParams& p, int thread_idx) {
  using Element = typename Config::Element;
  using KVTile = typename Config::KVTile;
  constexpr int kRowsPerPass = kThreads / 16;  // of pieces of four columns
  const int col_in_slab = thread_idx % 16 * 4;
  sm90::RingPosition<1> at;
  ptx::griddepcontrol_wait();
  for_each_tile<Config>(p, [&](const Tile& tile, const BlockRange&) {
    const float* mean = p.key_mean + (int64_t{tile.batch_idx} * p.heads_kv + tile.kv_head_idx) *
                                         Config::kHeadDim;
    sm90::wait_full(smem.k_barriers, at);
    sm90::wait_empty(smem.k_centred_barriers, at);
#pragma unroll 1
    for (int slab = 0; slab < KVTile::kSlabs; ++slab) {
      const int col = slab * sm90::kSlabCols + col_in_slab;
      const float4 m = *reinterpret_cast<const float4*>(mean + col);
#pragma unroll 2
      for (int row = thread_idx / 16; row < KVTile::kRows; row += kRowsPerPass) {
        const int offset = KVTile::chunk_offset(row, col) + col % 8 * 2;
        const uint2 bits = *reinterpret_cast<const uint2*>(smem.k.data + offset);
        const auto* x = reinterpret_cast<const Element*>(&bits);
        *reinterpret_cast<uint2*>(smem.k_centred.data + offset) =
            make_uint2(pack<Element>(to_float(x[0]) - m.x, to_float(x[1]) - m.y),
                       pack<Element>(to_float(x[2]) - m.z, to_float(x[3]) - m.w));
      }
    }
    ptx::fence_proxy_async();
    __syncwarp();
    if (thread_idx % 32 == 0) {
      ptx::mbarrier_arrive(smem.k_barriers.empty[0]);
      ptx::mbarrier_arrive(smem.k_centred_barriers.full[0]);
    }
    at.advance();
  });
}

}  // namespace flash_ext::v3::backward
