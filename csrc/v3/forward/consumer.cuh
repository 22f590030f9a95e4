// A consumer warpgroup: 64 query rows, all keys they see, one tile after another.
#pragma once

#include "ptx/warpgroup.cuh"
#include "sm90/copy_tile.cuh"
#include "sm90/warpgroup_gemm.cuh"
#include "v3/forward/config.cuh"
#include "v3/forward/output_rows.cuh"
#include "v3/forward/pin_before_wait.cuh"

namespace flash_ext::v3::forward {

template <typename Config>
class Consumer {
 protected:
  using Element = typename Config::Element;
  using QTile = typename Config::QTile;
  using KVTile = typename Config::KVTile;
  using SharedStorage = typename Config::SharedStorage;
  using Params = typename Config::Params;
  using WarpgroupTile = typename Config::WarpgroupTile;
  using Softmax = typename Config::Softmax;
  static constexpr int kBlockN = Config::kBlockN;
  static constexpr int kTilesN = kBlockN / 8;  // of eight columns
  static constexpr bool kTurnEveryBlock = Config::kTurns == Turns::kEveryBlock;
  static constexpr int kEarlyTiles = Config::kEarlySteps > 0 ? 2 * Config::kEarlySteps : kTilesN;

 public:
  __device__ __forceinline__ Consumer(SharedStorage& smem, const Params& params, int warpgroup_idx)
      : smem_(smem),
        p_(params),
        warpgroup_idx_(warpgroup_idx),
        warp_idx_(threadIdx.x / 32 % 4),
        lane_idx_(threadIdx.x % 32),
        q_desc_(sm90::Descriptor::k_major(smem.q[0][warpgroup_idx])),
        k_desc_(sm90::Descriptor::k_major(smem.k[0])),
        v_desc_(sm90::Descriptor::mn_major(smem.v[0])),
        alibi_(smem),
        dropout_(params),
        attn_mask_(smem, params) {}

  __device__ __forceinline__ void run() {
    if (warpgroup_idx_ == Config::kConsumers - 1) pass_turn();  // warpgroup 0 begins
    Work work;
    // As `while (await_tile(work))` ptxas no longer sees that positions in the rings are the same
    // for a whole warp, and the main loop grows by 60 to 100 instructions.
    for (bool is_valid = await_tile(work); is_valid; is_valid = await_tile(work)) {
      if (work.begin == work.end) {
        pass_over(work);
      } else {
        first_block(work);
        other_blocks(work);
        end_tile(work);
      }
    }
  }

 protected:
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
    alibi_.begin_tile(tile, lane_idx_);
    dropout_.begin_tile(tile, warp_idx_, lane_idx_);
    if (work.begin < work.end) attn_mask_.begin_tile(tile, work.end - 1);
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

  // A tile of which this warpgroup has nothing to compute.
  __device__ __forceinline__ void pass_over(const Work& work) {
    if (!kTurnEveryBlock) {  // first: the next in turn holds on to a block that is skipped here
      await_turn();
      pass_turn();
    }
    skip_blocks(work);
    if (Config::kSplitsKeys) output().note_empty_share(tile_of(work));
    release_q(work);
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

  // Nothing overlaps with it: what need not be computed is time saved.
  __device__ __forceinline__ void first_block(const Work& work) {
    skip_blocks(work);
    softmax_ = Softmax();
    if constexpr (Config::kHalvesFirst) {
      if (work.is_half) return first_scores<kBlockN / 2>(work);
    }
    first_scores<kBlockN>(work);
  }

  template <int kKeys>
  __device__ __forceinline__ void first_scores(const Work& work) {
    float acc_s[kKeys / 8][4];
    begin_scores(acc_s, work, work.end - 1);
    sm90::wait_full(smem_.k_barriers, k_at_);
    if (!kTurnEveryBlock) await_turn();
    ptx::wgmma_fence();
    issue_scores(acc_s, work);
    alibi_.issue(acc_s);
    attn_mask_.fetch_behind(tile_of(work), work.end - 1 > work.begin, work.end - 2);
    ptx::wgmma_wait_group<0>();
    if (!kTurnEveryBlock) pass_turn();
    release_k();
    update_max(acc_s, work, work.end - 1, /*is_edge=*/work.end > work.full_end);
    softmax_.template weights<0, kKeys / 8>(acc_s, p_.scale.log2);
    dropout_.drop(acc_s, work.end - 1);
    sm90::pack_operand<Element>(frag_p_, acc_s);
  }

  __device__ __forceinline__ void other_blocks(Work& work) {
    int n_block = work.end - 2;
    if constexpr (!Config::kIsGeneral) {
#pragma unroll 1
      for (; n_block >= work.full_end; --n_block) next_block(work, n_block, /*is_edge=*/true);
    }
#pragma unroll 1
    for (; n_block >= work.begin; --n_block) next_block(work, n_block, /*is_edge=*/false);
  }

  // While the tensor cores add the previous block's P V to O, its softmax turns this block's S into
  // weights.
  __device__ __forceinline__ void next_block(Work& work, int n_block, bool is_edge) {
    float acc_s[kTilesN][4];
    begin_scores(acc_s, work, n_block);
    sm90::wait_full(smem_.k_barriers, k_at_);
    if (kTurnEveryBlock) await_turn();
    ptx::wgmma_fence();
    issue_scores(acc_s, work);
    alibi_.issue(acc_s);
    sm90::wait_full(smem_.v_barriers, v_at_);
    ptx::wgmma_fence();
    issue_product(work);
    if (kTurnEveryBlock) pass_turn();
    attn_mask_.fetch_behind(tile_of(work), n_block > work.begin, n_block - 1);
    ptx::wgmma_wait_group<1>();
    release_k();
    update_max(acc_s, work, n_block, is_edge);
    softmax_.template weights<0, kEarlyTiles>(acc_s, p_.scale.log2);
    if (kEarlyTiles < kTilesN) {
      pin_before_wait(softmax_.row_sum[0] + softmax_.row_sum[1], &smem_.never_written);
    }
    ptx::wgmma_wait_group<0>();
    release_v();
    softmax_.template weights<kEarlyTiles, kTilesN>(acc_s, p_.scale.log2);
    dropout_.drop(acc_s, n_block);
    sm90::pack_operand<Element>(frag_p_, acc_s);
    softmax_.rescale_accumulator(acc_o_);
  }

  // The last P V, and O / l.
  __device__ __forceinline__ void end_tile(Work& work) {
    const WarpgroupTile tile = tile_of(work);
    if (!Config::kStagesOutput) release_q(work);  // the next one arrives while this tile ends
    sm90::wait_full(smem_.v_barriers, v_at_);
    ptx::wgmma_fence();
    issue_product(work);
    float inverse_sums[2];
    output().finish(inverse_sums, tile, softmax_, dropout_);  // meanwhile
    ptx::wgmma_wait_group<0>();
    release_v();
    if constexpr (Config::kSplitsKeys) {
      output().store_share(tile, acc_o_, inverse_sums);
    } else if constexpr (Config::kStagesOutput) {
      stage_rows(work, inverse_sums);
      release_q(work);
      if constexpr (Config::kIsGeneral) skip_blocks_behind(tile.skipped_behind);
    } else {
      output().store(tile, acc_o_, inverse_sums);
    }
  }

  // What can be done before K is there and it is this warpgroup's turn.
  template <int kN>
  __device__ __forceinline__ void begin_scores(float (&acc_s)[kN][4], const Work& work,
                                               int n_block) {
    attn_mask_.begin_scores(acc_s);
    if constexpr (Config::kTensorAlibi) alibi_.begin_block(warp_distance(work, n_block), warp_idx_);
  }

  template <int kN>
  __device__ __forceinline__ void issue_scores(float (&acc_s)[kN][4], const Work& work) {
    sm90::gemm_abt<QTile, KVTile, 8 * kN>(acc_s,
                                          q_desc_.tile<QTile>(work.q_stage * Config::kConsumers),
                                          k_desc_.tile<KVTile>(k_at_.stage),
                                          /*accumulates=*/Config::AttnMask::kIsUnderScores);
  }
  // Of the warp's first row to the block's first key.
  __device__ __forceinline__ int warp_distance(const Work& work, int n_block) const {
    const WarpgroupTile& tile = tile_of(work);
    return tile.row0 + 16 * warp_idx_ + tile.diagonal - n_block * kBlockN;
  }
  __device__ __forceinline__ void issue_product(Work& work) {
    sm90::gemm_ab<KVTile>(acc_o_, frag_p_, v_desc_.tile<KVTile>(v_at_.stage), work.accumulates);
    work.accumulates = true;
  }

  // All that happens to the scores of a block until they may become weights. `is_edge`: whether the
  // mask hides any of the block; general calls find out themselves.
  template <int kN>
  __device__ __forceinline__ void update_max(float (&acc_s)[kN][4], const Work& work, int n_block,
                                             bool is_edge) {
    if constexpr (Config::kCapsInExponents) {
      softmax_.update_capped_max(
          acc_s, p_.softcap, [&] { add_alibi(acc_s, work, n_block); },
          n_block >= work.full_end || n_block < work.full_begin,
          [&] { hide_keys(acc_s, work, n_block); });
    } else {
      finish_scores(acc_s, work, n_block, is_edge);
      softmax_.update_max(acc_s, p_.scale.log2, dropout_.factor_log2());
    }
  }

  // What follows on Q K^T before the softmax.
  template <int kN>
  __device__ __forceinline__ void finish_scores(float (&acc_s)[kN][4], const Work& work,
                                                int n_block, bool is_edge, int first_key = 0) {
    if constexpr (Config::kIsGeneral) {
      if (Config::kMayCap && p_.softcap.is_on) cap_scores(acc_s, p_.softcap);
      attn_mask_.apply(acc_s, tile_of(work), n_block > work.begin, n_block - 1);
      add_alibi(acc_s, work, n_block, first_key);
      hide_keys(acc_s, work, n_block, first_key);
    } else if (is_edge) {
      mask_scores(acc_s, p_.mask, first_row(work), first_col(n_block, first_key));
    }
  }

  template <int kN>
  __device__ __forceinline__ void add_alibi(float (&acc_s)[kN][4], const Work& work, int n_block,
                                            int first_key = 0) {
    if constexpr (Config::kTensorAlibi) {
      alibi_.finish(acc_s, softmax_.excess, warp_distance(work, n_block), lane_idx_);
    } else if (Config::kMayHaveAlibi && p_.alibi_slopes.data != nullptr) {
      const int distance = first_row(work) + tile_of(work).diagonal - first_col(n_block, first_key);
      add_distances(acc_s, tile_of(work).slope, distance);
    }
  }

  template <int kN>
  __device__ __forceinline__ void hide_keys(float (&acc_s)[kN][4], const Work& work, int n_block,
                                            int first_key = 0) const {
    const int col0 = first_col(n_block, first_key);
    if (n_block >= work.full_end) {
      hide_keys_behind(acc_s, band_of(work), first_row(work), col0);
    }
    if (n_block < work.full_begin) {
      hide_keys_before(acc_s, band_of(work), first_row(work), col0);
    }
  }

  // Of this thread.
  __device__ __forceinline__ int first_row(const Work& work) const {
    return tile_of(work).row0 + 16 * warp_idx_ + lane_idx_ / 4;
  }
  __device__ __forceinline__ int first_col(int n_block, int first_key) const {
    return n_block * kBlockN + first_key + lane_idx_ % 4 * 2;
  }

  // As key_begin() and key_end() need it.
  __device__ __forceinline__ BandMask band_of(const Work& work) const {
    BandMask band = p_.band;
    band.seqlen_k = tile_of(work).seqlen_k;
    band.diagonal = tile_of(work).diagonal;
    return band;
  }

  __device__ __forceinline__ OutputRows<Config> output() const {
    return {p_, warp_idx_, lane_idx_};
  }

  // To this warp's own rows of Q, which nobody reads any more. The producer sends them.
  __device__ __forceinline__ void stage_rows(const Work& work, const float (&inverse_sums)[2]) {
    sm90::store_accumulator(smem_.q[work.q_stage][warpgroup_idx_], acc_o_, inverse_sums,
                            16 * warp_idx_, lane_idx_);
    ptx::fence_proxy_async();
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
  const sm90::Descriptor q_desc_, k_desc_, v_desc_;
  sm90::RingPosition<Config::kQBuffers> q_at_;
  sm90::RingPosition<Config::kKStages> k_at_;
  sm90::RingPosition<Config::kVStages> v_at_;

  Softmax softmax_;
  typename Config::Alibi alibi_;
  typename Config::Dropout dropout_;
  typename Config::AttnMask attn_mask_;
  float acc_o_[Config::kHeadDim / 8][4];
  uint32_t frag_p_[kBlockN / 16][4];
};

}  // namespace flash_ext::v3::forward
