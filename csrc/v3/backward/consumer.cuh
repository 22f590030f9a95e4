// A consumer warpgroup: 64 keys, all queries that see them, one tile after another.
#pragma once

#include <type_traits>

#include "ptx/global_counter.cuh"
#include "ptx/reduction.cuh"
#include "ptx/stmatrix.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/copy_tile.cuh"
#include "sm90/warpgroup_gemm.cuh"
#include "v3/backward/config.cuh"
#include "v3/backward/scores.cuh"

namespace flash_ext::v3::backward {

template <typename Config>
class Consumer {
  using Element = typename Config::Element;
  using QTile = typename Config::QTile;
  using KVTile = typename Config::KVTile;
  using DsTile = typename Config::DsTile;
  using SharedStorage = typename Config::SharedStorage;
  static constexpr int kBlockM = Config::kBlockM;
  static constexpr int kBlockN = Config::kBlockN;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kTilesM = kBlockM / 8;  // of eight columns
  static constexpr int kDqTiles = kHeadDim / 8 / (Config::kSharesDq ? Config::kConsumers : 1);
  using KSlab = sm90::SmemTile<Element, kBlockN, sm90::kSlabCols>;

 public:
  __device__ __forceinline__ Consumer(SharedStorage& smem, const KernelParams& params,
                                      int warpgroup_idx)
      : smem_(smem),
        p_(params),
        warpgroup_idx_(warpgroup_idx),
        warp_idx_(threadIdx.x / 32 % 4),
        lane_idx_(threadIdx.x % 32),
        signed_scale_log2_(params.scale.negate ? -params.scale.log2 : params.scale.log2),
        k_desc_(sm90::Descriptor::k_major(smem.k).from_row(64 * warpgroup_idx)),
        v_desc_(sm90::Descriptor::k_major(smem.v).from_row(64 * warpgroup_idx)),
        q_desc_(sm90::Descriptor::k_major(smem.q[0])),
        dout_desc_(sm90::Descriptor::k_major(smem.dout[0])),
        q_rows_desc_(sm90::Descriptor::mn_major(smem.q[0])),
        dout_rows_desc_(sm90::Descriptor::mn_major(smem.dout[0])),
        ds_desc_(sm90::Descriptor::k_major(smem.ds[0])),
        k_centred_desc_(
            Config::kSharesDq
                ? sm90::Descriptor::mn_major(smem.k_centred).template tile<KSlab>(warpgroup_idx)
                : sm90::Descriptor::mn_major(smem.k_centred)) {}

  __device__ __forceinline__ void run() {
    for (;; tile_at_.advance()) {
      sm90::wait_full(smem_.tile_barriers, tile_at_);
      if (!ptx::warp_uniform(tile().is_valid)) break;
      compute_tile();
      if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.tile_barriers.empty[tile_at_.stage]);
      stage_gradient(acc_dv_, 1.f);
      holds_dk_ = true;
    }
    stage_dk();
  }

 private:
  __device__ __forceinline__ const TileWork& tile() const { return smem_.tile[tile_at_.stage]; }

  struct Step {
    int row0;                // of the query block
    int key0;                // of this warpgroup
    int first_full_row;      // query blocks from here on see all its keys
    bool is_first, is_last;  // of the tile
  };

  __device__ __forceinline__ void compute_tile() {
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
    const int first_full_row =
        key0 + 64 <= p_.mask.seqlen_k ? p_.mask.row_begin(key0 + 63) : p_.mask.seqlen_q;
    Step step{first_row, key0, first_full_row, true, false};
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      step.is_first = i == 0;
      step.is_last = i == steps - 1;
      compute(step);
      step.row0 += kBlockM;
      if (step.row0 >= p_.mask.seqlen_q) step.row0 = first_row;  // of the next head
    }
    pass_turn();
    if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.k_centred_barriers.empty[0]);
    kv_at_.advance();
  }

  __device__ __forceinline__ void compute(const Step& step) {
    float acc_s[kTilesM][4], acc_dp[kTilesM][4];
    uint32_t frag_p[kTilesM / 2][4], frag_ds[kTilesM / 2][4];
    sm90::wait_full(smem_.query_barriers, at_);
    if (step.is_first) sm90::wait_full(smem_.k_barriers, kv_at_);
    ptx::wgmma_fence();
    sm90::gemm_abt<KVTile, QTile>(acc_s, k_desc_, q_desc_.template tile<QTile>(at_.stage));
    if (step.is_first) sm90::wait_full(smem_.v_barriers, kv_at_);
    ptx::wgmma_fence();
    sm90::gemm_abt<KVTile, QTile>(acc_dp, v_desc_, dout_desc_.template tile<QTile>(at_.stage));

    if (step.is_first) centre_keys();
    const auto& statistics = smem_.statistics[at_.stage];
    const bool is_plain = step.row0 >= step.first_full_row && statistics.has_huge == 0;
    float* const dq_accum =
        p_.dq_accum + int64_t{statistics.row_block} * (kBlockM * kHeadDim) + dq_offset();
    ptx::wgmma_wait_group<1>();
    if (step.is_last && lane_idx_ == 0) ptx::mbarrier_arrive(smem_.k_barriers.empty[0]);
    if (!is_plain) adjust_scores(acc_s, step);
    recompute_p(acc_s, statistics.lse_log2 + first_col(), signed_scale_log2_);
    sm90::pack_operand<Element>(frag_p, acc_s);
    ptx::wgmma_wait_group<0>();
    if (step.is_last && lane_idx_ == 0) ptx::mbarrier_arrive(smem_.v_barriers.empty[0]);
    compute_ds(acc_dp, acc_s, smem_.delta[at_.stage] + first_col());
    sm90::pack_operand<Element>(frag_ds, acc_dp);
    store_ds(frag_ds);
    if (step.is_first) stage_dk();  // of the tile before

    if constexpr (Config::kSharesDq) {
      float acc_dq[kDqTiles][4];
      issue_dv(frag_p);
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(1, 256);  // dS is complete
      if (step.is_first) sm90::wait_full(smem_.k_centred_barriers, kv_at_);
      ptx::wgmma_fence();
      sm90::gemm_ab<DsTile, KSlab>(acc_dq, ds_desc_.template tile<DsTile>(at_.stage),
                                   k_centred_desc_);
      issue_dk(frag_ds, step);
      pass_turn();
      await_turn(statistics.row_block);
      ptx::wgmma_wait_group<1>();
      if (p_.dq_accum != nullptr) {
#pragma unroll
        for (int n = 0; n < kDqTiles; ++n) {
          const float (&x)[4] = acc_dq[n];
          ptx::red_add_v4(dq_accum + dq_accum_offset<kHeadDim>(0, n, 0), x[0], x[1], x[2], x[3]);
        }
      }
      ptx::wgmma_wait_group<0>();
      release_queries();
    } else {
      const int owner = at_.stage;  // of this step's dQ
      ptx::fence_proxy_async();
      if (owner != warpgroup_idx_) ptx::named_barrier_arrive(1 + owner, 256);
      issue_dv(frag_p);
      issue_dk(frag_ds, step);
      ptx::wgmma_wait_group<0>();
      release_queries();
      if (owner == warpgroup_idx_) {
        ptx::named_barrier_sync(1 + owner, 256);  // dS is complete
        compute_dq();
      }
    }
    at_.advance();
  }

  // Where this thread's share of a block of dQ begins.
  __device__ __forceinline__ int dq_offset() const {
    const int first = Config::kSharesDq ? warpgroup_idx_ * kDqTiles : 0;
    return dq_accum_offset<kHeadDim>(0, first, threadIdx.x % 128);
  }

  // Deterministic gradients: key blocks add in order, a warp at a time. The turn is passed on a
  // step later, when the additions are done and their completion need not be waited for.
  __device__ __forceinline__ void await_turn(int row_block) {
    if (!Config::kIsDeterministic) return;
    if (lane_idx_ == 0) {
      const int earlier_turns = tile().n_block * (4 * Config::kConsumers);
      while (ptx::load_acquire(p_.dq_turns + 2 * int64_t{row_block}) < earlier_turns) {
      }
    }
    added_block_ = row_block;
    __syncwarp();
  }
  __device__ __forceinline__ void pass_turn() {
    if (!Config::kIsDeterministic || added_block_ < 0) return;
    __syncwarp();
    if (lane_idx_ == 0) ptx::add_release(p_.dq_turns + 2 * int64_t{added_block_}, 1);
    added_block_ = -1;
  }

  __device__ __forceinline__ void release_queries() {
    if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.query_barriers.empty[at_.stage]);
  }

  __device__ __forceinline__ void issue_dv(const uint32_t (&frag_p)[kTilesM / 2][4]) {
    ptx::wgmma_fence();
    sm90::gemm_ab<QTile>(acc_dv_, frag_p, dout_rows_desc_.template tile<QTile>(at_.stage), true);
  }
  __device__ __forceinline__ void issue_dk(const uint32_t (&frag_ds)[kTilesM / 2][4],
                                           const Step& step) {
    ptx::wgmma_fence();
    sm90::gemm_ab<QTile>(acc_dk_, frag_ds, q_rows_desc_.template tile<QTile>(at_.stage),
                         !step.is_first);
  }

  // This warpgroup's rows of K, minus the mean of the head's keys. From that dQ = dS K is computed:
  // exactly, a row of dS sums to 0 (or to dL, see the postprocess kernel); rounded it does not, and
  // the remainder times a large mean of K is an error of 10 to 50% in dQ on biased keys.
  __device__ __forceinline__ void centre_keys() {
    using Pair = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;
    const int thread_idx = threadIdx.x % 128;
    sm90::wait_empty(smem_.k_centred_barriers, kv_at_);
#pragma unroll
    for (int slab = 0; slab < KVTile::kSlabs; ++slab) {
      const int col = slab * sm90::kSlabCols + thread_idx % 8 * 8;
      Pair m[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 mean = *reinterpret_cast<const float2*>(&smem_.key_mean[col + 2 * i]);
        const uint32_t bits = pack<Element>(mean.x, mean.y);
        m[i] = reinterpret_cast<const Pair&>(bits);
      }
#pragma unroll
      for (int row = 0; row < 64; row += 16) {
        const int offset = KVTile::chunk_offset(64 * warpgroup_idx_ + row + thread_idx / 8, col);
        uint4 bits = *reinterpret_cast<const uint4*>(smem_.k.data + offset);
        auto* x = reinterpret_cast<Pair*>(&bits);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = __hsub2(x[i], m[i]);
        *reinterpret_cast<uint4*>(smem_.k_centred.data + offset) = bits;
      }
    }
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.k_centred_barriers.full[0]);
  }

  // This thread's first column of S^T, first query of the block.
  __device__ __forceinline__ int first_col() const { return lane_idx_ % 4 * 2; }

  // The few scores that need more than recompute_p(), in one branch: it then schedules better.
  __device__ __forceinline__ void adjust_scores(float (&acc_s)[kTilesM][4], const Step& step) {
    const int row = step.row0 + first_col();
    mask_scores(acc_s, p_.mask, p_.scale.negate, step.key0 + 16 * warp_idx_ + lane_idx_ / 4, row);
    const auto& statistics = smem_.statistics[at_.stage];
    if (!statistics.has_huge) return;
    const float* lse = p_.lse + int64_t{statistics.batch_head} * p_.mask.seqlen_q + row;
    subtract_huge_lse(acc_s, lse, p_.mask.seqlen_q - row, signed_scale_log2_,
                      p_.scale.negate ? -p_.scale.natural : p_.scale.natural);
  }

  // Transposed: a row of the tile is a query.
  __device__ __forceinline__ void store_ds(const uint32_t (&frag_ds)[kTilesM / 2][4]) {
    // Lane l names row l % 8 of matrix l / 8: the first and the next eight keys, then the next
    // eight queries.
    const int row = (lane_idx_ / 16) * 8 + lane_idx_ % 8;
    const int col = 64 * warpgroup_idx_ + 16 * warp_idx_ + (lane_idx_ / 8 % 2) * 8;
    const uint32_t base = ptx::smem_addr(smem_.ds[at_.stage].data) + DsTile::chunk_offset(row, col);
#pragma unroll
    for (int m = 0; m < kBlockM / 16; ++m) {
      ptx::stmatrix_x4_trans(base + m * 16 * sm90::kSlabRowBytes, frag_ds[m][0], frag_ds[m][1],
                             frag_ds[m][2], frag_ds[m][3]);
    }
  }

  __device__ __forceinline__ void compute_dq() {
    constexpr int kParts = kBlockM / 64;
    float acc_dq[kParts][kHeadDim / 8][4];
    sm90::wait_full(smem_.k_centred_barriers, kv_at_);
    ptx::wgmma_fence();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      sm90::gemm_ab<DsTile, KVTile>(acc_dq[part],
                                    ds_desc_.template tile<DsTile>(at_.stage).from_row(64 * part),
                                    k_centred_desc_);
    }
    ptx::wgmma_wait_group<0>();
    ptx::mbarrier_wait(smem_.dq_barriers.empty[0], at_.stage ^ 1);  // one phase a step
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        const float (&x)[4] = acc_dq[part][n];
        *reinterpret_cast<float4*>(
            &smem_.dq[dq_accum_offset<kHeadDim>(part, n, threadIdx.x % 128)]) =
            make_float4(x[0], x[1], x[2], x[3]);
      }
    }
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.dq_barriers.full[0]);
  }

  // Leaves a gradient in shared memory, to be sent off. There is room for one, so that dK waits in
  // its registers until the next tile needs these.
  __device__ __forceinline__ void stage_gradient(const float (&acc)[kHeadDim / 8][4],
                                                 float factor) {
    sm90::wait_empty(smem_.gradient_barriers, gradient_at_);
    sm90::store_accumulator(smem_.gradient[warpgroup_idx_], acc, {factor, factor}, 16 * warp_idx_,
                            lane_idx_);
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.gradient_barriers.full[0]);
    gradient_at_.advance();
  }
  __device__ __forceinline__ void stage_dk() {
    if (holds_dk_) stage_gradient(acc_dk_, p_.softmax_scale);
    holds_dk_ = false;
  }

  static __device__ __forceinline__ void clear(float (&acc)[kHeadDim / 8][4]) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] = 0.f;
    }
  }

  SharedStorage& smem_;
  const KernelParams& p_;
  const int warpgroup_idx_;
  const int warp_idx_;
  const int lane_idx_;
  const float signed_scale_log2_;
  const sm90::Descriptor k_desc_, v_desc_, q_desc_, dout_desc_, q_rows_desc_, dout_rows_desc_,
      ds_desc_, k_centred_desc_;
  sm90::RingPosition<Config::kStages> at_;
  sm90::RingPosition<2> tile_at_;
  sm90::RingPosition<1> gradient_at_;
  bool holds_dk_ = false;
  int added_block_ = -1;  // whose turn is to be passed on
  sm90::RingPosition<1> kv_at_;

  float acc_dk_[kHeadDim / 8][4];
  float acc_dv_[kHeadDim / 8][4];
};

}  // namespace flash_ext::v3::backward
