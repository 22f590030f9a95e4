// A consumer warpgroup: 64 keys, all queries that see them, one tile after another.
#pragma once

#include "ptx/stmatrix.cuh"
#include "ptx/warpgroup.cuh"
#include "sm90/copy_tile.cuh"
#include "sm90/warpgroup_gemm.cuh"
#include "v3/backward/centre_keys.cuh"
#include "v3/backward/config.cuh"
#include "v3/backward/dropout.cuh"
#include "v3/backward/general_scores.cuh"

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

 protected:
  using Kept = KeptElements<Scores::kHasDropout ? kBlockM / 8 : 0>;

  __device__ __forceinline__ const typename Config::Work& tile() const {
    return smem_.tile[tile_at_.stage];
  }

  struct PlainStep {
    int row0;            // of the query block
    int key0;            // of this warpgroup
    int first_full_row;  // query blocks from here on see all its keys
    bool is_last;        // of the tile
  };
  // What few steps need to know of themselves they read again, lest it take registers.
  struct AnnouncedStep {
    int seen;  // see steps.cuh
    bool is_last;
  };
  using Step = std::conditional_t<Config::kIsGeneral, AnnouncedStep, PlainStep>;

  __device__ __forceinline__ int row0_of(const Step& step) const {
    if constexpr (Config::kIsGeneral)
      return announced().row0;
    else
      return step.row0;
  }
  __device__ __forceinline__ int key0_of(const Step& step) const {
    if constexpr (Config::kIsGeneral)
      return tile().n_block * kBlockN + 64 * warpgroup_idx_;
    else
      return step.key0;
  }

  __device__ __forceinline__ const StepWork& announced() const {
    return smem_.steps[at_.stage + Config::kStages * at_.phase];
  }

  // Whether the step's queries see all keys of the warpgroup. Those beyond the last have weights
  // of 0 without masking.
  __device__ __forceinline__ bool is_full(const Step& step) const {
    if constexpr (Config::kIsGeneral)
      return (step.seen & kIsMasked) == 0;
    else
      return step.row0 >= step.first_full_row;
  }

  // The first step is code of its own: what it alone has to do lies in nobody else's way. Of other
  // rows than kRows from kFirstRow on nothing is seen or computed.
  template <bool kIsFirst, int kFirstRow = 0, int kRows = kBlockM - kFirstRow>
  __device__ __forceinline__ void compute(const Step& step) {
    float acc_s[kRows / 8][4], acc_dp[kRows / 8][4];
    uint32_t frag_p[kRows / 16][4], frag_ds[kRows / 16][4];
    if (!Config::kIsGeneral) sm90::wait_full(smem_.query_barriers, at_);
    if (kIsFirst) sm90::wait_full(smem_.k_barriers, kv_at_);
    ptx::wgmma_fence();
    sm90::gemm_abt<KVTile, QTile, kRows>(
        acc_s, k_desc_, q_desc_.template tile<QTile>(at_.stage).from_row(kFirstRow));
    if (kIsFirst) load_v();
    ptx::wgmma_fence();
    sm90::gemm_abt<KVTile, QTile, kRows>(
        acc_dp, frag_v_, v_desc_, dout_desc_.template tile<QTile>(at_.stage).from_row(kFirstRow));

    if (kIsFirst) centre_keys();
    const auto mask = step_mask();
    const auto seen = mask.template read<kRows / 8>(kFirstRow);
    const auto& statistics = smem_.statistics[at_.stage];
    const bool is_plain = is_full(step) && statistics.has_huge == 0;
    ptx::wgmma_wait_group<1>();
    if (step.is_last && lane_idx_ == 0) ptx::mbarrier_arrive(smem_.k_barriers.empty[0]);
    const float* const lse_log2 = statistics.lse_log2 + kFirstRow + first_col();
    const float* const delta = smem_.delta[at_.stage] + kFirstRow + first_col();
    const float distance = first_distance(step, kFirstRow);
    mask.apply(acc_s, seen, kFirstRow, p_.scale.negate, p_.softmax_scale);
    if constexpr (Scores::kHasSoftcap) {
      apply_tanh(acc_s, p_.tanh_exponent);
      if (!is_plain) {
        hide_scores(acc_s, mask_of(p_, tile()), kHiddenTanh, own_key(step),
                    own_row(step, kFirstRow));
      }
    } else {
      if constexpr (Scores::kHasAlibi) add_alibi(acc_s, statistics.slope, distance);
      if (!is_plain) adjust_scores(acc_s, step, kFirstRow);
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
      if constexpr (kMask == MaskKind::kFloat) add_to_dmask(acc_dp, step, kFirstRow);
    }
    sm90::pack_operand<Element>(frag_ds, acc_dp);
    if (kIsFirst) await_gradient_sent();  // dV lies there
    mask.await_read();
    if constexpr (kFirstRow > 0) {
      const uint32_t zeros[kFirstRow / 16][4] = {};
      store_ds(zeros, 0);
    }
    if constexpr (kFirstRow + kRows < kBlockM) {
      const uint32_t zeros[(kBlockM - kFirstRow - kRows) / 16][4] = {};
      store_ds(zeros, kFirstRow + kRows);
    }
    store_ds(frag_ds, kFirstRow);
    if (kIsFirst) stage_dk();  // of the tile before

    announce_ds();
    issue_dv(frag_p, kFirstRow);
    issue_dk(frag_ds, kFirstRow, !kIsFirst);
    if (!kIsFirst && !step.is_last) draw_next();
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
    step_mask().skip();
    store_ds(frag_ds, 0);
    stage_dk();
    clear(acc_dk_);
    announce_ds();
    finish_step(/*is_first=*/true);
  }

  // Any later one.
  __device__ __forceinline__ void skip(bool is_last) {
    if (is_last && lane_idx_ == 0) {
      ptx::mbarrier_arrive(smem_.k_barriers.empty[0]);
      ptx::mbarrier_arrive(smem_.v_barriers.empty[0]);
    }
    const uint32_t frag_ds[kBlockM / 16][4] = {};
    step_mask().skip();
    store_ds(frag_ds, 0);
    announce_ds();
    if (!is_last) draw_next();
    finish_step(/*is_first=*/false);
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

  // The first query and the first key of this thread.
  __device__ __forceinline__ int own_row(const Step& step, int first_row) const {
    return row0_of(step) + first_row + first_col();
  }
  __device__ __forceinline__ int own_key(const Step& step) const {
    return key0_of(step) + 16 * warp_idx_ + lane_idx_ / 4;
  }

  // Of that query from that key along the diagonal, for ALiBi.
  __device__ __forceinline__ float first_distance(const Step& step, int first_row) const {
    if constexpr (!Scores::kHasAlibi)
      return 0.f;
    else
      return static_cast<float>(own_row(step, first_row) + tile().diagonal - own_key(step));
  }

  // This thread's first column of S^T, first query of the block.
  __device__ __forceinline__ int first_col() const { return lane_idx_ % 4 * 2; }

  // What dropout keeps of the query block in question.
  __device__ __forceinline__ Kept draw(int row0, int batch_head) const {
    const int key0 = tile().n_block * kBlockN + 64 * warpgroup_idx_ + 16 * warp_idx_;
    return draw_kept<kBlockM / 8>(p_.dropout, batch_head, key0, row0, lane_idx_);
  }
  // Of the next step, while this one's last products are in flight: beside those of S and dP there
  // is no register for it.
  __device__ __forceinline__ void draw_next() {
    if constexpr (Scores::kHasDropout) {
      kept_ = draw(announced().next_row0, announced().next_batch_head);
    }
  }
  __device__ __forceinline__ auto step_mask() const {
    if constexpr (Config::kHasMask) {
      return StepMask<kMask, DsTile>{
          smem_.ds[at_.stage], smem_.mask_barriers[0], at_, warpgroup_idx_, warp_idx_, lane_idx_};
    } else {
      return NoStepMask{};
    }
  }
  template <int kN>
  __device__ __forceinline__ void add_to_dmask(const float (&acc_ds)[kN][4], const Step& step,
                                               int first_row) const {
    if (p_.dmask.data == nullptr) return;
    const int batch_idx = ptx::warp_uniform(tile().batch_idx);
    const int head_idx = smem_.statistics[at_.stage].batch_head - batch_idx * p_.heads_q;
    add_dmask(p_.dmask, acc_ds, batch_idx, head_idx, own_row(step, first_row), own_key(step),
              p_.band.seqlen_q, p_.band.seqlen_k);
  }

  // The few scores that need more than recompute_p(), in one branch: it then schedules better.
  template <int kN>
  __device__ __forceinline__ void adjust_scores(float (&acc_s)[kN][4], const Step& step,
                                                int first_row) {
    const int row = own_row(step, first_row);
    const auto& mask = mask_of(p_, tile());
    mask_scores(acc_s, mask, p_.scale.negate, own_key(step), row);
    const auto& statistics = smem_.statistics[at_.stage];
    if (!statistics.has_huge) return;
    const float* lse = lse_of(p_, tile(), statistics.batch_head) + row;
    subtract_huge_lse(acc_s, lse, mask.seqlen_q - row, signed_scale_log2_,
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
    step_mask().release();
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
