// The producer warpgroup: a thread that feeds the consumers by TMA, one that sends dK and dV off,
// and one that sends dQ off.
#pragma once

#include "ptx/bulk_copy.cuh"
#include "ptx/global_counter.cuh"
#include "ptx/griddepcontrol.cuh"
#include "sm90/copy_tile.cuh"
#include "v3/backward/config.cuh"
#include "v3/backward/placed_tile.cuh"

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
  using Params = typename Config::Params;
  using Work = typename Config::Work;
  static constexpr int kBlockM = Config::kBlockM;

 public:
  __device__ __forceinline__ Producer(SharedStorage& smem, const Params& params)
      : smem_(smem), p_(params) {}

  __device__ __forceinline__ void run() {
    bool is_valid = true;
    for (int round = 0; is_valid; ++round) {
      if constexpr (Config::kIsGeneral) {
        const Work tile = take_tile<Config>(p_, round);
        load_steps(tile, round);
        is_valid = tile.is_valid;
      } else {
        const Tile tile = p_.schedule.tile(round);
        const TileWork work =
            announce(tile, query_blocks(p_.mask, tile.n_block * Config::kBlockN, Config::kBlockM));
        bool is_first = true;
        for_each_step(p_, work, [&](int head_idx, int m_block) {
          load_step(work, head_idx, m_block, is_first);
          at_.advance();
          is_first = false;
        });
        is_valid = tile.is_valid;
      }
    }
    // Where a block_mask leaves no step to anybody, the postprocess kernel would come too soon.
    if (Config::kIsGeneral && !may_read_statistics_) ptx::griddepcontrol_wait();
    ptx::griddepcontrol_launch_dependents();
  }

 private:
  // Of a general kernel's tile. Whether there is a step, and whether it is the last, is known once
  // the next one has been looked for.
  __device__ __forceinline__ void load_steps(Work tile, int round) {
    const int key0 = tile.n_block * Config::kBlockN;
    const BandMask band = mask_of(p_, tile);
    const int last_key = min(key0 + Config::kBlockN, band.seqlen_k) - 1;
    BlockRange blocks = query_blocks(band, key0, last_key, kBlockM);
    if (!tile.is_valid || last_key < key0) blocks.end = blocks.begin;
    StepWalk<kBlockM> walk(p_, band, tile.batch_idx, tile.kv_head_idx, tile.n_block, blocks);
    auto step = walk.next();
    // Each phase is waited for before there can be another. With steps, before the first's mask.
    if (!step.exists && tile.is_valid) await_dv_sent(round);
    tile.m_end = step.exists;
    announce(tile);
    if (step.exists) acquire_inputs(p_, tile.batch_idx);
    bool is_first = true;
#pragma unroll 1
    while (step.exists) {
      const auto next = walk.next();
      sm90::wait_empty(smem_.query_barriers, at_);
      smem_.steps[at_.stage + Config::kStages * at_.phase] = {
          step.flags | (next.exists ? 0 : StepWork::kIsLast), step.m_block * kBlockM,
          row_block_of(p_, tile, step.head_idx, step.m_block), next.m_block * kBlockM,
          tile.batch_idx * p_.heads_q + next.head_idx};
      load_step(tile, step.head_idx, step.m_block, is_first);
      if constexpr (Config::kHasMask) {
        if (is_first) await_dv_sent(round);
        load_mask<Config::Scores::kMask>(smem_.ds[at_.stage], p_.mask_map, smem_.mask_barriers[0],
                                         at_, tile.n_block * Config::kBlockN,
                                         step.m_block * kBlockM, step.head_idx, tile.batch_idx);
      }
      at_.advance();
      is_first = false;
      step = next;
    }
  }

  __device__ __forceinline__ void load_step(const Work& tile, int head_idx, int m_block,
                                            bool is_first) {
    load_queries(tile, head_idx, m_block);
    if (is_first) load_keys(tile);
    // Last what the very first time has to wait for the preprocess kernel.
    if (!may_read_statistics_) ptx::griddepcontrol_wait();
    may_read_statistics_ = true;
    if (is_first) load_key_mean(tile);
    load_statistics(tile, head_idx, m_block);
  }

  __device__ __forceinline__ TileWork announce(const Tile& tile, BlockRange blocks) {
    const TileWork work{tile.n_block,
                        tile.kv_head_idx,
                        tile.batch_idx,
                        blocks.begin,
                        tile.is_valid ? blocks.end : blocks.begin,
                        tile.is_valid};
    announce(work);
    return work;
  }

  __device__ __forceinline__ void announce(const Work& work) {
    sm90::wait_empty(smem_.tile_barriers, tile_at_);
    smem_.tile[tile_at_.stage] = work;
    ptx::mbarrier_arrive(smem_.tile_barriers.full[tile_at_.stage]);
    tile_at_.advance();
  }

  __device__ __forceinline__ void load_queries(const Work& tile, int head_idx, int m_block) {
    constexpr int kStatisticsBytes = sizeof(smem_.statistics[0]) + sizeof(smem_.delta[0]);
    const EntryMaps maps = query_maps(p_, tile);
    const sm90::TileCoords from{m_block * kBlockM, head_idx, maps.batch_idx};
    auto& full = smem_.query_barriers.full[at_.stage];
    sm90::wait_empty(smem_.query_barriers, at_);
    ptx::mbarrier_arrive_expect_tx(full, 2 * QTile::kBytes + kStatisticsBytes);
    sm90::load_slabs(smem_.q[at_.stage], maps.first, full, from);
    sm90::load_slabs(smem_.dout[at_.stage], maps.second, full, from);
  }

  __device__ __forceinline__ void load_keys(const Work& tile) {
    const EntryMaps maps = key_maps(p_, tile);
    const sm90::TileCoords from{tile.n_block * Config::kBlockN, tile.kv_head_idx, maps.batch_idx};
    sm90::wait_empty(smem_.k_barriers, kv_at_);
    ptx::mbarrier_arrive_expect_tx(
        smem_.k_barriers.full[0],
        Config::KVTile::kBytes + static_cast<int>(sizeof(smem_.key_mean)));
    sm90::load_slabs(smem_.k, maps.first, smem_.k_barriers.full[0], from);
    sm90::wait_empty(smem_.v_barriers, kv_at_);
    sm90::load_tile(smem_.v, maps.second, smem_.v_barriers.full[0], from);
    kv_at_.advance();
  }

  __device__ __forceinline__ void load_key_mean(const TileWork& tile) {
    const int64_t head = int64_t{tile.batch_idx} * p_.heads_kv + tile.kv_head_idx;
    ptx::bulk_load(smem_.key_mean, p_.key_mean + head * Config::kHeadDim, sizeof(smem_.key_mean),
                   smem_.k_barriers.full[0]);
  }

  // Of the tile before, where dV leaves through the buffers of dS.
  __device__ __forceinline__ void await_dv_sent(int round) {
    if constexpr (Config::kHasMask && !Config::kHasGradientRoom) {
      if (round > 0) ptx::mbarrier_wait(smem_.mask_barriers[0].dv_sent, (round - 1) & 1);
    }
  }

  __device__ __forceinline__ void load_statistics(const Work& tile, int head_idx, int m_block) {
    const int64_t block = row_block_of(p_, tile, head_idx, m_block);
    auto& full = smem_.query_barriers.full[at_.stage];
    ptx::bulk_load(&smem_.statistics[at_.stage],
                   reinterpret_cast<const RowStatistics<kBlockM>*>(p_.row_statistics) + block,
                   sizeof(smem_.statistics[0]), full);
    ptx::bulk_load(smem_.delta[at_.stage], p_.delta + block * kBlockM, sizeof(smem_.delta[0]),
                   full);
  }

  SharedStorage& smem_;
  const Params& p_;
  sm90::RingPosition<Config::kStages> at_;
  sm90::RingPosition<2> tile_at_;
  sm90::RingPosition<1> kv_at_;
  bool may_read_statistics_ = false;
};

// The key block that adds to the dQ of this block of query rows behind `n_block`.
template <int kBlockM>
__device__ __forceinline__ int next_turn(const KernelParams&, int64_t, int n_block) {
  return n_block + 1;
}
template <int kBlockM>
__device__ __forceinline__ int next_turn(const GeneralKernelParams& p, int64_t row_block,
                                         int n_block) {
  if (p.block_mask.data == nullptr) return n_block + 1;
  const int batch_head = static_cast<int>(row_block / p.num_m_blocks);
  const int m_block = static_cast<int>(row_block % p.num_m_blocks);
  return MaskGrid<kBlockM>(p).next_on(batch_head / p.heads_q, batch_head % p.heads_q, m_block,
                                      n_block + 1);
}

// By one thread: the dQ of one step after another from shared memory to the accumulator, where
// other thread blocks add, too.
template <typename Config>
__device__ __forceinline__ void add_dq(typename Config::SharedStorage& smem,
                                       const typename Config::Params& p) {
  constexpr int kFloats = Config::kBlockM * Config::kHeadDim;
  const bool takes_turns = Config::kIsGeneral ? p.dq_turns != nullptr : Config::kIsDeterministic;
  sm90::RingPosition<1> dq_at;
  sm90::RingPosition<StepWork::kSlots> step_at;
  for (sm90::RingPosition<2> at;; at.advance()) {
    sm90::wait_full(smem.tile_barriers, at);
    const TileWork tile = smem.tile[at.stage];
    if (!tile.is_valid) break;
    ptx::mbarrier_arrive(smem.tile_barriers.empty[at.stage]);
    // `row_block_of()` is asked when the step's dQ is there.
    const auto add = [&](const auto& row_block_of) {
      sm90::wait_full(smem.dq_barriers, dq_at);
      const int64_t block = row_block_of();
      if (takes_turns) {  // key blocks add in order
        while (ptx::load_acquire(p.dq_turns + 2 * block) < tile.n_block) {
        }
        ptx::fence_proxy_async_all();
      }
      if (p.dq_accum != nullptr) {
        ptx::bulk_reduce_add(p.dq_accum + block * kFloats, smem.dq, sizeof(smem.dq));
        ptx::tma_store_commit_group();
        ptx::tma_store_wait_read();
      }
      ptx::mbarrier_arrive(smem.dq_barriers.empty[0]);
      if (takes_turns) {
        const int turns = next_turn<Config::kBlockM>(p, block, tile.n_block) - tile.n_block;
        ptx::bulk_wait();
        ptx::fence_proxy_async_all();
        ptx::add_release(p.dq_turns + 2 * block, turns);
      }
      dq_at.advance();
    };
    if constexpr (Config::kIsGeneral) {
      bool is_last = tile.m_begin == tile.m_end;
      while (!is_last) {
        add([&] {
          const StepWork& step = smem.steps[step_at.stage];
          is_last = (step.flags & StepWork::kIsLast) != 0;
          step_at.advance();
          return step.row_block;
        });
      }
    } else {
      for_each_step(p, tile, [&](int head_idx, int m_block) {
        const int64_t block = row_block(p, tile.batch_idx, head_idx, m_block);
        add([&] { return block; });
      });
    }
    // Consumers have waited for the last tile's dQ once they let go of this one. Only then may
    // there be another phase: of two at once they would miss the first.
    if (tile.m_begin == tile.m_end)
      ptx::mbarrier_wait(smem.tile_barriers.empty[at.stage], at.phase);
    ptx::mbarrier_arrive(smem.dq_sent);
  }
  ptx::bulk_wait();
}

// By one thread: each tile's dV and then its dK, to which its keys' rows belong.
template <typename Config>
__device__ __forceinline__ void send_gradients(typename Config::SharedStorage& smem,
                                               const typename Config::Params& p) {
  sm90::RingPosition<1> gradient_at;
  for (sm90::RingPosition<2> at;; at.advance()) {
    sm90::wait_full(smem.tile_barriers, at);
    const TileWork tile = smem.tile[at.stage];
    if (!tile.is_valid) break;
    ptx::mbarrier_arrive(smem.tile_barriers.empty[at.stage]);
    acquire_gradients(p, tile.batch_idx);
    for (const bool is_dv : {true, false}) {
      sm90::wait_full(smem.gradient_barriers, gradient_at);
      if ((is_dv ? p.dv : p.dk).data != nullptr) {
        const int key0 = tile.n_block * Config::kBlockN;
        const EntryMaps maps = gradient_maps(p, tile);
        for (int part = 0; part < Config::kConsumers; ++part) {
          sm90::store_slabs(is_dv ? smem.dv(part) : smem.dk(part), is_dv ? maps.second : maps.first,
                            {key0 + 64 * part, tile.kv_head_idx, maps.batch_idx});
        }
        ptx::tma_store_commit_group();
        ptx::tma_store_wait_read();
      }
      if constexpr (Config::kHasMask && !Config::kHasGradientRoom) {
        if (is_dv) ptx::mbarrier_arrive(smem.mask_barriers[0].dv_sent);
      }
      ptx::mbarrier_arrive(smem.gradient_barriers.empty[0]);
      gradient_at.advance();
    }
  }
}

}  // namespace flash_ext::v3::backward
