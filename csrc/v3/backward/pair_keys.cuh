// The two warpgroups that compute P and dS at head_dim 256. Either also owns half of the columns of
// dK and dV, of all keys of the thread block, in its registers.
#pragma once

#include "ptx/bulk_copy.cuh"
#include "ptx/cluster.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/stmatrix.cuh"
#include "sm90/copy_tile.cuh"
#include "sm90/store_rows.cuh"
#include "sm90/warpgroup_gemm.cuh"
#include "v3/backward/pair_config.cuh"
#include "v3/backward/scores.cuh"

namespace flash_ext::v3::backward {

// dS = P * (dP - delta), packed like P. `delta`: of the thread's first column.
template <typename Element, int kN>
__device__ __forceinline__ void compute_packed_ds(uint32_t (&frag_ds)[kN / 2][4],
                                                  const float (&acc_dp)[kN][4],
                                                  const uint32_t (&frag_p)[kN / 2][4],
                                                  const float* delta) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 d = *reinterpret_cast<const float2*>(delta + 8 * n);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = n % 2 * 2 + half;
      const float2 p = unpack<Element>(frag_p[n / 2][i]);
      frag_ds[n / 2][i] = pack<Element>(p.x * (acc_dp[n][2 * half] - d.x),
                                        p.y * (acc_dp[n][2 * half + 1] - d.y));
    }
  }
}

template <typename Config>
class KeyWarpgroup {
 protected:
  using Element = typename Config::Element;
  using Tile = typename Config::Tile;
  using HalfTile = typename Config::HalfTile;
  using ScoreTile = typename Config::ScoreTile;
  using SharedStorage = typename Config::SharedStorage;
  using StagePosition = sm90::RingPosition<Config::kStages>;
  static constexpr int kTilesM = Config::kBlockM / 8;  // of eight query columns
  static constexpr int kKSteps = Config::kBlockM / sm90::kWgmmaK;
  static constexpr int kTilesHalf = Config::kHalfDim / 8;

  __device__ __forceinline__ KeyWarpgroup(SharedStorage& smem, const KernelParams& params,
                                          int half_idx)
      : smem_(smem),
        p_(params),
        half_idx_(half_idx),
        warp_idx_(threadIdx.x / 32 % 4),
        lane_idx_(threadIdx.x % 32),
        ds_desc_(sm90::Descriptor::k_major(smem.ds[0])),
        q_half_desc_(sm90::Descriptor::mn_major(smem.q[0]).template tile<HalfTile>(half_idx)),
        dout_half_desc_(sm90::Descriptor::mn_major(smem.dout[0])) {}

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kTilesHalf; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc_dk_[n][i] = acc_dv_[n][i] = 0.f;
    }
  }

  __device__ __forceinline__ void issue_dv(const uint32_t (&frag_p)[kKSteps][4], int dout_stage) {
    ptx::wgmma_fence();
    sm90::gemm_ab<HalfTile>(acc_dv_, frag_p, dout_half_desc_.template tile<HalfTile>(dout_stage),
                            true);
  }
  __device__ __forceinline__ void issue_dk() {
    ptx::wgmma_fence();
    sm90::gemm_ab<ScoreTile, HalfTile>(acc_dk_, ds_desc_.template tile<ScoreTile>(at_.stage),
                                       q_half_desc_.template tile<Tile>(at_.stage), true);
  }

  // Every warp lets go for itself, see v3/consumer.cuh.
  __device__ __forceinline__ void arrive(ptx::Mbarrier& bar) const {
    if (lane_idx_ == 0) ptx::mbarrier_arrive(bar);
  }

  // Address of this lane's row of the 8x8 matrices of this warp's 16 keys and the k-th 16 queries.
  __device__ __forceinline__ uint32_t score_addr(int k) const {
    const int row = 16 * warp_idx_ + lane_idx_ % 16;
    return ptx::smem_addr(smem_.ds[at_.stage].data) + ScoreTile::chunk_offset(row, 16 * k + lane_idx_ / 16 * 8);
  }
  __device__ __forceinline__ void store_scores(const uint32_t (&frag)[kKSteps][4]) const {
#pragma unroll
    for (int k = 0; k < kKSteps; ++k) {
      ptx::stmatrix_x4(score_addr(k), frag[k][0], frag[k][1], frag[k][2], frag[k][3]);
    }
  }

  __device__ __forceinline__ void store_gradients(const PairTile& tile) const {
    store_gradient(p_.dv, tile, acc_dv_, 1.f);
    store_gradient(p_.dk, tile, acc_dk_, p_.softmax_scale);
  }

  SharedStorage& smem_;
  const KernelParams& p_;
  const int half_idx_;
  const int warp_idx_;
  const int lane_idx_;
  const sm90::Descriptor ds_desc_, q_half_desc_, dout_half_desc_;
  StagePosition at_;                                   // of this block's Q, P and dS
  sm90::RingPosition<Config::kDoutStages> dout_at_;  // of the first half of its dO
  sm90::RingPosition<1> key_at_;                       // of the tile's K and V
  int round_ = 0;
  float acc_dk_[kTilesHalf][4];
  float acc_dv_[kTilesHalf][4];

 private:
  __device__ __forceinline__ void store_gradient(const TensorView& view, const PairTile& tile,
                                                 const float (&acc)[kTilesHalf][4],
                                                 float factor) const {
    if (view.data == nullptr) return;
    const int row0 = tile.key0 + 16 * warp_idx_;
    const int col0 = half_idx_ * Config::kHalfDim;
    Element* first_row = static_cast<Element*>(view.data) + tile.batch_idx * view.batch_stride +
                         tile.kv_head_idx * view.head_stride + row0 * view.row_stride + col0;
    sm90::store_rows(first_row, view.row_stride, p_.mask.seqlen_k - row0, p_.head_dim - col0, acc,
                     factor, lane_idx_);
  }
};

// P^T = exp2(K Q^T - L). S of the next query block is computed while dS of this one is awaited.
template <typename Config>
class ProbabilityWarpgroup : KeyWarpgroup<Config> {
  using Base = KeyWarpgroup<Config>;
  using typename Base::StagePosition;
  using Tile = typename Config::Tile;
  using Base::acc_dk_, Base::acc_dv_, Base::at_, Base::key_at_, Base::lane_idx_, Base::p_,
      Base::round_, Base::dout_at_, Base::smem_, Base::warp_idx_;

 public:
  __device__ __forceinline__ ProbabilityWarpgroup(typename Config::SharedStorage& smem,
                                                  const KernelParams& params)
      : Base(smem, params, 0),
        signed_scale_log2_(params.scale.negate ? -params.scale.log2 : params.scale.log2),
        k_desc_(sm90::Descriptor::k_major(smem.k)),
        q_desc_(sm90::Descriptor::k_major(smem.q[0])) {}

  __device__ __forceinline__ void run() {
    for (;; ++round_) {
      sm90::wait_full(smem_.k_barriers, key_at_);
      const PairTile& tile = smem_.tile[round_ % 2];
      if (!uniform(tile.is_valid)) break;
      this->clear();
      compute(tile);
      this->arrive(smem_.k_barriers.empty[0]);
      this->store_gradients(tile);
      key_at_.advance();
    }
  }

 private:
  __device__ __forceinline__ void compute(const PairTile& tile) {
    QueryWalk walk(tile, p_.group_size);
    if (walk.length == 0) return;
    float acc_s[Base::kTilesM][4];
    uint32_t frag_p[Base::kKSteps][4];
    issue_s(acc_s, at_);
    ptx::wgmma_wait_group<0>();
    compute_p(acc_s, at_, tile, walk);
    pack_operand<typename Config::Element>(frag_p, acc_s);
#pragma unroll 1
    for (int i = 1;; ++i) {
      sm90::wait_empty(smem_.ds_barriers, at_);
      this->store_scores(frag_p);
      __syncwarp();
      this->arrive(smem_.p_full[warp_idx_]);
      const int dout_stage = dout_at_.stage;
      sm90::wait_full(smem_.dout_barriers, dout_at_);
      this->issue_dv(frag_p, dout_stage);
      dout_at_.advance();
      const int other_dout_stage = dout_at_.stage;
      dout_at_.advance();
      StagePosition next = at_;
      next.advance();
      const bool is_last = i == walk.length;
      issue_s(acc_s, next, is_last);
      sm90::wait_full(smem_.ds_barriers, at_);
      this->issue_dk();
      ptx::wgmma_wait_group<1>();  // dV and S
      this->arrive(smem_.dout_barriers.empty[dout_stage]);
      this->arrive(smem_.dout_barriers.empty[other_dout_stage]);
      if (!is_last) {
        walk.advance();
        compute_p(acc_s, next, tile, walk);
        pack_operand<typename Config::Element>(frag_p, acc_s);
      }
      ptx::wgmma_wait_group<0>();  // dK
      this->arrive(smem_.q_barriers.empty[at_.stage]);
      this->arrive(smem_.ds_barriers.empty[at_.stage]);
      at_ = next;
      if (is_last) break;
    }
  }

  __device__ __forceinline__ void issue_s(float (&acc_s)[Base::kTilesM][4], StagePosition at, bool dummy=false) {
    if (!dummy) sm90::wait_full(smem_.q_barriers, at);
    ptx::wgmma_fence();
    sm90::gemm_abt<Tile, Tile>(acc_s, k_desc_, q_desc_.template tile<Tile>(at.stage));
  }

  __device__ __forceinline__ void compute_p(float (&acc_s)[Base::kTilesM][4], StagePosition at,
                                            const PairTile& tile, const QueryWalk& walk) const {
    const int row0 = walk.m_block * Config::kBlockM;
    const int col = lane_idx_ % 4 * 2;
    if (!block_is_full(p_.mask, row0, tile.key0, Config::kThreadBlockN)) {
      mask_scores(acc_s, p_.mask, p_.scale.negate, tile.key0 + 16 * warp_idx_ + lane_idx_ / 4,
                  row0 + col);
    }
    const auto& statistics = smem_.statistics[at.stage];
    if (statistics.has_huge) {
      subtract_huge_lse(acc_s,
                        p_.lse + int64_t{statistics.batch_head} * p_.mask.seqlen_q + row0 + col,
                        p_.mask.seqlen_q - row0 - col, signed_scale_log2_,
                        p_.scale.negate ? -p_.scale.natural : p_.scale.natural);
    }
    recompute_p(acc_s, statistics.lse_log2 + col, signed_scale_log2_);
  }

  const float signed_scale_log2_;
  const sm90::Descriptor k_desc_, q_desc_;
};

// dS^T = P^T * (V dO^T - delta), for both warpgroups' dK, for dQ, and for the other thread block.
template <typename Config>
class ScoreGradientWarpgroup : KeyWarpgroup<Config> {
  using Base = KeyWarpgroup<Config>;
  using typename Base::StagePosition;
  using Element = typename Config::Element;
  using Tile = typename Config::Tile;
  using HalfTile = typename Config::HalfTile;
  using Base::at_, Base::dout_at_, Base::key_at_, Base::lane_idx_, Base::p_, Base::round_,
      Base::smem_, Base::warp_idx_;

 public:
  __device__ __forceinline__ ScoreGradientWarpgroup(typename Config::SharedStorage& smem,
                                                    const KernelParams& params)
      : Base(smem, params, 1),
        v_desc_(sm90::Descriptor::k_major(smem.v)),
        dout_desc_(sm90::Descriptor::k_major(smem.dout[0])),
        other_ds_(ptx::cluster_smem_addr(smem.other_ds, 1 - ptx::cluster_block_rank())),
        other_ds_full_(ptx::cluster_smem_addr(smem.other_ds_full, 1 - ptx::cluster_block_rank())) {}

  __device__ __forceinline__ void run() {
    for (;; ++round_) {
      sm90::wait_full(smem_.v_barriers, key_at_);
      const PairTile& tile = smem_.tile[round_ % 2];
      if (!uniform(tile.is_valid)) break;
      this->clear();
      compute(QueryWalk(tile, p_.group_size).length);
      this->arrive(smem_.v_barriers.empty[0]);
      this->arrive(smem_.k_barriers.empty[0]);  // for the slot of the tile
      this->store_gradients(tile);
      key_at_.advance();
    }
  }

 private:
  __device__ __forceinline__ void compute(int length) {
    float acc_dp[Base::kTilesM][4];
    uint32_t frag_p[Base::kKSteps][4];
    if (length > 0) issue_dp(acc_dp);
#pragma unroll 1
    for (int i = 0; i < length; ++i) {
      ptx::mbarrier_wait(smem_.p_full[warp_idx_], at_.stage);
#pragma unroll
      for (int k = 0; k < Base::kKSteps; ++k) ptx::ldmatrix_x4(frag_p[k], this->score_addr(k));
      ptx::wgmma_wait_group<0>();  // dP
      this->arrive(smem_.dout_barriers.empty[dout_at_.stage]);
      dout_at_.advance();
      uint32_t frag_ds[Base::kKSteps][4];
      compute_packed_ds<Element>(frag_ds, acc_dp, frag_p, smem_.delta[at_.stage] + lane_idx_ % 4 * 2);
      this->store_scores(frag_ds);
      ptx::fence_proxy_async();
      __syncwarp();
      this->arrive(smem_.ds_barriers.full[at_.stage]);
      sm90::wait_full(smem_.q_barriers, at_);
      sm90::wait_full(smem_.ds_barriers, at_);
      if (threadIdx.x % 128 == 0) send_ds();
      const int dout_stage = dout_at_.stage;
      dout_at_.advance();
      this->issue_dv(frag_p, dout_stage);
      this->issue_dk();
      if (i + 1 < length) {
        issue_dp(acc_dp);
        ptx::wgmma_wait_group<2>();  // dV and dK
      } else {
        ptx::wgmma_wait_group<0>();
      }
      this->arrive(smem_.dout_barriers.empty[dout_stage]);
      this->arrive(smem_.q_barriers.empty[at_.stage]);
      this->arrive(smem_.ds_barriers.empty[at_.stage]);
      at_.advance();
    }
    ptx::wgmma_wait_group<0>();
  }

  __device__ __forceinline__ void issue_dp(float (&acc_dp)[Base::kTilesM][4]) {
    auto at = dout_at_;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sm90::wait_full(smem_.dout_barriers, at);
      ptx::wgmma_fence();
      sm90::gemm_abt<HalfTile, HalfTile>(acc_dp, v_desc_.template tile<HalfTile>(half),
                                         dout_desc_.template tile<HalfTile>(at.stage), half > 0);
      at.advance();
    }
  }

  // And tells this thread block's dQ of what the other one sends at the same time.
  __device__ __forceinline__ void send_ds() {
    constexpr int kBytes = Base::ScoreTile::kBytes;
    ptx::mbarrier_arrive_expect_tx(smem_.other_ds_full[at_.stage], kBytes);
    ptx::bulk_copy_cluster(other_ds_ + at_.stage * kBytes, smem_.ds[at_.stage].data, kBytes,
                           other_ds_full_ + at_.stage * static_cast<int>(sizeof(ptx::Mbarrier)));
  }

  const sm90::Descriptor v_desc_, dout_desc_;
  const uint32_t other_ds_, other_ds_full_;  // there
};

}  // namespace flash_ext::v3::backward
