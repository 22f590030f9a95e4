// A consumer warpgroup: 64 query rows, all keys they see, one tile after another.
#pragma once

#include "ptx/warpgroup.cuh"
#include "sm90/copy_tile.cuh"
#include "sm90/warpgroup_gemm.cuh"
#include "v3/config.cuh"
#include "v3/kernel_params.cuh"
#include "v3/softmax.cuh"

namespace flash_ext::v3 {

// Keeps what `x` >= 0 depends on before the next wgmma wait. The wait is ordered against memory
// only, and ptxas moves it above any arithmetic that does not need its result.
__device__ __forceinline__ void pin_before_wait(float x, float* never_written) {
  asm volatile(
      "{.reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p st.shared.f32 [%1], %0;}\n" ::"f"(x),
      "r"(ptx::smem_addr(never_written))
      : "memory");
}

template <typename Config>
class Consumer {
  using Element = typename Config::Element;
  using QTile = typename Config::QTile;
  using KVTile = typename Config::KVTile;
  using SharedStorage = typename Config::SharedStorage;
  static constexpr int kBlockN = Config::kBlockN;
  static constexpr int kTilesN = kBlockN / 8;  // of eight columns
  static constexpr int kEarlyTiles = Config::kEarlySteps > 0 ? 2 * Config::kEarlySteps : kTilesN;

 public:
  __device__ __forceinline__ Consumer(SharedStorage& smem, const KernelParams& params,
                                      int warpgroup_idx)
      : smem_(smem),
        p_(params),
        warpgroup_idx_(warpgroup_idx),
        warp_idx_(threadIdx.x / 32 % 4),
        lane_idx_(threadIdx.x % 32),
        q_desc_(sm90::Descriptor::k_major(smem.q[0][warpgroup_idx])),
        k_desc_(sm90::Descriptor::k_major(smem.k[0])),
        v_desc_(sm90::Descriptor::mn_major(smem.v[0])) {}

  __device__ __forceinline__ void run() {
    if (warpgroup_idx_ == Config::kConsumers - 1) pass_turn();  // warpgroup 0 begins
    Work work;
    for (; await_tile(work); q_at_.advance()) {
      if (work.blocks == 0) {
        release_previous_q(work);
        release_q(work.q_stage);
        continue;
      }
      first_block(work);
      release_previous_q(work);  // by now TMA has read the O in it
      other_blocks(work);
      float inverse_sums[2];
      add_last_product(work, inverse_sums);
      store(work, inverse_sums);
    }
    if (lane_idx_ == 0) ptx::tma_store_wait_read();
  }

 private:
  // What is held in registers of a tile; the rest stays in shared memory until its Q is released.
  struct Work {
    int q_stage;
    int blocks, full_blocks;
    bool accumulates;  // O of this tile exists
  };
  __device__ __forceinline__ const WarpgroupTile& tile_of(const Work& work) const {
    return smem_.tile[work.q_stage][warpgroup_idx_];
  }

  // The shuffle tells ptxas that a whole warp has the same value.
  static __device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

  // The next tile, up to the first block that this warpgroup computes; false if there is none.
  __device__ __forceinline__ bool await_tile(Work& work) {
    sm90::wait_full(smem_.q_barriers[warpgroup_idx_], q_at_);
    work.q_stage = q_at_.stage;
    const WarpgroupTile& tile = tile_of(work);
    if (!uniform(tile.is_valid)) return false;
    work.blocks = uniform(tile.blocks);
    work.full_blocks = uniform(tile.full_blocks);
    work.accumulates = false;
    if (p_.scale.negate) negate_q();
#pragma unroll 1
    for (int n_block = work.blocks + uniform(tile.skipped) - 1; n_block >= work.blocks; --n_block) {
      skip_block(/*takes_turn=*/n_block > 0);
    }
    return true;
  }

  // A negative scale changes the sign of Q, once a tile, and the kernel goes on with |scale|.
  __device__ __forceinline__ void negate_q() {
    auto* words = reinterpret_cast<uint32_t*>(smem_.q[q_at_.stage][warpgroup_idx_].data);
#pragma unroll 4
    for (int i = threadIdx.x % 128; i < QTile::kBytes / 4; i += 128) words[i] ^= 0x80008000u;
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1 + Config::kConsumers + warpgroup_idx_, 128);
  }

  // A block that other warpgroups of the tile see and this one does not.
  __device__ __forceinline__ void skip_block(bool takes_turn) {
    if (takes_turn) {
      await_turn();
      pass_turn();
    }
    sm90::wait_full(smem_.k_barriers, k_at_);
    release_k();
    sm90::wait_full(smem_.v_barriers, v_at_);
    release_v();
  }

  __device__ __forceinline__ void first_block(const Work& work) {
    float acc_s[kTilesN][4];
    softmax_ = Softmax();
    sm90::wait_full(smem_.k_barriers, k_at_);
    ptx::wgmma_fence();
    issue_scores(acc_s);
    ptx::wgmma_wait_group<0>();
    release_k();
    if (work.blocks > work.full_blocks) mask_block(acc_s, work, work.blocks - 1);
    softmax_.update_max(acc_s, p_.scale.log2);
    softmax_.template weights<0, kTilesN>(acc_s, p_.scale.log2);
    pack_operand<Element>(frag_p_, acc_s);
  }

  __device__ __forceinline__ void other_blocks(Work& work) {
    int n_block = work.blocks - 2;
#pragma unroll 1
    for (; n_block >= work.full_blocks; --n_block) next_block(work, n_block, /*is_edge=*/true);
#pragma unroll 1
    for (; n_block >= 0; --n_block) next_block(work, n_block, /*is_edge=*/false);
  }

  // While the tensor cores add the previous block's P V to O, its softmax turns this block's S into
  // weights.
  __device__ __forceinline__ void next_block(Work& work, int n_block, bool is_edge) {
    float acc_s[kTilesN][4];
    sm90::wait_full(smem_.k_barriers, k_at_);
    await_turn();
    ptx::wgmma_fence();
    issue_scores(acc_s);
    sm90::wait_full(smem_.v_barriers, v_at_);
    ptx::wgmma_fence();
    issue_product(work);
    pass_turn();
    ptx::wgmma_wait_group<1>();
    release_k();
    if (is_edge) mask_block(acc_s, work, n_block);
    softmax_.update_max(acc_s, p_.scale.log2);
    softmax_.template weights<0, kEarlyTiles>(acc_s, p_.scale.log2);
    if (kEarlyTiles < kTilesN) {
      pin_before_wait(softmax_.row_sum[0] + softmax_.row_sum[1], &smem_.never_written);
    }
    ptx::wgmma_wait_group<0>();
    release_v();
    softmax_.template weights<kEarlyTiles, kTilesN>(acc_s, p_.scale.log2);
    pack_operand<Element>(frag_p_, acc_s);
    softmax_.rescale_accumulator(acc_o_);
  }

  __device__ __forceinline__ void add_last_product(Work& work, float (&inverse_sums)[2]) {
    sm90::wait_full(smem_.v_barriers, v_at_);
    ptx::wgmma_fence();
    issue_product(work);
    finish_rows(inverse_sums, tile_of(work));  // meanwhile
    ptx::wgmma_wait_group<0>();
    release_v();
  }

  __device__ __forceinline__ void issue_scores(float (&acc_s)[kTilesN][4]) {
    sm90::gemm_abt<QTile, KVTile>(acc_s, q_desc_.tile<QTile>(q_at_.stage * Config::kConsumers),
                                  k_desc_.tile<KVTile>(k_at_.stage));
  }
  __device__ __forceinline__ void issue_product(Work& work) {
    sm90::gemm_ab<KVTile>(acc_o_, frag_p_, v_desc_.tile<KVTile>(v_at_.stage), work.accumulates);
    work.accumulates = true;
  }

  __device__ __forceinline__ void mask_block(float (&acc_s)[kTilesN][4], const Work& work,
                                             int n_block) {
    mask_scores(acc_s, p_.mask, tile_of(work).row0 + 16 * warp_idx_ + lane_idx_ / 4,
                n_block * kBlockN + lane_idx_ % 4 * 2);
  }

  // L = m + log l, and 1 / l.
  __device__ __forceinline__ void finish_rows(float (&inverse_sums)[2], const WarpgroupTile& tile) {
    const int64_t batch_head = int64_t{tile.batch_idx} * p_.schedule.heads_q + tile.head_idx;
    float* const lse = p_.lse + batch_head * p_.mask.seqlen_q;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(softmax_.row_sum[half]);
      inverse_sums[half] = sum > 0.f ? ptx::rcp_approx(sum) : 0.f;
      const int row = tile.row0 + 16 * warp_idx_ + lane_idx_ / 4 + 8 * half;
      if (lane_idx_ % 4 == 0 && row < p_.mask.seqlen_q) {
        lse[row] = log_sum_exp(softmax_.row_max[half] * p_.scale.natural, sum);
      }
    }
  }

  // O / l leaves through this warp's own rows of Q, which nobody reads any more.
  __device__ __forceinline__ void store(const Work& work, const float (&inverse_sums)[2]) {
    const WarpgroupTile& tile = tile_of(work);
    QTile& staging = smem_.q[work.q_stage][warpgroup_idx_];
    sm90::store_accumulator(staging, acc_o_, inverse_sums, 16 * warp_idx_, lane_idx_);
    sm90::send_rows(staging, p_.out_map, {tile.row0, tile.head_idx, tile.batch_idx}, 16 * warp_idx_,
                    lane_idx_);
    if (Config::kQBuffers == 1) {
      release_q(work.q_stage);
    } else {
      holds_previous_q_ = true;
    }
  }

  // The producer may overwrite a Q buffer when TMA has read the O in it.
  __device__ __forceinline__ void release_q(int stage) {
    if (lane_idx_ == 0) {
      ptx::tma_store_wait_read();
      ptx::mbarrier_arrive(smem_.q_barriers[warpgroup_idx_].empty[stage]);
    }
  }

  __device__ __forceinline__ void release_previous_q(const Work& work) {
    if (Config::kQBuffers == 1 || !holds_previous_q_) return;
    release_q(work.q_stage ^ 1);
    holds_previous_q_ = false;
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

  // The warpgroups take turns in issuing products, so that one's softmax falls on the other's.
  __device__ __forceinline__ void await_turn() { ptx::named_barrier_sync(1 + warpgroup_idx_, 256); }
  __device__ __forceinline__ void pass_turn() {
    ptx::named_barrier_arrive(1 + (warpgroup_idx_ + 1) % Config::kConsumers, 256);
  }

  SharedStorage& smem_;
  const KernelParams& p_;
  const int warpgroup_idx_;
  const int warp_idx_;
  const int lane_idx_;
  const sm90::Descriptor q_desc_, k_desc_, v_desc_;
  sm90::RingPosition<Config::kQBuffers> q_at_;
  sm90::RingPosition<Config::kKStages> k_at_;
  sm90::RingPosition<Config::kVStages> v_at_;

  bool holds_previous_q_ = false;

  Softmax softmax_;
  float acc_o_[Config::kHeadDim / 8][4];
  uint32_t frag_p_[kBlockN / 16][4];
};

}  // namespace flash_ext::v3
