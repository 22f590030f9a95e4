// Tiles of the v3 forward.
#pragma once

#include <algorithm>
#include <type_traits>

#include "sm90/pipeline.cuh"
#include "sm90/smem_tile.cuh"
#include "v3/forward/alibi.cuh"
#include "v3/forward/dropout.cuh"
#include "v3/forward/general_scores.cuh"
#include "v3/forward/kernel_params.cuh"
#include "v3/forward/mask_tiles.cuh"
#include "v3/forward/tile_queue.cuh"

namespace flash_ext::v3::forward {

// Which blocks the warpgroups take turns at: the first one of a tile, or all others.
enum class Turns { kFirstBlock, kEveryBlock };

template <int kConsumers_, int kBlockN_, int kKStages_, int kVStages_, int kQBuffers_,
          int kEarlySteps_, Turns kTurns_ = Turns::kEveryBlock>
struct Shape {
  static constexpr int kConsumers = kConsumers_;  // warpgroups of 64 query rows
  static constexpr int kBlockN = kBlockN_;        // keys of a block
  static constexpr int kKStages = kKStages_;      // K blocks in shared memory
  static constexpr int kVStages = kVStages_;
  static constexpr int kQBuffers = kQBuffers_;  // 2: the next tile's Q arrives during this one
  // 16-key steps of weights that are kept before the wait for O; 0: where ptxas likes them.
  static constexpr int kEarlySteps = kEarlySteps_;
  static constexpr Turns kTurns = kTurns_;
};

// Kernels of their own, for as parts of the plain one they would cost all calls 1 to 5%: ptxas
// orders the main loop otherwise.
enum class Variant {
  kPlain,
  kShort,        // few keys, and rows that fill tiles of four warpgroups better than of three: d=64
  kShortCausal,  // the same under a causal mask
  kHalves,       // a first block of which only the first half is seen is computed by half
  kSplit,        // the keys are split, see splits.h
  kGeneral,      // see general_scores.cuh and sequence_maps.cuh, as all that follow
  kNarrow,       // the same where a query sees few blocks
  kAlibi,        // and with alibi_slopes, which those below take, too
  kSoftcap,      // and with a softcap, likewise
  kDropout,      // and with dropout
  kFloatMask,    // and with an attn_mask of q's type, without softcap
  kCappedFloatMask,
  kFloatMaskDropout,
  kBoolMask,  // and with one of bool
  kBoolMaskDropout,
  kSparse,         // under a block_mask
  kBiasedSparse,   // and with softcap or alibi_slopes
  kUniformSparse,  // kSparse where a tile's rows all see the same blocks
};

// H200, bf16, 16k tokens (v3_tuning.json), where the maximum came first. d=64: 512 keys by the
// short shape 1.26 over cuDNN, 1.12 without; 128x128 0.96, no overlap 0.97; at 16k keys the short
// one is 5% slower. d=128: blocks of 64 keys 0.97; a third V stage 0.97 to 1.02 of it. d=256: one
// early step is up to 2% slower; a third K or V stage within 2% either way. Weights that are tried
// (v3_general_tuning.json): d=64 with two warpgroups 0.78 of it, turns at the first block alone
// 0.93, the short shape at 16k keys 0.94; d=128 turns at the first block alone 0.98 at causal 4k,
// else 1.00; two early steps 0.99 to 1.00, of general calls 0.99.
template <int kHeadDim, Variant kVariant>
struct TileShape : TileShape<kHeadDim, Variant::kPlain> {};
template <>
struct TileShape<64, Variant::kPlain> : Shape<3, 128, 4, 4, 2, 0> {};
template <>
struct TileShape<64, Variant::kShort> : Shape<4, 64, 8, 8, 2, 0> {};
// With turns at every block 0.95 of its speed at 512 keys, 0.98 at 1,024; without a mask 1.02.
template <>
struct TileShape<64, Variant::kShortCausal> : Shape<4, 64, 8, 8, 2, 0, Turns::kFirstBlock> {};
// 1.09 causal and 0.99 full (4k) of the speed of three warpgroups.
template <>
struct TileShape<64, Variant::kSoftcap> : TileShape<64, Variant::kShort> {};
// A tile's ends count, and 64 rows see half a block of 128 in vain at either end of a window. Turns
// at every block are 0.97 times as fast as at the first alone at d=64, 1.03 at d=128 (1,024 keys).
template <>
struct TileShape<64, Variant::kNarrow> : TileShape<64, Variant::kShortCausal> {};
template <>
struct TileShape<128, Variant::kNarrow> : Shape<3, 64, 4, 4, 2, 0> {};
// With both, three warpgroups would spill.
template <>
struct TileShape<64, Variant::kFloatMaskDropout> : Shape<2, 128, 4, 4, 2, 2> {};
template <>
struct TileShape<64, Variant::kBoolMaskDropout> : Shape<2, 128, 4, 4, 2, 2> {};
// Warpgroups see different blocks, and would wait for one another's turns.
template <>
struct TileShape<64, Variant::kSparse> : Shape<3, 128, 4, 4, 2, 0, Turns::kFirstBlock> {};
// 128 rows never lie across rows of the mask's blocks. Of tiles of 192 two in three do, and load
// what is on for either.
template <>
struct TileShape<64, Variant::kUniformSparse> : Shape<2, 128, 6, 6, 2, 0> {};
template <>
struct TileShape<64, Variant::kBiasedSparse> : TileShape<64, Variant::kSparse> {};
template <>
struct TileShape<96, Variant::kPlain> : Shape<2, 128, 2, 2, 2, 2> {};
template <>
struct TileShape<128, Variant::kPlain> : Shape<2, 128, 2, 2, 2, 4> {};
// The maximum comes first: turns at every block took plain calls 0.6% more clocks so (8k).
template <>
struct TileShape<128, Variant::kDropout> : Shape<2, 128, 2, 2, 2, 2, Turns::kFirstBlock> {};
template <>
struct TileShape<128, Variant::kFloatMaskDropout> : TileShape<128, Variant::kDropout> {};
template <>
struct TileShape<128, Variant::kBoolMaskDropout> : TileShape<128, Variant::kDropout> {};
template <>
struct TileShape<128, Variant::kSparse> : TileShape<128, Variant::kDropout> {};
template <>
struct TileShape<128, Variant::kBiasedSparse> : TileShape<128, Variant::kDropout> {};
template <>
struct TileShape<128, Variant::kSoftcap> : Shape<2, 128, 2, 2, 2, 3> {};
// With four early steps these take 1.02 times as long (a head of 4k keys) and 1.04 (all blocks on).
template <>
struct TileShape<128, Variant::kSplit> : Shape<2, 128, 2, 2, 2, 2> {};
template <>
struct TileShape<128, Variant::kUniformSparse> : TileShape<128, Variant::kSplit> {};
template <>
struct TileShape<192, Variant::kPlain> : Shape<2, 96, 2, 2, 1, 1> {};
template <>
struct TileShape<256, Variant::kPlain> : Shape<2, 64, 2, 2, 1, 0> {};

// What the block in each K buffer is, see sparse_producer.cuh.
template <int kStages>
struct BlockNotes {
  int of[kStages];
};
struct NoNotes {};

template <typename Element_, int kHeadDim_, Variant kVariant>
struct Config : TileShape<kHeadDim_, kVariant> {
  using Element = Element_;
  using Base = TileShape<kHeadDim_, kVariant>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHalvesFirst = kVariant == Variant::kHalves;
  static constexpr bool kSplitsKeys = kVariant == Variant::kSplit;
  static constexpr bool kAddsMask = kVariant == Variant::kFloatMask ||
                                    kVariant == Variant::kCappedFloatMask ||
                                    kVariant == Variant::kFloatMaskDropout;
  static constexpr bool kHidesByMask =
      kVariant == Variant::kBoolMask || kVariant == Variant::kBoolMaskDropout;
  static constexpr bool kDropsOut = kVariant == Variant::kDropout ||
                                    kVariant == Variant::kFloatMaskDropout ||
                                    kVariant == Variant::kBoolMaskDropout;
  static constexpr bool kIsUniform = kVariant == Variant::kUniformSparse;
  static constexpr bool kIsSparse =
      kVariant == Variant::kSparse || kVariant == Variant::kBiasedSparse || kIsUniform;
  static constexpr bool kIsGeneral = kVariant >= Variant::kGeneral;
  static constexpr bool kCapsInExponents = kVariant == Variant::kSoftcap;
  // See softmax.cuh. The others have no registers left for scores beside weights: head_dim 192
  // spills 4 bytes where keys are split, 256 up to 16.
  static constexpr bool kTriesWeights = kHeadDim <= 128 && !kDropsOut &&
                                        (!kIsSparse || kIsUniform) &&
                                        kVariant != Variant::kCappedFloatMask;
  // And whether trials end after kTrials. (That costs 6% here, 16k, d=64; plain calls within 1%.)
  static constexpr bool kCountsTrials = !kIsUniform;
  static constexpr bool kMayCap = kCapsInExponents || kDropsOut || kHidesByMask ||
                                  kVariant == Variant::kCappedFloatMask ||
                                  kVariant == Variant::kBiasedSparse;
  static constexpr bool kMayHaveAlibi = kMayCap || kVariant == Variant::kFloatMask;
  using Params = std::conditional_t<kIsGeneral, GeneralKernelParams, KernelParams>;
  using Tile = std::conditional_t<kIsGeneral, PlacedTile, forward::Tile>;
  static constexpr bool kTensorAlibi = kVariant == Variant::kAlibi;
  using Softmax =
      std::conditional_t<kTensorAlibi, AlibiSoftmax,
                         std::conditional_t<kCapsInExponents, CappedSoftmax, forward::Softmax>>;
  using Alibi = std::conditional_t<kTensorAlibi, TensorAlibi<Base::kBlockN>, NoAlibi>;
  using Dropout = std::conditional_t<kDropsOut, WeightDropout<Base::kBlockN>, NoDropout>;
  using AttnMask = std::conditional_t<
      kAddsMask,
      FloatMask<Element, Base::kBlockN, 4 * Base::kConsumers, kVariant == Variant::kFloatMask>,
      std::conditional_t<kHidesByMask, BoolMask<Base::kBlockN, 4 * Base::kConsumers>, NoMask>>;
  using WarpgroupTile = std::conditional_t<kIsGeneral, GeneralTile, forward::WarpgroupTile>;
  // O leaves through the tile's own Q buffer; where there is one only, straight from registers, so
  // that the next Q arrives meanwhile (H200, 512 keys: 5 to 10%).
  static constexpr bool kStagesOutput = !kSplitsKeys && Base::kQBuffers > 1;
  static constexpr int kBlockM = Base::kConsumers * kRowsPerWarpgroup;
  static constexpr int kNumThreads = (1 + Base::kConsumers) * 128;
  // Registers of a thread, moved from the producer to the consumers. A launch gives every thread
  // the same, 65,536 over kNumThreads rounded down to a multiple of 8, and no more can be moved.
  static constexpr int kLaunchRegisters = 65536 / kNumThreads / 8 * 8;
  static constexpr int kProducerRegisters = Base::kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = Base::kConsumers == 2   ? 232
                                            : Base::kConsumers == 3 ? 160
                                                                    : 112;
  static_assert(kProducerRegisters + Base::kConsumers * kConsumerRegisters <=
                (1 + Base::kConsumers) * kLaunchRegisters);

  using QTile = sm90::SmemTile<Element, kRowsPerWarpgroup, kHeadDim>;
  using KVTile = sm90::SmemTile<Element, Base::kBlockN, kHeadDim>;

  struct SharedStorage : AttnMask::Storage, Alibi::Storage {
    QTile q[Base::kQBuffers][Base::kConsumers];  // or a warpgroup's O on the way out
    KVTile k[Base::kKStages];
    KVTile v[Base::kVStages];
    sm90::RingBarriers<Base::kKStages> k_barriers;
    sm90::RingBarriers<Base::kVStages> v_barriers;
    sm90::RingBarriers<Base::kQBuffers> q_barriers[Base::kConsumers];
    WarpgroupTile tile[Base::kQBuffers][Base::kConsumers];  // what the Q beside it belongs to
    float never_written;                                    // see pin_before_wait()
    std::conditional_t<kIsSparse, BlockNotes<Base::kKStages>, NoNotes> k_notes;
    std::conditional_t<kIsUniform, TileQueue, NoQueue> tiles;
  };
  // A warpgroup waits for its turn before it lets go of blocks that others skip before theirs.
  static_assert((Base::kConsumers - 1) * kRowsPerWarpgroup <=
                Base::kBlockN * (std::min(Base::kKStages, Base::kVStages) - 1));
  static_assert(sizeof(SharedStorage) <= 227 * 1024, "what one thread block gets on sm_90");
};

}  // namespace flash_ext::v3::forward
