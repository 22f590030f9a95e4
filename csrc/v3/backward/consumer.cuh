// A consumer warpgroup: 64 keys, all queries that see them, one tile after another.
#pragma once

#include <type_traits>

#include "ptx/stmatrix.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/copy_tile.cuh"
#include "sm90/warpgroup_gemm.cuh"
#include "v3/backward/centre_keys.cuh"
#include "v3/backward/config.cuh"
#include "v3/backward/dropout.cuh"
#include "v3/backward/general_scores.cuh"
#include "v3/backward/scores.cuh"

namespace flash_ext::v3::backward {

template <typename Config>
class Consumer {
  using Element = typename Config::Element;
  using QTile = typename Config::QTile;
  using KVTile = typename Config::KVTile;
  using DsTile = typename Config::DsTile;
  using SharedStorage = typename Config::SharedStorage;
  using Params = typename Config::Params;
  using Scores = typename Config::Scores;
  static constexpr int kBlockM = Config::kBlockM;
  static constexpr int kBlockN = Config::kBlockN;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr MaskKind kMask = Scores::kMask;
  using Kept = KeptElements<Scores::kHasDropout ? kBlockM / 8 : 0>;
  template <int kSteps>
  using Rows = sm90::SmemTile<Element, 16 * kSteps, kHeadDim>;  // of a QTile

 public:
  __device__ __forceinline__ Consumer(SharedStorage& smem, const Params& params, int warpgroup_idx)
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
  __device__ __forceinline__ const TileWork& tile() const { return smem_.tile[tile_at_.stage]; }

  struct Step {
    int row0;            // of the query block
    int key0;            // of this warpgroup
    int first_full_row;  // query blocks from here on see all its keys; plain kernels only
    bool is_last;        // of the tile
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
    const auto& mask = mask_of(p_);
    const int first_full_row =
        key0 + 64 <= mask.seqlen_k ? mask.row_begin(key0 + 63) : mask.seqlen_q;
    Step step{first_row, key0, first_full_row, steps == 1};
    Kept kept_of_second;
    if constexpr (Scores::kHasDropout) {
      const int first_head = ptx::warp_uniform(tile().batch_idx) * p_.heads_q +
                             ptx::warp_uniform(tile().kv_head_idx) * p_.group_size;
      kept_of_second = dropout_draws(key0).first_two(kept_, first_head);
    }
    const int hidden_rows = mask.row_begin(key0) - first_row;
    constexpr int kHalf = kBlockM > 64 ? kBlockM / 2 : 0;
    if (hidden_rows >= kBlockM) {
      skip_first(step.is_last);
    } else if (kHalf > 0 && hidden_rows >= kHalf) {
      compute</*kIsFirst=*/true, kHalf>(step);
    } else {
      compute</*kIsFirst=*/true>(step);
    }
    if constexpr (Scores::kHasDropout) kept_ = kept_of_second;
#pragma unroll 1
    for (int i = 1; i < steps; ++i) {
      step.row0 += kBlockM;
      if (step.row0 >= past_last_row()) step.row0 = first_row;  // of the next head
      step.is_last = i == steps - 1;
      compute</*kIsFirst=*/false>(step);
    }
    if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.k_centred_barriers.empty[0]);
    kv_at_.advance();
  }

  // Whether the step's queries see all keys of the warpgroup. Those beyond the last have weights
  // of 0 without masking. A window has two limits, which are not kept: no register is free.
  __device__ __forceinline__ bool is_full(const Step& step) const {
    if constexpr (!Config::kIsGeneral) return step.row0 >= step.first_full_row;
    const auto& mask = mask_of(p_);
    if (step.key0 + 64 > mask.seqlen_k || step.row0 < mask.row_begin(step.key0 + 63)) return false;
    return min(step.row0 + kBlockM, mask.seqlen_q) <= mask.row_end(step.key0);
  }

  // Of the steps of a head.
  __device__ __forceinline__ int past_last_row() const {
    if constexpr (Config::kIsGeneral) return ptx::warp_uniform(tile().m_end) * kBlockM;
    return p_.mask.seqlen_q;
  }

  // The first step is code of its own: what it alone has to do lies in nobody else's way. The rows
  // before kFirstRow are hidden, and not computed.
  template <bool kIsFirst, int kFirstRow = 0>
  __device__ __forceinline__ void compute(const Step& step) {
    constexpr int kRows = kBlockM - kFirstRow;
    float acc_s[kRows / 8][4], acc_dp[kRows / 8][4];
    uint32_t frag_p[kRows / 16][4], frag_ds[kRows / 16][4];
    sm90::wait_full(smem_.query_barriers, at_);
    if (kIsFirst) sm90::wait_full(smem_.k_barriers, kv_at_);
    ptx::wgmma_fence();
    sm90::gemm_abt<KVTile, QTile, kRows>(
        acc_s, k_desc_, q_desc_.template tile<QTile>(at_.stage).from_row(kFirstRow));
    if (kIsFirst) load_v();
    ptx::wgmma_fence();
    sm90::gemm_abt<KVTile, QTile, kRows>(
        acc_dp, frag_v_, v_desc_, dout_desc_.template tile<QTile>(at_.stage).from_row(kFirstRow));

    if (kIsFirst) centre_keys();
    SeenElements<kMask == MaskKind::kBool ? kRows / 8 : 0> seen;
    if constexpr (kMask == MaskKind::kBool) seen = read_bool_mask_tile<kRows / 8>(kFirstRow);
    const auto& statistics = smem_.statistics[at_.stage];
    const bool is_plain = is_full(step) && statistics.has_huge == 0;
    ptx::wgmma_wait_group<1>();
    if (step.is_last && lane_idx_ == 0) ptx::mbarrier_arrive(smem_.k_barriers.empty[0]);
    const float* const lse_log2 = statistics.lse_log2 + kFirstRow + first_col();
    const float* const delta = smem_.delta[at_.stage] + kFirstRow + first_col();
    const int row0 = step.row0 + kFirstRow;
    const float distance = first_distance(row0, step.key0);
    if constexpr (kMask == MaskKind::kBool) hide_unseen(acc_s, seen, p_.scale.negate);
    if constexpr (kMask == MaskKind::kFloat) {
      await_mask();
      add_mask(acc_s, smem_.ds[at_.stage], kFirstRow, 64 * warpgroup_idx_ + 16 * warp_idx_,
               p_.mask_factor, lane_idx_);
    }
    if constexpr (Scores::kHasSoftcap) {
      apply_tanh(acc_s, p_.tanh_exponent);
      if (!is_plain) hide_scores(acc_s, p_.band, kHiddenTanh, own_key(step.key0), own_row(row0));
    } else {
      if constexpr (Scores::kHasAlibi) add_alibi(acc_s, statistics.slope, distance);
      if (!is_plain) adjust_scores(acc_s, row0, step.key0);
      recompute_p(acc_s, lse_log2, signed_scale_log2_);
      if constexpr (Scores::kHasDropout) mark_dropped(acc_s, kept_, kFirstRow / 8);
      pack_weights<Element, Scores::kHasDropout>(frag_p, acc_s);
    }
    ptx::wgmma_wait_group<0>();
    if (step.is_last && lane_idx_ == 0) ptx::mbarrier_arrive(smem_.v_barriers.empty[0]);
    if constexpr (Scores::kHasSoftcap) {
      compute_capped_p_ds<Scores::kHasAlibi>(acc_s, acc_dp, lse_log2, delta, p_.scale.log2,
                                             statistics.slope, distance);
      sm90::pack_operand<Element>(frag_p, acc_s);
    } else {
      compute_ds<Scores::kHasDropout>(acc_dp, acc_s, delta);
      if constexpr (kMask == MaskKind::kFloat) {
        if (p_.dmask.data != nullptr) {
          const int batch_idx = ptx::warp_uniform(tile().batch_idx);
          const int head_idx = statistics.batch_head - batch_idx * p_.heads_q;
          add_dmask(p_.dmask, acc_dp, batch_idx, head_idx, own_row(row0), own_key(step.key0),
                    p_.band.seqlen_q, p_.band.seqlen_k);
        }
      }
    }
    sm90::pack_operand<Element>(frag_ds, acc_dp);
    if (kIsFirst) await_gradient_sent();  // dV lies there
    await_mask_read();
    if constexpr (kFirstRow > 0) {
      const uint32_t zeros[kFirstRow / 16][4] = {};
      store_ds(zeros, 0);
    }
    store_ds(frag_ds, kFirstRow);
    if (kIsFirst) stage_dk();  // of the tile before

    announce_ds();
    issue_dv(frag_p, kFirstRow);
    issue_dk(frag_ds, kFirstRow, !kIsFirst);
    if constexpr (Scores::kHasDropout && !kIsFirst) {
      if (!step.is_last) {
        kept_ = dropout_draws(step.key0).after(step.row0, statistics.batch_head);
      }
    }
    ptx::wgmma_wait_group<0>();
    finish_step(kIsFirst);
  }

  // The first step of a tile, in which no query sees this warpgroup's keys: dS = 0.
  __device__ __forceinline__ void skip_first(bool is_last) {
    sm90::wait_full(smem_.query_barriers, at_);
    sm90::wait_full(smem_.k_barriers, kv_at_);
    load_v();
    centre_keys();
    if (is_last && lane_idx_ == 0) {
      ptx::mbarrier_arrive(smem_.k_barriers.empty[0]);
      ptx::mbarrier_arrive(smem_.v_barriers.empty[0]);
    }
    const uint32_t frag_ds[kBlockM / 16][4] = {};
    await_gradient_sent();
    if constexpr (Config::kHasMask) await_mask();
    if constexpr (kMask == MaskKind::kBool) arrive_mask_read();
    await_mask_read();
    store_ds(frag_ds, 0);
    stage_dk();
    clear(acc_dk_);
    announce_ds();
    finish_step(/*is_first=*/true);
  }

  // The warpgroups compute the dQ of the steps in turns.
  __device__ __forceinline__ bool owns_dq() const { return at_.stage == warpgroup_idx_; }

  __device__ __forceinline__ void announce_ds() {
    ptx::fence_proxy_async();
    if (!owns_dq()) ptx::named_barrier_arrive(1 + at_.stage, 256);
  }

  __device__ __forceinline__ void finish_step(bool is_first) {
    if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.query_barriers.empty[at_.stage]);
    if (owns_dq()) {
      ptx::named_barrier_sync(1 + at_.stage, 256);  // dS is complete
      compute_dq(is_first);
    }
    at_.advance();
  }

  __device__ __forceinline__ void load_v() {
    sm90::wait_full(smem_.v_barriers, kv_at_);
    sm90::load_operand(frag_v_, smem_.v, 64 * warpgroup_idx_ + 16 * warp_idx_, lane_idx_);
  }

  // From the block's rows `first_row`.. on.
  template <int kSteps>
  __device__ __forceinline__ void issue_dv(const uint32_t (&frag_p)[kSteps][4], int first_row) {
    const auto dout = dout_rows_desc_.template tile<QTile>(at_.stage).from_row(first_row);
    ptx::wgmma_fence();
    sm90::gemm_ab<Rows<kSteps>>(acc_dv_, frag_p, dout, true);
  }
  template <int kSteps>
  __device__ __forceinline__ void issue_dk(const uint32_t (&frag_ds)[kSteps][4], int first_row,
                                           bool accumulates) {
    const auto q = q_rows_desc_.template tile<QTile>(at_.stage).from_row(first_row);
    ptx::wgmma_fence();
    sm90::gemm_ab<Rows<kSteps>>(acc_dk_, frag_ds, q, accumulates);
  }

  __device__ __forceinline__ void centre_keys() {
    sm90::wait_empty(smem_.k_centred_barriers, kv_at_);
    centre_rows<KVTile>(smem_.k_centred, smem_.k, smem_.key_mean, 64 * warpgroup_idx_);
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.k_centred_barriers.full[0]);
  }

  // The first query and the first key of this thread, from those of the warpgroup.
  __device__ __forceinline__ int own_row(int row0) const { return row0 + first_col(); }
  __device__ __forceinline__ int own_key(int key0) const {
    return key0 + 16 * warp_idx_ + lane_idx_ / 4;
  }

  // Of that query from that key along the diagonal, for ALiBi.
  __device__ __forceinline__ float first_distance(int row0, int key0) const {
    if constexpr (!Scores::kHasAlibi)
      return 0.f;
    else
      return static_cast<float>(own_row(row0) + p_.band.diagonal - own_key(key0));
  }

  // This thread's first column of S^T, first query of the block.
  __device__ __forceinline__ int first_col() const { return lane_idx_ % 4 * 2; }

  __device__ __forceinline__ DropoutDraws<kBlockM> dropout_draws(int key0) const {
    return {p_.dropout, key0 + 16 * warp_idx_, lane_idx_,
            ptx::warp_uniform(tile().m_begin) * kBlockM, past_last_row()};
  }

  // See mask_tiles.cuh.
  __device__ __forceinline__ void await_mask() {
    sm90::wait_full(smem_.mask_barriers[0].tiles, at_);
  }
  template <int kN>
  __device__ __forceinline__ SeenElements<kN> read_bool_mask_tile(int first_row) {
    await_mask();
    const auto seen = read_bool_mask<kN>(smem_.ds[at_.stage].slab(warpgroup_idx_), first_row,
                                         warp_idx_, lane_idx_);
    arrive_mask_read();
    return seen;
  }
  __device__ __forceinline__ void arrive_mask_read() {
    __syncwarp();
    if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.mask_barriers[0].read[warpgroup_idx_]);
  }
  // One phase a step.
  __device__ __forceinline__ void await_mask_read() {
    if constexpr (kMask == MaskKind::kBool) {
      ptx::mbarrier_wait(smem_.mask_barriers[0].read[warpgroup_idx_], at_.stage);
    }
  }

  // The few scores that need more than recompute_p(), in one branch: it then schedules better.
  // `row0`, `key0`: the first query and the first key of this warpgroup.
  template <int kN>
  __device__ __forceinline__ void adjust_scores(float (&acc_s)[kN][4], int row0, int key0) {
    const int row = own_row(row0);
    mask_scores(acc_s, mask_of(p_), p_.scale.negate, own_key(key0), row);
    const auto& statistics = smem_.statistics[at_.stage];
    if (!statistics.has_huge) return;
    const float* lse = p_.lse + int64_t{statistics.batch_head} * p_.mask.seqlen_q + row;
    subtract_huge_lse(acc_s, lse, p_.mask.seqlen_q - row, signed_scale_log2_,
                      p_.scale.negate ? -p_.scale.natural : p_.scale.natural);
  }

  // Transposed: a row of the tile is a query, the first one `first_row`.
  template <int kSteps>
  __device__ __forceinline__ void store_ds(const uint32_t (&frag_ds)[kSteps][4], int first_row) {
    // Lane l names row l % 8 of matrix l / 8: the first and the next eight keys, then the next
    // eight queries.
    const int row = first_row + (lane_idx_ / 16) * 8 + lane_idx_ % 8;
    const int col = 64 * warpgroup_idx_ + 16 * warp_idx_ + (lane_idx_ / 8 % 2) * 8;
    const uint32_t base = ptx::smem_addr(smem_.ds[at_.stage].data) + DsTile::chunk_offset(row, col);
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
      ptx::stmatrix_x4_trans(base + m * 16 * sm90::kSlabRowBytes, frag_ds[m][0], frag_ds[m][1],
                             frag_ds[m][2], frag_ds[m][3]);
    }
  }

  __device__ __forceinline__ void compute_dq(bool is_first) {
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
    if constexpr (Config::kHasMask) {
      if (lane_idx_ == 0) {
        ptx::mbarrier_arrive(smem_.mask_barriers[0].tiles.empty[at_.stage]);
      }
    }
    ptx::mbarrier_wait(smem_.dq_barriers.empty[0], at_.stage ^ 1);  // one phase a step
    if (is_first) await_gradient_sent();                            // dK lies there
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

  // Until the gradient left last has been sent, if other data are to lie there.
  __device__ __forceinline__ void await_gradient_sent() {
    if (!Config::kHasGradientRoom) sm90::wait_empty(smem_.gradient_barriers, gradient_at_);
  }

  // Leaves a gradient in shared memory, to be sent off.
  __device__ __forceinline__ void stage_gradient(typename Config::GradientTile& staging,
                                                 const float (&acc)[kHeadDim / 8][4],
                                                 float factor) {
    sm90::wait_empty(smem_.gradient_barriers, gradient_at_);
    sm90::store_accumulator(staging, acc, {factor, factor}, 16 * warp_idx_, lane_idx_);
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane_idx_ == 0) ptx::mbarrier_arrive(smem_.gradient_barriers.full[0]);
    gradient_at_.advance();
  }

  // dK waits in its registers until the next tile needs these: at the end of its own there is no
  // room for it.
  __device__ __forceinline__ void stage_dk() {
    if (!holds_dk_) return;
    if (!Config::kHasGradientRoom) ptx::mbarrier_wait(smem_.dq_sent, tile_at_.stage ^ 1);
    stage_gradient(smem_.dk(warpgroup_idx_), acc_dk_, p_.softmax_scale);
    holds_dk_ = false;
  }

  SharedStorage& smem_;
  const Params& p_;
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
  sm90::RingPosition<1> kv_at_;

  Kept kept_;  // by dropout, of the next step
  float acc_dk_[kHeadDim / 8][4];
  float acc_dv_[kHeadDim / 8][4];
  uint32_t frag_v_[Config::kVSteps][4];
};

}  // namespace flash_ext::v3::backward
