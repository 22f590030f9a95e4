// The warpgroup of dK at head_dim 256: dP, dS and dK of this thread block's keys.
#pragma once

#include "ptx/cluster.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/tma.cuh"
#include "sm90/store_rows.cuh"
#include "sm90/warpgroup_gemm.cuh"
#include "v3/backward/pair_config.cuh"

namespace flash_ext::v3::backward {

template <typename Config>
class KeyGradient {
  using Element = typename Config::Element;
  using Tile = typename Config::Tile;
  using HalfTile = typename Config::HalfTile;
  using ScoreTile = typename Config::ScoreTile;
  using SharedStorage = typename Config::SharedStorage;

  static constexpr int kTilesM = Config::kBlockM / 8;  // of eight columns, here queries
  static constexpr int kTilesHalf = Config::kHalfDim / 8;

 public:
  __device__ __forceinline__ KeyGradient(SharedStorage& smem, const KernelParams& params)
      : smem_(smem), p_(params), warp_idx_(threadIdx.x / 32 % 4), lane_idx_(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    for (int round = 0;; ++round) {
      ptx::mbarrier_wait(smem_.v_barriers.full[0], round % 2);
      const PairTile& tile = smem_.tile[round % 2];
      if (!ptx::warp_uniform(tile.is_valid)) break;
      compute(num_query_blocks(tile, p_.group_size));
      arrive(smem_.v_barriers.empty[0]);
      arrive(smem_.k_barriers.empty[0]);  // for the slot of the tile
      store(tile);
    }
  }

 private:
  __device__ __forceinline__ void compute(int blocks) {
#pragma unroll
    for (int n = 0; n < kTilesHalf; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc_dk_[0][n][i] = acc_dk_[1][n][i] = 0.f;
    }
    if (blocks == 0) return;
    float acc_dp[kTilesM][4];
    issue_dp(acc_dp);
    ptx::wgmma_wait_group<0>();
    release_dout();
    compute_ds(acc_dp);
    // dK before the next block's dP: Q is let go of the sooner.
#pragma unroll 1
    while (--blocks > 0) {
      await_ds();
      issue_dk();
      issue_dp(acc_dp);            // of the next block
      ptx::wgmma_wait_group<2>();  // dK
      release_dk();
      ptx::wgmma_wait_group<0>();
      release_dout();
      compute_ds(acc_dp);
    }
    await_ds();
    issue_dk();
    ptx::wgmma_wait_group<0>();
    release_dk();
  }

  // Until all four warps have written theirs; then it goes to the other thread block, too.
  __device__ __forceinline__ void await_ds() {
    sm90::wait_full(smem_.ds_barriers, at_);
    if (threadIdx.x % 128 == 0) send_ds();
  }

  __device__ __forceinline__ void issue_dp(float (&acc_dp)[kTilesM][4]) {
    const auto v_desc = sm90::Descriptor::k_major(smem_.v);
    const auto dout_desc = sm90::Descriptor::k_major(smem_.dout[0]);
    auto at = dout_at_;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sm90::wait_full(smem_.dout_barriers, at);
      ptx::wgmma_fence();
      sm90::gemm_abt<HalfTile, HalfTile>(acc_dp, v_desc.template tile<HalfTile>(half),
                                         dout_desc.template tile<HalfTile>(at.stage), half > 0);
      at.advance();
    }
  }

  __device__ __forceinline__ void issue_dk() {
    const auto ds_desc = sm90::Descriptor::k_major(smem_.ds[0]).template tile<ScoreTile>(at_.stage);
    const auto q_desc = sm90::Descriptor::mn_major(smem_.q[0]).template tile<Tile>(at_.stage);
    ptx::wgmma_fence();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sm90::gemm_ab<ScoreTile, HalfTile>(acc_dk_[half], ds_desc,
                                         q_desc.template tile<HalfTile>(half), true);
    }
  }

  // With this dK the block is done.
  __device__ __forceinline__ void release_dk() {
    arrive(smem_.q_barriers.empty[at_.stage]);
    arrive(smem_.ds_barriers.empty[at_.stage]);
    at_.advance();
  }

  __device__ __forceinline__ void release_dout() {
    for (int half = 0; half < 2; ++half) {
      arrive(smem_.dout_barriers.empty[dout_at_.stage]);
      dout_at_.advance();
    }
  }

  // dS = P * (dP - delta) where P was.
  __device__ __forceinline__ void compute_ds(const float (&acc_dp)[kTilesM][4]) {
    const float* delta = smem_.delta[at_.stage] + lane_idx_ % 4 * 2;
    auto& p = smem_.ds[at_.stage];
    sm90::wait_full(smem_.q_barriers, at_);  // brings delta
    ptx::mbarrier_wait(smem_.p_full[at_.stage][warp_idx_], at_.phase);
#pragma unroll
    for (int k = 0; k < kTilesM / 2; k += 2) {
      uint32_t frag[2][4];  // two in flight, for the latency
#pragma unroll
      for (int i = 0; i < 2; ++i) ptx::ldmatrix_x4(frag[i], score_addr<Config>(p, k + i));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        compute_eight(frag[i], acc_dp[2 * (k + i)], delta + 16 * (k + i));
        compute_eight(frag[i] + 2, acc_dp[2 * (k + i) + 1], delta + 16 * (k + i) + 8);
        ptx::stmatrix_x4(score_addr<Config>(p, k + i), frag[i][0], frag[i][1], frag[i][2],
                         frag[i][3]);
      }
    }
    ptx::fence_proxy_async();
    __syncwarp();
    arrive(smem_.ds_barriers.full[at_.stage]);
  }

  // Of eight queries, P's packed elements become dS's.
  static __device__ __forceinline__ void compute_eight(uint32_t* frag, const float (&acc_dp)[4],
                                                       const float* delta) {
    const float2 d = *reinterpret_cast<const float2*>(delta);
    constexpr float kScale = 1.f / (1 << kWeightShift<Element, Config::kHeadDim>);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 p = unpack<Element>(frag[half]);
      frag[half] = pack<Element>(p.x * kScale * (acc_dp[2 * half] - d.x),
                                 p.y * kScale * (acc_dp[2 * half + 1] - d.y));
    }
  }

  // And tells this thread block's dQ of what the other one sends at the same time.
  __device__ __forceinline__ void send_ds() {
    constexpr int kBytes = ScoreTile::kBytes;
    const int other_rank = 1 - ptx::cluster_block_rank();
    ptx::mbarrier_arrive_expect_tx(smem_.other_ds_full[at_.stage], kBytes);
    ptx::bulk_copy_cluster(ptx::cluster_smem_addr(smem_.other_ds[at_.stage].data, other_rank),
                           smem_.ds[at_.stage].data, kBytes,
                           ptx::cluster_smem_addr(&smem_.other_ds_full[at_.stage], other_rank));
  }

  __device__ __forceinline__ void store(const PairTile& tile) const {
    if (p_.dk.data == nullptr) return;
    const int row0 = tile.key0 + 16 * warp_idx_;
    Element* dk = static_cast<Element*>(p_.dk.data) + tile.batch_idx * p_.dk.batch_stride +
                  tile.kv_head_idx * p_.dk.head_stride + row0 * p_.dk.row_stride;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int col0 = half * Config::kHalfDim;
      sm90::store_rows(dk + col0, p_.dk.row_stride, p_.mask.seqlen_k - row0, p_.head_dim - col0,
                       acc_dk_[half], p_.softmax_scale, lane_idx_);
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
  sm90::RingPosition<Config::kStages> at_;           // of the block's Q, P and dS
  sm90::RingPosition<Config::kDoutStages> dout_at_;  // of the first half of its dO
  float acc_dk_[2][kTilesHalf][4];
};

}  // namespace flash_ext::v3::backward
