// A consumer warpgroup: 64 query rows, all keys they see, one tile after another.
#pragma once

#include "sm90/copy_tile.cuh"
#include "sm90/warpgroup_gemm.cuh"
#include "v3/forward/consumer_walk.cuh"
#include "v3/forward/output_rows.cuh"
#include "v3/forward/pin_before_wait.cuh"

namespace flash_ext::v3::forward {

template <typename Config>
class Consumer : protected ConsumerWalk<Config> {
 protected:
  using Walk = ConsumerWalk<Config>;
  using typename Walk::Element;
  using typename Walk::Params;
  using typename Walk::QTile;
  using typename Walk::SharedStorage;
  using typename Walk::WarpgroupTile;
  using typename Walk::Work;
  using KVTile = typename Config::KVTile;
  using Softmax = typename Config::Softmax;
  using Walk::await_turn;
  using Walk::k_at_;
  using Walk::kTurnEveryBlock;
  using Walk::lane_idx_;
  using Walk::p_;
  using Walk::pass_turn;
  using Walk::release_k;
  using Walk::release_q;
  using Walk::release_v;
  using Walk::skip_blocks;
  using Walk::skip_blocks_behind;
  using Walk::smem_;
  using Walk::tile_of;
  using Walk::v_at_;
  using Walk::warp_idx_;
  using Walk::warpgroup_idx_;
  static constexpr int kBlockN = Config::kBlockN;
  static constexpr int kTilesN = kBlockN / 8;  // of eight columns
  static constexpr int kEarlyTiles = Config::kEarlySteps > 0 ? 2 * Config::kEarlySteps : kTilesN;

 public:
  __device__ __forceinline__ Consumer(SharedStorage& smem, const Params& params, int warpgroup_idx)
      : Walk(smem, params, warpgroup_idx),
        q_desc_(sm90::Descriptor::k_major(smem.q[0][warpgroup_idx])),
        k_desc_(sm90::Descriptor::k_major(smem.k[0])),
        v_desc_(sm90::Descriptor::mn_major(smem.v[0])),
        alibi_(smem),
        dropout_(params),
        attn_mask_(smem, params) {}

  __device__ __forceinline__ void run() {
    if (warpgroup_idx_ == Config::kConsumers - 1) pass_turn();  // warpgroup 0 begins
    Work work;
    // As `while (begin_tile(work))` ptxas no longer sees that positions in the rings are the same
    // for a whole warp, and the main loop grows by 60 to 100 instructions.
    for (bool is_valid = begin_tile(work); is_valid; is_valid = begin_tile(work)) {
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
  // The next tile; false if there is none.
  __device__ __forceinline__ bool begin_tile(Work& work) {
    if (!Walk::await_tile(work)) return false;
    const WarpgroupTile& tile = tile_of(work);
    alibi_.begin_tile(tile, warp_idx_, lane_idx_);
    dropout_.begin_tile(tile, warp_idx_, lane_idx_);
    if (work.begin < work.end) attn_mask_.begin_tile(tile, work.end - 1);
    return true;
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
    const bool is_edge = Config::kIsGeneral || work.end > work.full_end;
    finish_scores(acc_s, work, work.end - 1, is_edge);
    update_max(acc_s, kMaxLagLog2);
    softmax_.template weights<0, kKeys / 8>(acc_s, exponent());
    dropout_.drop(acc_s, work.end - 1);
    sm90::pack_operand<Element>(frag_p_, acc_s);
  }

  __device__ __forceinline__ void other_blocks(Work& work) {
    int n_block = work.end - 2;
    if constexpr (Config::kIsGeneral) {
      const bool may_try =
          Config::kTriesWeights && (!Config::kCapsInExponents || p_.softcap.is_for_exponents);
      const int tried_begin = max(work.full_begin, work.begin);
      const int tried_end = may_try ? work.full_end : work.begin;
#pragma unroll 1
      while (n_block >= work.begin) {
        if (n_block >= tried_end || n_block < tried_begin) {
          next_block<true>(work, n_block--);
        } else {
          // A loop of its own: one for all blocks, with its branches, takes 1.03 times as long at
          // d=128.
#pragma unroll 1
          do next_block<false>(work, n_block--);
          while (n_block >= tried_begin);
        }
      }
    } else {
#pragma unroll 1
      for (; n_block >= work.full_end; --n_block) next_block<true>(work, n_block);
#pragma unroll 1
      for (; n_block >= work.begin; --n_block) next_block<false>(work, n_block);
    }
  }

  // While the tensor cores add the previous block's P V to O, its softmax turns this block's S into
  // weights. kIsEdge: the mask may hide some of the block.
  template <bool kIsEdge>
  __device__ __forceinline__ void next_block(Work& work, int n_block) {
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
    if constexpr (Config::kTriesWeights && !kIsEdge) {
      if (!Config::kCapsInExponents) finish_scores(acc_s, work, n_block, /*is_edge=*/false);
      weigh(acc_s);
    } else {
      finish_scores(acc_s, work, n_block, kIsEdge);
      update_max(acc_s, kMaxLagLog2);
      softmax_.template weights<0, kEarlyTiles>(acc_s, exponent());
      if (kEarlyTiles < kTilesN) {
        pin_before_wait(softmax_.row_sum[0] + softmax_.row_sum[1], &smem_.never_written);
      }
      ptx::wgmma_wait_group<0>();
      release_v();
      softmax_.template weights<kEarlyTiles, kTilesN>(acc_s, exponent());
      dropout_.drop(acc_s, n_block);
      sm90::pack_operand<Element>(frag_p_, acc_s);
      softmax_.rescale_accumulator(acc_o_);
    }
  }

  // Scores of which nothing is hidden to P, with the wait for O somewhere in it.
  __device__ __forceinline__ void weigh(float (&acc_s)[kTilesN][4]) {
    const bool tries = !Config::kCountsTrials || (softmax_.is_settled && softmax_.trials > 0);
    if (tries) {
      if (try_weights(acc_s)) return;
      if (Config::kCountsTrials) --softmax_.trials;
    } else {
      ptx::wgmma_wait_group<0>();
      release_v();
    }
    if constexpr (Config::kCapsInExponents) cap_scores(acc_s, p_.softcap);
    // Behind weights that do not stand it follows any growth: the next ones are to.
    update_max(acc_s, tries ? 0.f : kMaxLagLog2);
    if (!tries && !softmax_.rescales) softmax_.trials = 1;
    softmax_.template weights<0, kTilesN>(acc_s, exponent());
    sm90::pack_operand<Element>(frag_p_, acc_s);
    softmax_.rescale_accumulator(acc_o_);
  }

  template <int kN>
  __device__ __forceinline__ void update_max(float (&acc_s)[kN][4], float max_lag_log2) {
    softmax_.update_max(acc_s, p_.scale.log2, dropout_.factor_log2(), max_lag_log2);
    if constexpr (Config::kCapsInExponents) softmax_.limit_weights(p_.softcap);
  }

  // The same by the row maximum so far; false if the scores are to be taken again.
  __device__ __forceinline__ bool try_weights(const float (&acc_s)[kTilesN][4]) {
    const auto exponent = [this] {
      if constexpr (Config::kCapsInExponents) {
        return CappedExponent(p_.softcap, softmax_);
      } else {
        return this->exponent();
      }
    }();
    constexpr int kEarly = 2 * Config::kEarlySteps;
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    float early[kEarly > 0 ? kEarly : 1][4];
#pragma unroll
    for (int n = 0; n < kEarly; ++n) softmax_.try_weights(early[n], acc_s[n], sum, exponent);
    if (kEarly > 0) {
      // Not the sum alone, which ptxas knows to be positive.
      pin_before_wait(softmax_.row_sum[0] + sum[0] + sum[1] + sum[2] + sum[3],
                      &smem_.never_written);
    }
    ptx::wgmma_wait_group<0>();
    release_v();
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      float late[4];
      if (n >= kEarly) softmax_.try_weights(late, acc_s[n], sum, exponent);
      const float (&weight)[4] = n < kEarly ? early[n < kEarly ? n : 0] : late;
      frag_p_[n / 2][n % 2 * 2] = pack<Element>(weight[0], weight[1]);
      frag_p_[n / 2][n % 2 * 2 + 1] = pack<Element>(weight[2], weight[3]);
    }
    // Added in accept(), ptxas would put all exp2 before the wait and all packing behind it.
    const float sums[2] = {sum[0] + sum[1], sum[2] + sum[3]};
    return softmax_.accept(sums, exponent);
  }

  __device__ __forceinline__ auto exponent() const { return softmax_.exponent(p_.scale.log2); }

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
    if constexpr (Config::kTensorAlibi) alibi_.begin_block(n_block);
  }

  template <int kN>
  __device__ __forceinline__ void issue_scores(float (&acc_s)[kN][4], const Work& work) {
    sm90::gemm_abt<QTile, KVTile, 8 * kN>(acc_s,
                                          q_desc_.tile<QTile>(work.q_stage * Config::kConsumers),
                                          k_desc_.tile<KVTile>(k_at_.stage),
                                          /*accumulates=*/Config::AttnMask::kIsUnderScores);
  }
  __device__ __forceinline__ void issue_product(Work& work) {
    sm90::gemm_ab<KVTile>(acc_o_, frag_p_, v_desc_.tile<KVTile>(v_at_.stage), work.accumulates);
    work.accumulates = true;
  }

  // What follows on Q K^T before the softmax. `is_edge`: whether the mask may hide any of the
  // block.
  template <int kN>
  __device__ __forceinline__ void finish_scores(float (&acc_s)[kN][4], const Work& work,
                                                int n_block, bool is_edge, int first_key = 0) {
    if constexpr (Config::kIsGeneral) {
      if (Config::kMayCap && p_.softcap.is_on) cap_scores(acc_s, p_.softcap);
      attn_mask_.apply(acc_s, tile_of(work), n_block > work.begin, n_block - 1);
      add_alibi(acc_s, work, n_block, first_key);
      if (is_edge) hide_keys(acc_s, work, n_block, first_key);
    } else if (is_edge) {
      mask_scores(acc_s, p_.mask, first_row(work), first_col(n_block, first_key));
    }
  }

  template <int kN>
  __device__ __forceinline__ void add_alibi(float (&acc_s)[kN][4], const Work& work, int n_block,
                                            int first_key) {
    if constexpr (Config::kTensorAlibi) {
      alibi_.finish(acc_s, softmax_.excess, n_block, lane_idx_);
    } else if (Config::kMayHaveAlibi && p_.alibi_slopes.data != nullptr) {
      const int distance = first_row(work) + tile_of(work).diagonal - first_col(n_block, first_key);
      add_distances(acc_s, tile_of(work).slope, distance);
    }
  }

  template <int kN>
  __device__ __forceinline__ void hide_keys(float (&acc_s)[kN][4], const Work& work, int n_block,
                                            int first_key) const {
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

  const sm90::Descriptor q_desc_, k_desc_, v_desc_;
  Softmax softmax_;
  typename Config::Alibi alibi_;
  typename Config::Dropout dropout_;
  typename Config::AttnMask attn_mask_;
  float acc_o_[Config::kHeadDim / 8][4];
  uint32_t frag_p_[kBlockN / 16][4];
};

}  // namespace flash_ext::v3::forward
