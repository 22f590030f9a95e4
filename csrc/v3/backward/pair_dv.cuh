// The warpgroup of dV at head_dim 256: S, P and dV of this thread block's keys.
#pragma once

#include "ptx/stmatrix.cuh"
#include "sm90/store_rows.cuh"
#include "sm90/warpgroup_gemm.cuh"
#include "v3/backward/pair_config.cuh"
#include "v3/backward/scores.cuh"

namespace flash_ext::v3::backward {

template <typename Config>
class ValueGradient {
  using Element = typename Config::Element;
  using Tile = typename Config::Tile;
  using HalfTile = typename Config::HalfTile;
  using ScoreTile = typename Config::ScoreTile;
  using SharedStorage = typename Config::SharedStorage;
  static constexpr int kTilesM = Config::kBlockM / 8;  // of eight columns, here queries
  static constexpr int kKSteps = Config::kBlockM / sm90::kWgmmaK;
  static constexpr int kTilesHalf = Config::kHalfDim / 8;

 public:
  __device__ __forceinline__ ValueGradient(SharedStorage& smem, const KernelParams& params)
      : smem_(smem),
        p_(params),
        warp_idx_(threadIdx.x / 32 % 4),
        lane_idx_(threadIdx.x % 32),
        signed_scale_log2_(params.scale.negate ? -params.scale.log2 : params.scale.log2) {}

  __device__ __forceinline__ void run() {
    for (int round = 0;; ++round) {
      ptx::mbarrier_wait(smem_.k_barriers.full[0], round % 2);
      const PairTile& tile = smem_.tile[round % 2];
      if (!ptx::warp_uniform(tile.is_valid)) break;
      compute(tile);
      arrive(smem_.k_barriers.empty[0]);
      store(tile);
    }
  }

 private:
  __device__ __forceinline__ void compute(const PairTile& tile) {
#pragma unroll
    for (int n = 0; n < kTilesHalf; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc_dv_[0][n][i] = acc_dv_[1][n][i] = 0.f;
    }
    int blocks = num_query_blocks(tile, p_.group_size);
    if (blocks == 0) return;
    float acc_s[kTilesM][4];
    uint32_t frag_p[kKSteps][4];
    issue_s(acc_s);
    ptx::wgmma_wait_group<0>();
    compute_p(acc_s, tile.key0);
    // dV before the next block's S: dO, of which there is room for one and a half, is let go of
    // sooner, and P's registers are free for S.
#pragma unroll 1
    while (--blocks > 0) {
      sm90::pack_operand<Element>(frag_p, acc_s);
      publish_p(frag_p);
      issue_dv(frag_p);
      ptx::wgmma_wait_group<1>();
      release_dout_half();
      ptx::wgmma_wait_group<0>();
      release_dout_half();
      issue_s(acc_s);
      ptx::wgmma_wait_group<0>();
      compute_p(acc_s, tile.key0);
    }
    sm90::pack_operand<Element>(frag_p, acc_s);
    publish_p(frag_p);
    issue_dv(frag_p);
    ptx::wgmma_wait_group<0>();
    release_dout_half();
    release_dout_half();
  }

  __device__ __forceinline__ void release_dout_half() {
    arrive(smem_.dout_barriers.empty[dout_at_.stage]);
    dout_at_.advance();
  }

  __device__ __forceinline__ void issue_s(float (&acc_s)[kTilesM][4]) {
    sm90::wait_full(smem_.q_barriers, at_);
    ptx::wgmma_fence();
    sm90::gemm_abt<Tile, Tile>(
        acc_s, sm90::Descriptor::k_major(smem_.k),
        sm90::Descriptor::k_major(smem_.q[0]).template tile<Tile>(at_.stage));
  }

  __device__ __forceinline__ void issue_dv(const uint32_t (&frag_p)[kKSteps][4]) {
    const auto dout_desc = sm90::Descriptor::mn_major(smem_.dout[0]);
    auto at = dout_at_;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sm90::wait_full(smem_.dout_barriers, at);
      ptx::wgmma_fence();
      sm90::gemm_ab<HalfTile>(acc_dv_[half], frag_p, dout_desc.template tile<HalfTile>(at.stage),
                              true);
      at.advance();
    }
  }

  // P = exp2(S - L), and lets go of Q.
  __device__ __forceinline__ void compute_p(float (&acc_s)[kTilesM][4], int key0) {
    const auto& statistics = smem_.statistics[at_.stage];
    const int row0 = statistics.row0;
    const int row = row0 + lane_idx_ % 4 * 2;
    if (!block_is_full(p_.mask, row0, key0, Config::kThreadBlockN) || statistics.has_huge) {
      mask_scores(acc_s, p_.mask, p_.scale.negate, key0 + 16 * warp_idx_ + lane_idx_ / 4, row);
      if (statistics.has_huge) {
        const float* lse = p_.lse + int64_t{statistics.batch_head} * p_.mask.seqlen_q + row;
        subtract_huge_lse(acc_s, lse, p_.mask.seqlen_q - row, signed_scale_log2_,
                          p_.scale.negate ? -p_.scale.natural : p_.scale.natural);
      }
    }
    recompute_p(acc_s, statistics.lse_log2 + lane_idx_ % 4 * 2, signed_scale_log2_);
    arrive(smem_.q_barriers.empty[at_.stage]);
  }

  // To the same 16 keys' warp of the warpgroup of dK.
  __device__ __forceinline__ void publish_p(const uint32_t (&frag_p)[kKSteps][4]) {
    sm90::wait_empty(smem_.ds_barriers, at_);
#pragma unroll
    for (int k = 0; k < kKSteps; ++k) {
      ptx::stmatrix_x4(score_addr<Config>(smem_.ds[at_.stage], k), frag_p[k][0], frag_p[k][1],
                       frag_p[k][2], frag_p[k][3]);
    }
    __syncwarp();
    arrive(smem_.p_full[at_.stage][warp_idx_]);
    at_.advance();
  }

  __device__ __forceinline__ void store(const PairTile& tile) const {
    if (p_.dv.data == nullptr) return;
    constexpr float kScale = 1.f / (1 << kWeightShift<Element, Config::kHeadDim>);
    const int row0 = tile.key0 + 16 * warp_idx_;
    Element* dv = static_cast<Element*>(p_.dv.data) + tile.batch_idx * p_.dv.batch_stride +
                  tile.kv_head_idx * p_.dv.head_stride + row0 * p_.dv.row_stride;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int col0 = half * Config::kHalfDim;
      sm90::store_rows(dv + col0, p_.dv.row_stride, p_.mask.seqlen_k - row0, p_.head_dim - col0,
                       acc_dv_[half], kScale, lane_idx_);
    }
  }

  // Every warp lets go for itself, see v3/forward/consumer.cuh.
  __device__ __forceinline__ void arrive(ptx::Mbarrier& bar) const {
    if (lane_idx_ == 0) ptx::mbarrier_arrive(bar);
  }

  SharedStorage& smem_;
  const KernelParams& p_;
  const int warp_idx_;
  const int lane_idx_;
  const float signed_scale_log2_;
  sm90::RingPosition<Config::kStages> at_;           // of the block's Q and P
  sm90::RingPosition<Config::kDoutStages> dout_at_;  // of the first half of its dO
  float acc_dv_[2][kTilesHalf][4];
};

}  // namespace flash_ext::v3::backward
