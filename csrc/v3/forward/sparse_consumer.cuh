// A consumer warpgroup under a block_mask: it follows the producer's notes through the blocks of a
// tile and passes over those that other warpgroups see and it does not.
#pragma once

#include "v3/forward/consumer.cuh"
#include "v3/forward/sparse_producer.cuh"

namespace flash_ext::v3::forward {

template <typename Config>
class SparseConsumer : public Consumer<Config> {
  using Base = Consumer<Config>;
  using Element = typename Config::Element;
  using typename Base::KVTile;
  using typename Base::QTile;
  using HalfTile = sm90::SmemTile<Element, Config::kBlockN / 2, Config::kHeadDim>;
  using Base::acc_o_;
  using Base::frag_p_;
  using Base::k_at_;
  using Base::kBlockN;
  using Base::kEarlyTiles;
  using Base::kTilesN;
  using Base::kTurnEveryBlock;
  using Base::p_;
  using Base::smem_;
  using Base::softmax_;
  using Base::v_at_;
  using typename Base::Softmax;
  using typename Base::Work;

 public:
  using Base::Base;

  __device__ __forceinline__ void run() {
    if (this->warpgroup_idx_ == Config::kConsumers - 1) this->pass_turn();  // warpgroup 0 begins
    Work work;
    for (bool is_valid = this->begin_tile(work); is_valid; is_valid = this->begin_tile(work)) {
      softmax_ = Softmax();
      has_product_ = false;
      walk(work);
      if (work.begin == work.end) {  // rows before the first
        this->release_q(work);
      } else {
        end_tile(work);
      }
    }
  }

 private:
  __device__ __forceinline__ void walk(Work& work) {
    bool is_first = true;
    int note;
    do {
      sm90::wait_full(smem_.k_barriers, k_at_);
      note = ptx::warp_uniform(smem_.k_notes.of[k_at_.stage]);
      const int n_block = note >> kBlockShift;
      const int seen = note >> 2 * this->warpgroup_idx_ & 3;
      // Before anything is let go of that others skip before theirs.
      const bool takes_turn = kTurnEveryBlock || is_first;
      if (takes_turn) this->await_turn();
      if (seen == 3 && has_product_) {
        block<true>(work, n_block, takes_turn);
      } else if (seen == 3) {
        block<false>(work, n_block, takes_turn);
      } else if (seen != 0) {
        half_block(work, n_block, seen >> 1, takes_turn);
      } else {
        if (takes_turn) this->pass_turn();
        skip_block(work);
      }
      is_first = false;
    } while ((note & kLastBlock) == 0);
  }

  // As in calls without a mask: beside the softmax of this block the tensor cores compute the P V
  // of the last one that this warpgroup saw, if its P V is still to come.
  template <bool kHasProduct>
  __device__ __forceinline__ void block(Work& work, int n_block, bool takes_turn) {
    float acc_s[kTilesN][4];
    ptx::wgmma_fence();
    this->issue_scores(acc_s, work);
    if (kHasProduct) {
      sm90::wait_full(smem_.v_barriers, product_at_);
      ptx::wgmma_fence();
      issue_product(work);
    }
    if (takes_turn && kTurnEveryBlock) this->pass_turn();
    ptx::wgmma_wait_group<kHasProduct ? 1 : 0>();
    if (takes_turn && !kTurnEveryBlock) this->pass_turn();
    this->release_k();
    this->finish_scores(acc_s, work, n_block, /*is_edge=*/true);
    softmax_.update_max(acc_s, p_.scale.log2, 0.f, kMaxLagLog2);
    softmax_.template weights<0, kEarlyTiles>(acc_s, this->exponent());
    if (kHasProduct) {
      if (kEarlyTiles < kTilesN) {
        pin_before_wait(softmax_.row_sum[0] + softmax_.row_sum[1], &smem_.never_written);
      }
      ptx::wgmma_wait_group<0>();
      release_product();
    }
    softmax_.template weights<kEarlyTiles, kTilesN>(acc_s, this->exponent());
    sm90::pack_operand<Element>(frag_p_, acc_s);
    if (kHasProduct || work.accumulates) softmax_.rescale_accumulator(acc_o_);
    product_at_ = v_at_;
    v_at_.advance();
    has_product_ = true;
  }

  // One of two blocks of 64 keys. Its own P V follows at once.
  __device__ __forceinline__ void half_block(Work& work, int n_block, int half, bool takes_turn) {
    float acc_s[kTilesN / 2][4];
    const int first_key = half * (kBlockN / 2);
    if (has_product_) finish_product(work);
    ptx::wgmma_fence();
    sm90::gemm_abt<QTile, KVTile, kBlockN / 2>(
        acc_s, this->q_desc_.template tile<QTile>(work.q_stage * Config::kConsumers),
        this->k_desc_.template tile<KVTile>(k_at_.stage).from_row(first_key));
    ptx::wgmma_wait_group<0>();
    if (takes_turn) this->pass_turn();
    this->release_k();
    this->finish_scores(acc_s, work, n_block, /*is_edge=*/true, first_key);
    softmax_.update_max(acc_s, p_.scale.log2, 0.f, kMaxLagLog2);
    softmax_.template weights<0, kTilesN / 2>(acc_s, this->exponent());
    uint32_t frag[kBlockN / 32][4];
    sm90::pack_operand<Element>(frag, acc_s);
    if (work.accumulates) softmax_.rescale_accumulator(acc_o_);
    sm90::wait_full(smem_.v_barriers, v_at_);
    ptx::wgmma_fence();
    sm90::gemm_ab<HalfTile>(acc_o_, frag,
                            this->v_desc_.template tile<KVTile>(v_at_.stage).from_row(first_key),
                            work.accumulates);
    work.accumulates = true;
    ptx::wgmma_wait_group<0>();
    this->release_v();
  }

  // V of a block that is skipped is let go of before that of the P V to come, as long as the
  // producer can fill the buffers in between.
  __device__ __forceinline__ void skip_block(Work& work) {
    this->release_k();
    if (has_product_ && v_at_.stage == product_at_.stage) finish_product(work);
    sm90::wait_full(smem_.v_barriers, v_at_);
    this->release_v();
  }

  // The last P V, and O / l.
  __device__ __forceinline__ void end_tile(Work& work) {
    const auto tile = this->tile_of(work);
    float inverse_sums[2];
    if (has_product_) {
      sm90::wait_full(smem_.v_barriers, product_at_);
      ptx::wgmma_fence();
      issue_product(work);
      this->output().finish(inverse_sums, tile, this->softmax_, this->dropout_);  // meanwhile
      ptx::wgmma_wait_group<0>();
      release_product();
    } else {
      if (!work.accumulates) clear_output();  // these rows see nothing
      this->output().finish(inverse_sums, tile, this->softmax_, this->dropout_);
    }
    this->stage_rows(work, inverse_sums);
    this->release_q(work);
  }

  __device__ __forceinline__ void clear_output() {
#pragma unroll
    for (int n = 0; n < Config::kHeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc_o_[n][i] = 0.f;
    }
  }

  __device__ __forceinline__ void issue_product(Work& work) {
    sm90::gemm_ab<KVTile>(acc_o_, frag_p_, this->v_desc_.template tile<KVTile>(product_at_.stage),
                          work.accumulates);
    work.accumulates = true;
  }
  __device__ __forceinline__ void finish_product(Work& work) {
    sm90::wait_full(smem_.v_barriers, product_at_);
    ptx::wgmma_fence();
    issue_product(work);
    ptx::wgmma_wait_group<0>();
    release_product();
  }
  __device__ __forceinline__ void release_product() {
    if (this->lane_idx_ == 0) ptx::mbarrier_arrive(smem_.v_barriers.empty[product_at_.stage]);
    has_product_ = false;
  }

  // Of the block whose weights are in frag_p_ and whose P V is still to come.
  bool has_product_;
  sm90::RingPosition<Config::kVStages> product_at_;
};

}  // namespace flash_ext::v3::forward
