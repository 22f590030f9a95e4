// A consumer warpgroup: 64 keys, all queries that see them, one tile after another.
#pragma once

#include "ptx/stmatrix.cuh"
#include "ptx/tma.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/store_rows.cuh"
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
        k_centred_desc_(sm90::Descriptor::mn_major(smem.k_centred)) {}

  __device__ __forceinline__ void run() {
    Tile tile = p_.schedule.tile(0);
    for (int round = 1; tile.is_valid; ++round) {
      compute(tile);
      store(tile);
      tile = p_.schedule.tile(round);
    }
  }

 private:
  struct Step {
    int m_block;
    int head_idx;
    int key0;  // of this warpgroup
    int batch_idx;
    bool is_first, is_last;  // of the tile
  };

  __device__ __forceinline__ void compute(const Tile& tile) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc_dk_[n][i] = acc_dv_[n][i] = 0.f;
    }
    const BlockRange blocks = query_blocks(p_.mask, tile.n_block * kBlockN, kBlockM);
    if (blocks.begin >= blocks.end) return;
    const int steps = (blocks.end - blocks.begin) * p_.group_size;
    Step step{blocks.begin, tile.kv_head_idx * p_.group_size,
              tile.n_block * kBlockN + 64 * warpgroup_idx_, tile.batch_idx, true, false};
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      step.is_first = i == 0;
      step.is_last = i == steps - 1;
      compute(step);
      if (++step.m_block == blocks.end) {
        step.m_block = blocks.begin;
        ++step.head_idx;
      }
    }
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

    ptx::wgmma_wait_group<1>();
    if (step.is_last && lane_idx_ == 0) ptx::mbarrier_arrive(smem_.k_barriers.empty[0]);
    compute_p(acc_s, step);
    pack_operand<Element>(frag_p, acc_s);
    if (Config::kEarlyDv) {
      issue_dv(frag_p);
      ptx::wgmma_wait_group<1>();
    } else {
      ptx::wgmma_wait_group<0>();
    }
    if (step.is_last && lane_idx_ == 0) ptx::mbarrier_arrive(smem_.v_barriers.empty[0]);
    compute_ds(acc_dp, acc_s, smem_.delta[at_.stage] + lane_idx_ % 4 * 2);
    pack_operand<Element>(frag_ds, acc_dp);

    const int buffer = owner_;
    const bool wants_dq = p_.dq_accum != nullptr;
    const bool owns_dq = owner_ == warpgroup_idx_;
    if (wants_dq) {
      store_ds(frag_ds, buffer);
      if (!owns_dq) ptx::named_barrier_arrive(1 + owner_, 256);
    }
    if (!Config::kEarlyDv) issue_dv(frag_p);
    ptx::wgmma_fence();
    sm90::gemm_ab<QTile>(acc_dk_, frag_ds, q_rows_desc_.template tile<QTile>(at_.stage), true);
    ptx::wgmma_wait_group<0>();
    if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.query_barriers.empty[at_.stage]);
    if (wants_dq && owns_dq) {
      ptx::named_barrier_sync(1 + owner_, 256);
      compute_dq(buffer);
    }
    owner_ ^= 1;
    dq_at_.advance();
    at_.advance();
  }

  __device__ __forceinline__ void issue_dv(const uint32_t (&frag_p)[kTilesM / 2][4]) {
    ptx::wgmma_fence();
    sm90::gemm_ab<QTile>(acc_dv_, frag_p, dout_rows_desc_.template tile<QTile>(at_.stage), true);
  }

  __device__ __forceinline__ void compute_p(float (&acc_s)[kTilesM][4], const Step& step) {
    const int row0 = step.m_block * kBlockM;
    const int col = lane_idx_ % 4 * 2;
    if (!block_is_full(p_.mask, row0, step.key0, 64)) {
      mask_scores(acc_s, p_.mask, p_.scale.negate, step.key0 + 16 * warp_idx_ + lane_idx_ / 4,
                  row0 + col);
    }
    const auto& statistics = smem_.statistics[at_.stage];
    if (statistics.has_huge[0]) {
      const int64_t head_row = int64_t{step.batch_idx} * p_.heads_q + step.head_idx;
      recompute_p_huge(acc_s, statistics.lse_log2 + col,
                       p_.lse + head_row * p_.mask.seqlen_q + row0 + col, signed_scale_log2_,
                       p_.scale.negate ? -p_.scale.natural : p_.scale.natural);
    } else {
      recompute_p(acc_s, statistics.lse_log2 + col, signed_scale_log2_);
    }
  }

  // Transposed: a row of the tile is a query.
  __device__ __forceinline__ void store_ds(const uint32_t (&frag_ds)[kTilesM / 2][4], int buffer) {
    // Lane l names row l % 8 of matrix l / 8: the first and the next eight keys, then the next
    // eight queries.
    const int row = (lane_idx_ / 16) * 8 + lane_idx_ % 8;
    const int col = 64 * warpgroup_idx_ + 16 * warp_idx_ + (lane_idx_ / 8 % 2) * 8;
    const uint32_t base = ptx::smem_addr(smem_.ds[buffer].data) + DsTile::chunk_offset(row, col);
#pragma unroll
    for (int m = 0; m < kBlockM / 16; ++m) {
      ptx::stmatrix_x4_trans(base + m * 16 * sm90::kSlabRowBytes, frag_ds[m][0], frag_ds[m][1],
                             frag_ds[m][2], frag_ds[m][3]);
    }
    ptx::fence_proxy_async();
  }

  __device__ __forceinline__ void compute_dq(int buffer) {
    constexpr int kParts = kBlockM / 64;
    float acc_dq[kParts][kHeadDim / 8][4];
    sm90::wait_full(smem_.k_centred_barriers, kv_at_);
    ptx::wgmma_fence();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      sm90::gemm_ab<DsTile, KVTile>(acc_dq[part],
                                    ds_desc_.template tile<DsTile>(buffer).from_row(64 * part),
                                    k_centred_desc_);
    }
    ptx::wgmma_wait_group<0>();
    sm90::wait_empty(smem_.dq_barriers, dq_at_);
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

  __device__ __forceinline__ void store(const Tile& tile) {
    const int row0 = tile.n_block * kBlockN + 64 * warpgroup_idx_ + 16 * warp_idx_;
    store(p_.dv, acc_dv_, 1.f, tile, row0);
    store(p_.dk, acc_dk_, p_.softmax_scale, tile, row0);
  }
  __device__ __forceinline__ void store(const TensorView& to, const float (&acc)[kHeadDim / 8][4],
                                        float factor, const Tile& tile, int row0) {
    if (to.data == nullptr) return;
    Element* rows = static_cast<Element*>(to.data) + tile.batch_idx * to.batch_stride +
                    tile.kv_head_idx * to.head_stride + row0 * to.row_stride;
    sm90::store_rows(rows, to.row_stride, p_.mask.seqlen_k - row0, p_.head_dim, acc, factor,
                     lane_idx_);
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
  sm90::RingPosition<1> kv_at_, dq_at_;
  int owner_ = 0;  // of the step's dQ, and the buffer of its dS

  float acc_dk_[kHeadDim / 8][4];
  float acc_dv_[kHeadDim / 8][4];
};

}  // namespace flash_ext::v3::backward
