// What the v3 backward needs to know of general attention (common/general.h).
//
// The main kernel computes weights as exp2(x * scale.log2 - L), with x as the products Q K^T come.
// A bias is added in units of x, so that the exponent stays one FMA. The softcap makes x the tanh
// and scale the cap. It takes the bias behind that, in units of log2: the tanh itself must stay.
// Sinks only change L, and what rows of dS sum to: that is for the kernels around the main one.
//
// What v2 does and this does not: sum up the rows of the computed dS. From that v2 learns the error
// e of D, which comes from a rounded out, and what rows sum to behind a softcap. So here dQ is off
// by e * exp(sink - L) * mean(K) with a sink, and under a softcap comes from K with its mean.
#pragma once

#include <type_traits>

#include "common/general.h"
#include "v3/backward/kernel_params.cuh"
#include "v3/sequence_tiles.cuh"

namespace flash_ext::v3::backward {

// Where lengths are read on the GPU (cu_seqlens_q, seqlens_k): what prepare_sequences.cuh writes,
// see GeneralBackwardWorkspace. Otherwise maps == nullptr.
struct EntryTables {
  const CUtensorMap* maps = nullptr;  // (batch, maps_per_entry)
  int maps_per_entry = 0;
  const SequenceTile* tiles = nullptr;
  const int* num_tiles = nullptr;
  const int* row_entries = nullptr;
};

struct GeneralKernelParams : KernelParams {
  BandMask band;
  BlockMask block_mask;     // data == nullptr: none
  HeadTensor alibi_slopes;  // likewise
  float slope_factor;       // makes a slope a bias for each key of distance
  HeadTensor sinks;         // likewise
  float* dsink_blocks;      // nullptr: not asked for. What each block of query rows adds to dsinks
  bool has_softcap;
  float tanh_exponent;  // of tanh(y) = 1 - 2 / (1 + exp2(2 y log2(e))), for a score of 1
  Dropout dropout;
  // Of Dropout::weight_factor(); without dropout 0, 1 and 1. See dropout.cuh.
  float weight_log2, weight_factor, inverse_weight_factor;
  CUtensorMap mask_map;  // of a mask
  ScoreTensor dmask;     // data == nullptr: not asked for
  Sequences sequences;
  EntryTables entries;
  bool is_top_left;    // the band's diagonal begins in that corner, whatever the lengths
  int num_key_heads;   // of all batch entries
  int long_ranks;      // see TileOrder
  int64_t lse_stride;  // of lse from head to head
};

template <typename Params>
inline constexpr bool kIsGeneral = std::is_same_v<Params, GeneralKernelParams>;

enum class MaskKind { kNone, kBool, kFloat };  // float: of the type of q

// What a main kernel does to scores, at compile time: every step costs registers.
struct PlainScores {
  using Params = KernelParams;
  static constexpr bool kHasSoftcap = false;
  static constexpr bool kHasAlibi = false;
  static constexpr bool kHasDropout = false;
  static constexpr MaskKind kMask = MaskKind::kNone;
};

// A band of any window, too.
template <bool kHasSoftcap_, bool kHasAlibi_, bool kHasDropout_ = false,
          MaskKind kMask_ = MaskKind::kNone>
struct GeneralScores {
  using Params = GeneralKernelParams;
  static constexpr bool kHasSoftcap = kHasSoftcap_;
  static constexpr bool kHasAlibi = kHasAlibi_;
  static constexpr bool kHasDropout = kHasDropout_;
  static constexpr MaskKind kMask = kMask_;
};

// `tile`: as it is announced.
template <typename Work>
__device__ __forceinline__ const Mask& mask_of(const KernelParams& p, const Work&) {
  return p.mask;
}
template <typename Work>
__device__ __forceinline__ BandMask mask_of(const GeneralKernelParams& p, const Work& tile) {
  BandMask band = p.band;
  band.seqlen_q = tile.seqlen_q;
  band.seqlen_k = tile.seqlen_k;
  band.diagonal = tile.diagonal;
  return band;
}

// The first of lse's rows.
template <typename Work>
__device__ __forceinline__ const float* lse_of(const KernelParams& p, const Work&, int batch_head) {
  return p.lse + int64_t{batch_head} * p.mask.seqlen_q;
}
template <typename Work>
__device__ __forceinline__ const float* lse_of(const GeneralKernelParams& p, const Work& tile,
                                               int batch_head) {
  return p.lse + tile.lse_begin + batch_head * p.lse_stride;
}

__device__ __forceinline__ constexpr bool has_sinks(const KernelParams&) { return false; }
__device__ __forceinline__ bool has_sinks(const GeneralKernelParams& p) {
  return p.sinks.data != nullptr;
}

// How the preprocess kernel leaves L and delta where there is dropout.
__device__ __forceinline__ constexpr float shifted_lse(const KernelParams&, float x) { return x; }
__device__ __forceinline__ float shifted_lse(const GeneralKernelParams& p, float x) {
  return x - p.weight_log2;
}
__device__ __forceinline__ constexpr float scaled_delta(const KernelParams&, float x) { return x; }
__device__ __forceinline__ float scaled_delta(const GeneralKernelParams& p, float x) {
  return x * p.inverse_weight_factor;
}
__device__ __forceinline__ constexpr float true_delta(const KernelParams&, float x) { return x; }
__device__ __forceinline__ float true_delta(const GeneralKernelParams& p, float x) {
  return x * p.weight_factor;
}

// The weight of the sink in a row's softmax, exp(sink - L).
__device__ __forceinline__ float sink_weight(const KernelParams&, int, float) { return 0.f; }
__device__ __forceinline__ float sink_weight(const GeneralKernelParams& p, int head_idx,
                                             float lse) {
  if (!has_sinks(p)) return 0.f;
  const float sink = *p.sinks.at<const float>(0, head_idx);
  return sink == -INFINITY ? 0.f : expf(sink - lse);
}

}  // namespace flash_ext::v3::backward
