// Tiles of the v3 backward at head_dim up to 128.
#pragma once

#include "sm90/pipeline.cuh"
#include "sm90/smem_tile.cuh"
#include "v3/backward/general_params.cuh"
#include "v3/backward/kernel_params.cuh"
#include "v3/backward/mask_tiles.cuh"
#include "v3/backward/steps.cuh"
#include "v3/backward/workspace.h"

namespace flash_ext::v3::backward {

// A tile as the producer announces it to everyone else.
struct alignas(16) TileWork {
  int n_block;
  int kv_head_idx;
  int batch_idx;
  // Query blocks that see it. Of a general kernel's tile only whether there are any: see StepWork.
  int m_begin, m_end;
  int is_valid;  // 0: there are no more
};

// Of a general kernel's, with what it needs to know of its batch entry.
struct alignas(16) GeneralTileWork : TileWork {
  int seqlen_q;
  int seqlen_k;
  int diagonal;         // of the band
  int first_row_block;  // see first_row_block(); 0 unless packed
  int64_t lse_begin;    // of lse's rows, behind those of (batch, head); 0 unless packed
};

// Config::kVSteps of a general kernel.
template <typename Scores>
inline constexpr int general_v_steps(int head_dim) {
  if (Scores::kHasSoftcap) return 1;
  if (Scores::kMask != MaskKind::kNone && Scores::kHasDropout) return 1;
  if (Scores::kMask != MaskKind::kNone) return Scores::kMask == MaskKind::kBool ? 2 : 1;
  if (Scores::kHasDropout) return Scores::kHasAlibi ? 1 : 2;
  return head_dim == 128 && !Scores::kHasAlibi ? 3 : 2;
}

// General kernels learn whether they are deterministic at run time (kIsDeterministic is false):
// there are enough of them.
template <typename Element_, int kHeadDim_, bool kIsDeterministic_, typename Scores_ = PlainScores>
struct Config {
  using Element = Element_;
  using Scores = Scores_;
  using Params = typename Scores::Params;
  static constexpr bool kIsGeneral = backward::kIsGeneral<Params>;
  using Work = std::conditional_t<kIsGeneral, GeneralTileWork, TileWork>;
  static constexpr bool kHasMask = Scores::kMask != MaskKind::kNone;
  static constexpr bool kIsDeterministic = kIsDeterministic_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kBlockM = backward_block_m(kHeadDim);
  static constexpr int kConsumers = 2;  // warpgroups of 64 keys
  static constexpr int kBlockN = kBackwardBlockN;
  static_assert(kBlockN == 64 * kConsumers);
  static constexpr int kClusterSize = 1;
  static constexpr int kThreadBlockN = kBlockN;  // keys of a thread block of the cluster
  static constexpr bool kCentresKeys = true;     // dQ comes from K without its mean
  static constexpr int kStages = 2;              // of Q and dO
  static constexpr int kNumThreads = (1 + kConsumers) * 128;
  // How many steps of dP^T = V dO^T along head_dim find V in registers: shared memory binds, and
  // every step less that reads V from there is time. As many as leave no spills in the loop over
  // steps. H200, bf16, over none, from 2k tokens on: 3 to 4% at head_dim 128, 1 to 3% at 64.
  static constexpr int kVSteps = kIsGeneral ? general_v_steps<Scores>(kHeadDim)
                                 : kHeadDim == 128 && !kIsDeterministic ? 5
                                                                        : 3;
  // Registers of a thread: a launch gives every thread 65,536 / 384, rounded down to a multiple of
  // 8, and no more can be moved from the producer to the consumers.
  static constexpr bool kNeedsAll =
      kVSteps == 5 || Scores::kHasSoftcap || Scores::kHasDropout || kHasMask;
  static constexpr int kProducerRegisters = kNeedsAll ? 24 : 40;
  static constexpr int kConsumerRegisters = kNeedsAll ? 240 : 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 3 * 168);

  using QTile = sm90::SmemTile<Element, kBlockM, kHeadDim>;
  using KVTile = sm90::SmemTile<Element, kBlockN, kHeadDim>;
  using DsTile = sm90::SmemTile<Element, kBlockM, kBlockN>;
  using GradientTile = sm90::SmemTile<Element, 64, kHeadDim>;  // of a warpgroup

  // dV and dK leave through shared memory of their own where there is room (without it head_dim 64
  // is 1 to 5% slower); else through what the next tile's first step does not need yet, dV where dS
  // was and dK where dQ was.
  static constexpr bool kHasGradientRoom = kHeadDim == 64;

  struct SharedStorage {
    KVTile k, v;
    KVTile k_centred;  // K minus its mean
    QTile q[kStages], dout[kStages];
    DsTile ds[2];                                // of the steps whose dQ warpgroup 0, 1 computes
    alignas(1024) float dq[kBlockM * kHeadDim];  // on its way out
    GradientTile gradient[kHasGradientRoom ? kConsumers : 0];
    RowStatistics<kBlockM> statistics[kStages];
    alignas(16) float delta[kStages][kBlockM];
    alignas(16) float key_mean[kHeadDim];
    Work tile[2];
    sm90::RingBarriers<2> tile_barriers;
    sm90::RingBarriers<kStages> query_barriers;  // Q, dO and both statistics
    sm90::RingBarriers<1> k_barriers, v_barriers, k_centred_barriers, gradient_barriers,
        dq_barriers;
    ptx::Mbarrier dq_sent;  // a tile's last dQ has left
    StepWork steps[kIsGeneral ? StepWork::kSlots : 0];
    MaskBarriers mask_barriers[kHasMask ? 1 : 0];

    __device__ GradientTile& dv(int warpgroup_idx) {
      if constexpr (kHasGradientRoom) return gradient[warpgroup_idx];
      return reinterpret_cast<GradientTile&>(ds[warpgroup_idx]);
    }
    __device__ GradientTile& dk(int warpgroup_idx) {
      if constexpr (kHasGradientRoom) return gradient[warpgroup_idx];
      return reinterpret_cast<GradientTile*>(dq)[warpgroup_idx];
    }
  };
  static_assert(sizeof(GradientTile) <= sizeof(DsTile));
  static_assert(kConsumers * sizeof(GradientTile) <= kBlockM * kHeadDim * sizeof(float));
  static_assert(sizeof(SharedStorage) <= 227 * 1024, "what one thread block gets on sm_90");
};

}  // namespace flash_ext::v3::backward
