// The warpgroup of dQ at head_dim 256: half of the columns, for the keys of both thread blocks of
// the pair. One of them alone adds to an element in memory, which halves that traffic.
#pragma once

#include "common/numeric.cuh"
#include "ptx/cluster.cuh"
#include "ptx/global_counter.cuh"
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
  static constexpr int kWarps = 4;
  static constexpr int kNone = -1;
  static constexpr int kTilesSlab = sm90::kSlabCols / 8;

 public:
  __device__ __forceinline__ QueryGradient(SharedStorage& smem, const KernelParams& params)
      : smem_(smem), p_(params), lane_idx_(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    for (round_ = 0;; ++round_) {
      ptx::mbarrier_wait(smem_.k_barriers.full[0], round_ % 2);
      if (!ptx::warp_uniform(tile().is_valid)) break;
      compute();
      if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.k_barriers.empty[0]);
    }
  }

 private:
  // Read anew wherever it is needed, for want of registers.
  __device__ __forceinline__ const PairTile& tile() const { return smem_.tile[round_ % 2]; }

  __device__ __forceinline__ void compute() {
    block_ = kNone;
#pragma unroll 1
    for (int blocks = num_query_blocks(tile(), p_.group_size); blocks > 0; --blocks) {
      compute_block();
    }
    float* const accum = finished_address(1);
#pragma unroll
    for (int n = 0; n < kTilesSlab; ++n) add_finished(accum, n);
    pass_turn();
  }

  // Two slabs of 64 columns. While one is computed the one before leaves for memory, piece by
  // piece: in a burst they would hold up the shared-memory accesses of the other warpgroups.
  __device__ __forceinline__ void compute_block() {
    sm90::wait_full(smem_.ds_barriers, at_);
    ptx::mbarrier_wait(smem_.other_ds_full[at_.stage], at_.phase);
    float acc_dq[kTilesSlab][4];
    issue_slab(acc_dq, 0);
    const float2 row_sums = sum_rows();
    ptx::wgmma_wait_group<0>();
    keep(acc_dq);
    pass_turn();
    advance_block();
    await_turn();
    add_row_sums(row_sums);
    issue_slab(acc_dq, 1);
    ptx::wgmma_wait_group<0>();
    keep(acc_dq);
    release_ds();
    at_.advance();
  }

  __device__ __forceinline__ void advance_block() {
    const int m_begin = ptx::warp_uniform(tile().m_begin);
    if (block_ == kNone) {
      const int head_idx = ptx::warp_uniform(tile().kv_head_idx) * p_.group_size;
      m_block_ = m_begin;
      block_ =
          static_cast<int>(row_block(p_, ptx::warp_uniform(tile().batch_idx), head_idx, m_begin));
    } else if (++block_, ++m_block_ == ptx::warp_uniform(tile().m_end)) {
      block_ += p_.num_m_blocks - m_block_ + m_begin;  // of the next head
      m_block_ = m_begin;
    }
  }

  __device__ __forceinline__ void issue_slab(float (&acc_dq)[kTilesSlab][4], int slab) {
    using sm90::Descriptor;
    const auto ds = Descriptor::mn_major(smem_.ds[0]).template tile<ScoreTile>(at_.stage);
    const auto other_ds =
        Descriptor::mn_major(smem_.other_ds[0]).template tile<ScoreTile>(at_.stage);
    const auto k = Descriptor::mn_major(smem_.k).template tile<ScoreTile>(2 * rank() + slab);
    const auto other_k = Descriptor::mn_major(smem_.other_k).template tile<ScoreTile>(slab);
    float* const accum = finished_address(1 - slab);
#pragma unroll
    for (int n = 0; n < kTilesSlab; ++n) {
      add_finished(accum, n);
      const bool is_own = n < kTilesSlab / 2;
      const int offset = n % (kTilesSlab / 2) * sm90::kWgmmaK * sm90::kSlabRowBytes;
      ptx::wgmma_fence();
      ptx::Wgmma<Element, sm90::kSlabCols>::template ss<ptx::Major::kMN, ptx::Major::kMN>(
          acc_dq, (is_own ? ds : other_ds).at(offset), (is_own ? k : other_k).at(offset), n > 0);
    }
    ptx::wgmma_commit_group();
  }

  __device__ __forceinline__ void keep(const float (&acc_dq)[kTilesSlab][4]) {
#pragma unroll
    for (int n = 0; n < kTilesSlab; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) finished_[n][i] = ptx::wgmma_detach(acc_dq[n][i]);
    }
  }

  // Where this thread's part of the finished slab is added.
  __device__ __forceinline__ float* finished_address(int slab) const {
    if (p_.dq_accum == nullptr || block_ == kNone) return nullptr;
    constexpr int kHeadDim = Config::kHeadDim;
    return p_.dq_accum + int64_t{block_} * (Config::kBlockM * kHeadDim) +
           dq_accum_offset<kHeadDim>(0, (2 * rank() + slab) * kTilesSlab, threadIdx.x % 128);
  }
  __device__ __forceinline__ void add_finished(float* accum, int n) const {
    if (accum == nullptr) return;
    const float (&x)[4] = finished_[n];
    ptx::red_add_v4(accum + dq_accum_offset<Config::kHeadDim>(0, n, 0), x[0], x[1], x[2], x[3]);
  }

  __device__ __forceinline__ void release_ds() const {
    if (lane_idx_ > 0) return;
    ptx::Mbarrier& empty = smem_.ds_barriers.empty[at_.stage];
    ptx::mbarrier_arrive(empty);
    // What was sent has been read.
    ptx::mbarrier_arrive_cluster_relaxed(ptx::cluster_smem_addr(&empty, 1 - rank()));
  }

  // What the rounded dS of two query rows sums to over this thread block's keys. A warp reads its
  // 16 query rows, each lane a quarter of the keys, in an order without bank conflicts.
  __device__ __forceinline__ float2 sum_rows() const {
    const int col = threadIdx.x / 32 % 4 * 16 + lane_idx_ % 8 * 2;
    const uint32_t base = ptx::smem_addr(smem_.ds[at_.stage].data) + col % 8 * sizeof(Element);
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int key = i / 2 * 8 + lane_idx_ / 8 * 2 + i % 2;
      const float2 x =
          unpack<Element>(ptx::ld_shared_b32(base + ScoreTile::chunk_offset(key, col)));
      sum.x += x.x;
      sum.y += x.y;
    }
#pragma unroll
    for (int offset = 8; offset < 32; offset *= 2) {
      sum.x += __shfl_xor_sync(0xffffffffu, sum.x, offset);
      sum.y += __shfl_xor_sync(0xffffffffu, sum.y, offset);
    }
    return sum;
  }

  // Of the two thread blocks each has its own sums, lest their order matter.
  __device__ __forceinline__ void add_row_sums(float2 sums) const {
    if (p_.dq_accum == nullptr || lane_idx_ >= 8) return;
    const int row = threadIdx.x / 32 % 4 * 16 + lane_idx_ * 2;
    ptx::red_add_v2(
        p_.dq_row_sum + int64_t{block_} * (2 * Config::kBlockM) + (rank() * Config::kBlockM + row),
        sums.x, sums.y);
  }

  // Deterministic gradients: the key blocks of a query block add in order, each warp for itself.
  __device__ __forceinline__ void await_turn() const {
    if (p_.dq_turns == nullptr) return;
    if (lane_idx_ == 0) {
      const int earlier_warps = tile().key0 / Config::kBlockN * kWarps;
      while (ptx::load_acquire(turn()) < earlier_warps) {
      }
    }
    __syncwarp();
  }
  __device__ __forceinline__ void pass_turn() const {
    if (p_.dq_turns == nullptr || block_ == kNone) return;
    __syncwarp();
    if (lane_idx_ == 0) ptx::add_release(turn(), 1);
  }
  __device__ __forceinline__ int* turn() const {
    return p_.dq_turns + int64_t{block_} * 2 + static_cast<unsigned>(rank());
  }

  // Which half of dQ's columns is this thread block's.
  static __device__ __forceinline__ int rank() { return ptx::cluster_block_rank(); }

  SharedStorage& smem_;
  const KernelParams& p_;
  const int lane_idx_;
  sm90::RingPosition<Config::kStages> at_;  // of the block's dS
  int round_;
  int m_block_, block_;            // of the finished slab, in its head and row_block()
  float finished_[kTilesSlab][4];  // not yet added to memory
};

}  // namespace flash_ext::v3::backward
