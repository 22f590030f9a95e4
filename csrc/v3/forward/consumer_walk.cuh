// A consumer warpgroup's way through tiles and the rings of Q, K and V, and whose turn it is.
#pragma once

#include "ptx/warpgroup.cuh"
#include "v3/forward/config.cuh"

namespace flash_ext::v3::forward {

template <typename Config>
class ConsumerWalk {
 protected:
  using Element = typename Config::Element;
  using QTile = typename Config::QTile;
  using SharedStorage = typename Config::SharedStorage;
  using Params = typename Config::Params;
  using WarpgroupTile = typename Config::WarpgroupTile;
  static constexpr bool kTurnEveryBlock = Config::kTurns == Turns::kEveryBlock;

  __device__ __forceinline__ ConsumerWalk(SharedStorage& smem, const Params& params,
                                          int warpgroup_idx)
      : smem_(smem),
        p_(params),
        warpgroup_idx_(warpgroup_idx),
        warp_idx_(threadIdx.x / 32 % 4),
        lane_idx_(threadIdx.x % 32) {}

  // What is held in registers of a tile; the rest stays in shared memory until its Q is released.
  struct Work {
    int q_stage;
    int begin, end, full_end;
    int full_begin;  // in general calls alone
    bool is_half;
    bool accumulates;  // O of this tile exists
  };
  __device__ __forceinline__ const WarpgroupTile& tile_of(const Work& work) const {
    return smem_.tile[work.q_stage][warpgroup_idx_];
  }

  // The next tile; false if there is none.
  __device__ __forceinline__ bool await_tile(Work& work) {
    sm90::wait_full(smem_.q_barriers[warpgroup_idx_], q_at_);
    work.q_stage = q_at_.stage;
    q_at_.advance();
    const WarpgroupTile& tile = tile_of(work);
    if (!ptx::warp_uniform(tile.is_valid)) return false;
    work.begin = Config::kSplitsKeys || Config::kIsGeneral ? ptx::warp_uniform(tile.begin) : 0;
    work.end = ptx::warp_uniform(tile.end);
    work.full_end = ptx::warp_uniform(tile.full_end);
    work.is_half = Config::kHalvesFirst && ptx::warp_uniform(tile.is_half);
    work.accumulates = false;
    if constexpr (Config::kIsGeneral) work.full_begin = ptx::warp_uniform(tile.full_begin);
    if constexpr (Config::AttnMask::kIsUnderScores) {
      if (p_.attn_mask.q_factor != 1.f) adapt_q(work);
    } else {
      if (p_.scale.negate) adapt_q(work);
    }
    return true;
  }

  // A negative scale changes the sign of Q, once a tile, and the kernel goes on with |scale|. Where
  // scores are accumulated on a mask, Q takes a part of the scale, see ScaleParts.
  __device__ __forceinline__ void adapt_q(const Work& work) {
    using Pair = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;
    char* const q = smem_.q[work.q_stage][warpgroup_idx_].data;
#pragma unroll 4
    for (int i = threadIdx.x % 128; i < QTile::kBytes / 4; i += 128) {
      if constexpr (Config::AttnMask::kIsUnderScores) {
        const Element factor = from_float<Element>(p_.attn_mask.q_factor);
        Pair& pair = reinterpret_cast<Pair*>(q)[i];
        pair = __hmul2(pair, Pair(factor, factor));
      } else {
        reinterpret_cast<uint32_t*>(q)[i] ^= 0x80008000u;
      }
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1 + Config::kConsumers + warpgroup_idx_, 128);
  }

  // The blocks that other warpgroups of the tile see and this one does not.
  __device__ __forceinline__ void skip_blocks(const Work& work) {
#pragma unroll 1
    for (int n_block = work.end + ptx::warp_uniform(tile_of(work).skipped) - 1; n_block >= work.end;
         --n_block) {
      if (kTurnEveryBlock && n_block > work.begin) {
        await_turn();
        pass_turn();
      }
      skip_block();
    }
  }

  // The same of those behind its own, where a window ends.
  __device__ __forceinline__ void skip_blocks_behind(int count) {
#pragma unroll 1
    for (; count > 0; --count) {
      if (kTurnEveryBlock) {
        await_turn();
        pass_turn();
      }
      skip_block();
    }
  }

  __device__ __forceinline__ void skip_block() {
    sm90::wait_full(smem_.k_barriers, k_at_);
    release_k();
    sm90::wait_full(smem_.v_barriers, v_at_);
    release_v();
  }

  // The producer may fill the Q buffer again, after sending off the O that was staged in it.
  __device__ __forceinline__ void release_q(const Work& work) {
    __syncwarp();
    if (lane_idx_ == 0) {
      ptx::mbarrier_arrive(smem_.q_barriers[warpgroup_idx_].empty[work.q_stage]);
    }
  }

  // Every warp lets go for itself: one that has not yet seen a buffer full must not find it filled
  // twice, which looks like never.
  __device__ __forceinline__ void release_k() {
    if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.k_barriers.empty[k_at_.stage]);
    k_at_.advance();
  }
  __device__ __forceinline__ void release_v() {
    if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.v_barriers.empty[v_at_.stage]);
    v_at_.advance();
  }

  // The warpgroups take turns in issuing products, so that one's softmax falls on another's: each
  // as many in a tile, also at blocks that it skips.
  __device__ __forceinline__ void await_turn() { ptx::named_barrier_sync(1 + warpgroup_idx_, 256); }
  __device__ __forceinline__ void pass_turn() {
    ptx::named_barrier_arrive(1 + (warpgroup_idx_ + 1) % Config::kConsumers, 256);
  }

  SharedStorage& smem_;
  const Params& p_;
  const int warpgroup_idx_;
  const int warp_idx_;
  const int lane_idx_;
  sm90::RingPosition<Config::kQBuffers> q_at_;
  sm90::RingPosition<Config::kKStages> k_at_;
  sm90::RingPosition<Config::kVStages> v_at_;
};

}  // namespace flash_ext::v3::forward
