// The warpgroup of dQ at head_dim 256: half of the columns, for the keys of both thread blocks of
// the pair. One of them alone adds to an element in memory, which halves that traffic.
#pragma once

#include "common/numeric.cuh"
#include "ptx/cluster.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/reduction.cuh"
#include "sm90/warpgroup_gemm.cuh"
#include "v3/backward/pair_config.cuh"

namespace flash_ext::v3::backward {

template <typename Config>
class QueryGradient {
  using Element = typename Config::Element;
  using ScoreTile = typename Config::ScoreTile;
  using SharedStorage = typename Config::SharedStorage;
  static constexpr int kSlabs = Config::HalfTile::kSlabs;
  static constexpr int kTilesSlab = sm90::kSlabCols / 8;

 public:
  __device__ __forceinline__ QueryGradient(SharedStorage& smem, const KernelParams& params)
      : smem_(smem), p_(params), rank_(ptx::cluster_block_rank()), lane_idx_(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    for (int round = 0;; ++round) {
      ptx::mbarrier_wait(smem_.k_barriers.full[0], round % 2);
      const PairTile& tile = smem_.tile[round % 2];
      if (!uniform(tile.is_valid)) break;
      compute(tile);
      if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.k_barriers.empty[0]);
    }
#pragma unroll
    for (int n = 0; n < kTilesSlab; ++n) add_finished(n);
  }

 private:
  __device__ __forceinline__ void compute(const PairTile& tile) {
    const int m_begin = uniform(tile.m_begin);
    const int m_end = uniform(tile.m_end);
    const int first_head = uniform(tile.kv_head_idx) * p_.group_size;
    int64_t first_block = row_block(p_, uniform(tile.batch_idx), first_head, 0);
    for (int i = 0; i < p_.group_size; ++i, first_block += p_.num_m_blocks) {
#pragma unroll 1
      for (int m_block = m_begin; m_block < m_end; ++m_block) compute_block(first_block + m_block);
    }
  }

  __device__ __forceinline__ void compute_block(int64_t block) {
    sm90::wait_full(smem_.ds_barriers, at_);
    ptx::mbarrier_wait(smem_.other_ds_full[at_.stage], at_.phase);
#pragma unroll 1
    for (int slab = 0; slab < kSlabs; ++slab) {
      compute_slab(block, slab);
      finished_at_ = p_.dq_accum == nullptr ? nullptr : accum_address(block, slab);
    }
    release_ds();
    at_.advance();
  }

  // 64 columns of dQ. In between the ones before leave for memory, one by one: in a burst they
  // would hold up the shared-memory accesses of the other warpgroups.
  __device__ __forceinline__ void compute_slab(int64_t block, int slab) {
    using Descriptor = sm90::Descriptor;
    float acc_dq[kTilesSlab][4];
    issue_products<0>(acc_dq, Descriptor::mn_major(smem_.ds[0]).template tile<ScoreTile>(at_.stage),
                      Descriptor::mn_major(smem_.k).template tile<ScoreTile>(2 * rank_ + slab));
    issue_products<1>(acc_dq,
                      Descriptor::mn_major(smem_.other_ds[0]).template tile<ScoreTile>(at_.stage),
                      Descriptor::mn_major(smem_.other_k).template tile<ScoreTile>(slab));
    ptx::wgmma_commit_group();
    if (slab == 0) add_row_sums(block);
    ptx::wgmma_wait_group<0>();
#pragma unroll
    for (int n = 0; n < kTilesSlab; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        asm volatile("mov.f32 %0, %1;" : "=f"(finished_[n][i]) : "f"(acc_dq[n][i]));
    }
  }

  template <int kIndex>
  __device__ __forceinline__ void issue_products(float (&acc_dq)[kTilesSlab][4],
                                                 sm90::Descriptor ds, sm90::Descriptor k) {
    using ptx::Major;
    constexpr int kSteps = ScoreTile::kRows / sm90::kWgmmaK;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int offset = step * sm90::kWgmmaK * sm90::kSlabRowBytes;
      add_finished(kIndex * kSteps + step);
      ptx::wgmma_fence();
      ptx::Wgmma<Element, 64>::template ss<Major::kMN, Major::kMN>(
          acc_dq, ds.at(offset), k.at(offset), kIndex > 0 || step > 0);
    }
  }

  __device__ __forceinline__ void release_ds() const {
    if (lane_idx_ > 0) return;
    ptx::Mbarrier& empty = smem_.ds_barriers.empty[at_.stage];
    ptx::mbarrier_arrive(empty);
    // What was sent has been read.
    ptx::mbarrier_arrive_cluster_relaxed(ptx::cluster_smem_addr(&empty, 1 - rank_));
  }

  __device__ __forceinline__ float* accum_address(int64_t block, int slab) const {
    constexpr int kHeadDim = Config::kHeadDim;
    return p_.dq_accum + block * (Config::kBlockM * kHeadDim) +
           dq_accum_offset<kHeadDim>(0, (2 * rank_ + slab) * kTilesSlab, threadIdx.x % 128);
  }

  __device__ __forceinline__ void add_finished(int n) const {
    if (finished_at_ == nullptr) return;
    const float (&x)[4] = finished_[n];
    ptx::red_add_v4(finished_at_ + dq_accum_offset<Config::kHeadDim>(0, n, 0), x[0], x[1], x[2],
                    x[3]);
  }

  // What the rounded dS of every query row sums to over this thread block's keys; a warp sums over
  // sixteen of them.
  __device__ __forceinline__ void add_row_sums(int64_t block) const {
    if (p_.dq_accum == nullptr) return;
    const int key0 = threadIdx.x / 32 % 4 * 16;
    const uint32_t base = ptx::smem_addr(smem_.ds[at_.stage].data) + lane_idx_ % 4 * 4;
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t addr = base + ScoreTile::chunk_offset(key0 + i, lane_idx_ / 4 * 8);
      const float2 x = unpack<Element>(ptx::ld_shared_b32(addr));
      sum.x += x.x;
      sum.y += x.y;
    }
    ptx::red_add_v2(p_.dq_row_sum + block * Config::kBlockM + 2 * lane_idx_, sum.x, sum.y);
  }

  SharedStorage& smem_;
  const KernelParams& p_;
  const int rank_;
  const int lane_idx_;

  sm90::RingPosition<Config::kStages> at_;  // of the block's dS
  float* finished_at_ = nullptr;
  float finished_[kTilesSlab][4];
};

}  // namespace flash_ext::v3::backward
