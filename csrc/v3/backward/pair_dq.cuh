// The warpgroup that computes dQ at head_dim 256: half of the columns, for the keys of both thread
// blocks of the pair, so that only one of them adds to an element in memory.
#pragma once

#include "ptx/cluster.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/reduction.cuh"
#include "common/numeric.cuh"
#include "sm90/warpgroup_gemm.cuh"
#include "v3/backward/pair_config.cuh"

namespace flash_ext::v3::backward {

template <typename Config>
class DqWarpgroup {
  using Element = typename Config::Element;
  using HalfTile = typename Config::HalfTile;
  using ScoreTile = typename Config::ScoreTile;
  using SharedStorage = typename Config::SharedStorage;
  static constexpr int kTilesSlab = 8;

 public:
  __device__ __forceinline__ DqWarpgroup(SharedStorage& smem, const KernelParams& params)
      : smem_(smem),
        p_(params),
        rank_(ptx::cluster_block_rank()),
        lane_idx_(threadIdx.x % 32),
        other_ds_empty_(ptx::cluster_smem_addr(smem.ds_barriers.empty, 1 - rank_)) {}

  __device__ __forceinline__ void run() {
    sm90::RingPosition<1> key_at;
    for (int round = 0;; ++round) {
      sm90::wait_full(smem_.k_barriers, key_at);
      const PairTile& tile = smem_.tile[round % 2];
      if (!uniform(tile.is_valid)) break;
      QueryWalk walk(tile, p_.group_size);
      const int length = walk.length;
#pragma unroll 1
      for (int i = 0; i < length; ++i, walk.advance()) {
        next_block(row_block(p_, tile.batch_idx, walk.head_idx, walk.m_block));
        score_at_.advance();
      }
      if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.k_barriers.empty[0]);
      key_at.advance();
    }
  }

 private:
  __device__ __forceinline__ void next_block(int64_t block) {
    sm90::wait_full(smem_.ds_barriers, score_at_);
    const float2 row_sums = sum_rows();
    if (p_.dq_accum != nullptr) {
      ptx::red_add_v2(p_.dq_row_sum + block * Config::kBlockM + 2 * lane_idx_, row_sums.x,
                      row_sums.y);
    }
#pragma unroll 1
    for (int slab = 0; slab < 2; ++slab) add_slab(block, slab);
  }

  __device__ __forceinline__ void add_slab(int64_t block, int slab) {
    float acc_dq[kTilesSlab][4];
    const auto k_desc = sm90::Descriptor::mn_major(smem_.k).template tile<ScoreTile>(2 * rank_ + slab);
    ptx::wgmma_fence();
    sm90::gemm_atb<ScoreTile, ScoreTile>(acc_dq, sm90::Descriptor::mn_major(smem_.ds[0]).template tile<ScoreTile>(score_at_.stage), k_desc);
    ptx::mbarrier_wait(smem_.other_ds_full[score_at_.stage], score_at_.phase);
    ptx::wgmma_fence();
    sm90::gemm_atb<ScoreTile, ScoreTile>(acc_dq, sm90::Descriptor::mn_major(smem_.other_ds[0]).template tile<ScoreTile>(score_at_.stage),
                                        sm90::Descriptor::mn_major(smem_.other_k).template tile<ScoreTile>(slab), true);
    ptx::wgmma_wait_group<0>();
    if (lane_idx_ == 0 && slab == 1) {
      ptx::mbarrier_arrive(smem_.ds_barriers.empty[score_at_.stage]);
      ptx::mbarrier_arrive_cluster(other_ds_empty_ + score_at_.stage * sizeof(ptx::Mbarrier));  // what was sent has been read
    }
    if (p_.dq_accum == nullptr) return;
    float* const accum = p_.dq_accum + block * (Config::kBlockM * Config::kHeadDim) +
                         dq_accum_offset<Config::kHeadDim>(0, (2*rank_+slab) * kTilesSlab, threadIdx.x % 128);
#pragma unroll
    for (int n = 0; n < kTilesSlab; ++n) {
      const float (&acc)[4] = acc_dq[n];
      ptx::red_add_v4(accum + dq_accum_offset<Config::kHeadDim>(0, n, 0), acc[0], acc[1], acc[2],
                      acc[3]);
    }
  }

  // What the rounded dS of two query rows sums to over a quarter of this thread block's keys.
  __device__ __forceinline__ float2 sum_rows() const {
    constexpr int kKeys = Config::kThreadBlockN / 4;
    const int key0 = threadIdx.x / 32 % 4 * kKeys;
    const uint32_t base = ptx::smem_addr(smem_.ds[score_at_.stage].data) + lane_idx_ % 4 * 4;
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const uint32_t addr = base + ScoreTile::chunk_offset(key0 + i, lane_idx_ / 4 * 8);
      const float2 x = unpack<Element>(ptx::ld_shared_b32(addr));
      sum.x += x.x;
      sum.y += x.y;
    }
    return sum;
  }

  SharedStorage& smem_;
  const KernelParams& p_;
  const int rank_;
  const int lane_idx_;
  const uint32_t other_ds_empty_;
  sm90::RingPosition<Config::kStages> score_at_;
};

}  // namespace flash_ext::v3::backward
