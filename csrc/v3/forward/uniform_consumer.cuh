// A consumer warpgroup under a block_mask whose blocks are no smaller than a tile: all warpgroups
// see the same blocks, and compute those that the producer announces, one after another.
#pragma once

#include "v3/forward/consumer.cuh"
#include "v3/forward/sparse_producer.cuh"

namespace flash_ext::v3::forward {

template <typename Config>
class UniformConsumer : public Consumer<Config> {
  using Base = Consumer<Config>;
  using Element = typename Config::Element;
  using Base::acc_o_;
  using Base::frag_p_;
  using Base::k_at_;
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
      int note = await_note();
      edge_block<true>(work, note);
      // They come from the last to the first: behind one before full_end there are no more edges.
#pragma unroll 1
      while ((note & kLastBlock) == 0 && (note >> kBlockShift) > work.full_end) {
        note = await_note();
        edge_block<false>(work, note);
      }
#pragma unroll 1
      while ((note & kLastBlock) == 0) note = next_block(work);
      this->end_tile(work);
    }
  }

 private:
  // Of the block in the next K buffer.
  __device__ __forceinline__ int await_note() const {
    sm90::wait_full(smem_.k_barriers, k_at_);
    return note();
  }
  __device__ __forceinline__ int note() const {
    return ptx::warp_uniform(smem_.k_notes.of[k_at_.stage]);
  }

  // S, and beside it the P V of the block before unless there is none.
  template <bool kIsFirst>
  __device__ __forceinline__ void issue(float (&acc_s)[kTilesN][4], Work& work) {
    sm90::wait_full(smem_.k_barriers, k_at_);
    if (kTurnEveryBlock || kIsFirst) this->await_turn();
    ptx::wgmma_fence();
    this->issue_scores(acc_s, work);
    if (!kIsFirst) {
      sm90::wait_full(smem_.v_barriers, v_at_);
      ptx::wgmma_fence();
      this->issue_product(work);
    }
    if (kTurnEveryBlock) this->pass_turn();
  }

  // One that the sequence's end or a causal mask may hide some of, with its maximum first.
  template <bool kIsFirst>
  __device__ __forceinline__ void edge_block(Work& work, int note) {
    float acc_s[kTilesN][4];
    issue<kIsFirst>(acc_s, work);
    ptx::wgmma_wait_group<kIsFirst ? 0 : 1>();
    if (kIsFirst && !kTurnEveryBlock) this->pass_turn();
    this->release_k();
    this->finish_scores(acc_s, work, note >> kBlockShift, /*is_edge=*/true);
    if (!kIsFirst) {
      ptx::wgmma_wait_group<0>();
      this->release_v();
    }
    softmax_.update_max(acc_s, p_.scale.log2, 0.f, kMaxLagLog2);
    softmax_.template weights<0, kTilesN>(acc_s, this->exponent());
    sm90::pack_operand<Element>(frag_p_, acc_s);
    if (!kIsFirst) softmax_.rescale_accumulator(acc_o_);
  }

  // What the block's note says is not known before S is issued, and not needed.
  __device__ __forceinline__ int next_block(Work& work) {
    float acc_s[kTilesN][4];
    issue<false>(acc_s, work);
    const int own_note = note();
    ptx::wgmma_wait_group<1>();
    this->release_k();
    this->weigh(acc_s);
    return own_note;
  }
};

}  // namespace flash_ext::v3::forward
