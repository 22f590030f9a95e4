// How a consumer warpgroup walks over its tiles and their steps.
#pragma once

#include "v3/backward/consumer.cuh"

namespace flash_ext::v3::backward {

template <typename Config>
class TileConsumer : public Consumer<Config> {
  using Base = Consumer<Config>;
  using Base::acc_dk_, Base::acc_dv_, Base::at_, Base::holds_dk_, Base::kept_, Base::kv_at_,
      Base::lane_idx_, Base::p_, Base::smem_, Base::tile_at_, Base::warpgroup_idx_;
  using Base::announced, Base::skip, Base::skip_first, Base::stage_dk, Base::stage_gradient,
      Base::tile;
  using typename Base::Step;
  static constexpr int kBlockM = Config::kBlockM;
  static constexpr int kBlockN = Config::kBlockN;

 public:
  using Base::Base;

  __device__ __forceinline__ void run() {
    for (;; tile_at_.advance()) {
      sm90::wait_full(smem_.tile_barriers, tile_at_);
      if (!ptx::warp_uniform(tile().is_valid)) break;
      compute_tile();
      if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.tile_barriers.empty[tile_at_.stage]);
      stage_gradient(smem_.dv(warpgroup_idx_), acc_dv_, 1.f);
      holds_dk_ = true;
    }
    stage_dk();
  }

 private:
  __device__ __forceinline__ void compute_tile() {
    if constexpr (Config::kIsGeneral)
      compute_announced_steps();
    else
      compute_all_steps();
  }

  // Of a general kernel's tile.
  __device__ __forceinline__ void compute_announced_steps() {
    clear(acc_dv_);
    if (ptx::warp_uniform(tile().m_end) == 0) {
      stage_dk();
      clear(acc_dk_);
      return;
    }
    Step step = await_step();
    const auto kept_of_second = draw_first_two();
    if (step.seen == 0) {
      skip_first(step.is_last);
    } else {
      compute_seen<true>(step);
    }
    kept_ = kept_of_second;
#pragma unroll 1
    while (!step.is_last) {
      step = await_step();
      if (step.seen == 0) {
        skip(step.is_last);
      } else {
        compute_seen<false>(step);
      }
    }
    if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.k_centred_barriers.empty[0]);
    kv_at_.advance();
  }

  // Of a tile's first step; returns the second's, which is of no use if there is none.
  __device__ __forceinline__ auto draw_first_two() {
    decltype(kept_) last{};
    if constexpr (Config::Scores::kHasDropout) {
      int row0 = announced().row0;
      int batch_head = smem_.statistics[at_.stage].batch_head;
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        kept_ = last;
        last = this->draw(row0, batch_head);
        row0 = announced().next_row0;
        batch_head = announced().next_batch_head;
      }
    }
    return last;
  }

  template <bool kIsFirst>
  __device__ __forceinline__ void compute_seen(const Step& step) {
    if constexpr (kBlockM == 64) {
      this->template compute<kIsFirst>(step);
    } else {
      static_assert(kBlockM == 128);
      const int parts = step.seen & 3;
      if (parts == 3) {
        this->template compute<kIsFirst>(step);
      } else if (parts == 2) {
        this->template compute<kIsFirst, 64>(step);
      } else {
        this->template compute<kIsFirst, 0, 64>(step);
      }
    }
  }

  __device__ __forceinline__ Step await_step() {
    sm90::wait_full(smem_.query_barriers, at_);
    const int flags = ptx::warp_uniform(announced().flags);
    return {flags >> (8 * warpgroup_idx_) & 0xff, (flags & StepWork::kIsLast) != 0};
  }

  __device__ __forceinline__ void compute_all_steps() {
    const int first_row = ptx::warp_uniform(tile().m_begin) * kBlockM;
    const int steps =
        (ptx::warp_uniform(tile().m_end) - ptx::warp_uniform(tile().m_begin)) * p_.group_size;
    clear(acc_dv_);
    if (steps == 0) {
      stage_dk();
      clear(acc_dk_);
      return;
    }
    const int key0 = ptx::warp_uniform(tile().n_block) * kBlockN + 64 * warpgroup_idx_;
    const Mask& mask = p_.mask;
    const int first_full_row =
        key0 + 64 <= mask.seqlen_k ? mask.row_begin(key0 + 63) : mask.seqlen_q;
    Step step{first_row, key0, first_full_row, steps == 1};
    const int hidden_rows = mask.row_begin(key0) - first_row;
    constexpr int kHalf = kBlockM > 64 ? kBlockM / 2 : 0;
    if (hidden_rows >= kBlockM) {
      skip_first(step.is_last);
    } else if (kHalf > 0 && hidden_rows >= kHalf) {
      this->template compute</*kIsFirst=*/true, kHalf>(step);
    } else {
      this->template compute</*kIsFirst=*/true>(step);
    }
#pragma unroll 1
    for (int i = 1; i < steps; ++i) {
      step.row0 += kBlockM;
      if (step.row0 >= p_.mask.seqlen_q) step.row0 = first_row;  // of the next head
      step.is_last = i == steps - 1;
      this->template compute</*kIsFirst=*/false>(step);
    }
    if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.k_centred_barriers.empty[0]);
    kv_at_.advance();
  }
};

}  // namespace flash_ext::v3::backward
