// What the v3 kernel is launched with.
#pragma once

#include <cuda.h>

#include "common/general.h"
#include "common/mask.h"
#include "common/merge_shares.cuh"
#include "common/online_softmax.cuh"
#include "params.h"
#include "v3/forward/general_workspace.h"
#include "v3/forward/scheduler.cuh"
#include "v3/sequence_tiles.cuh"

namespace flash_ext::v3::forward {

struct KernelParams {
  CUtensorMap q_map, kv_maps[2], out_map;
  TensorView out;
  int head_dim;  // of the tensors, at most kHeadDim
  float* lse;
  Shares shares;  // where the keys are split
  Mask mask;
  SoftmaxScale scale;
  int group_size;
  Schedule schedule;
};

// softcap * tanh(s * scale / softcap), in units of log2 unless a float mask follows, see
// general_scores.cuh.
struct Softcap {
  // tanh(y) = y (c0 + c1 y^2 + c2 y^4) to 5e-8 for |y| <= 0.25: the smallest maximum error.
  static constexpr float kTanh0 = 0.999998633f;
  static constexpr float kTanh1 = -0.333157014f;
  static constexpr float kTanh2 = 0.127622303f;

  bool is_on = false;
  bool is_for_exponents;  // the polynomial may become a part of them, see CappedExponent
  float max_polynomial;   // |s| up to which the polynomial holds
  float limit_log2;       // what such an s is capped to
  float polynomial[3];    // of s^2, times s
  float inverse;          // y for a score of 1
  float exponent;         // of 2, for a score of 1: e^(2 s scale / softcap)
  float cap;              // softcap in those units

  Softcap() = default;
  // Where softcap is 0 there is none. The scale is that of the sign-changed Q, positive; `unit`: of
  // what leaves it, log2(e) for units of log2.
  Softcap(double softcap, double scale, double unit, bool has_alibi) : is_on(softcap > 0.0) {
    if (!is_on) return;
    const double factor = scale / softcap;
    max_polynomial = static_cast<float>(kMaxTanhPolynomial / factor);
    limit_log2 = static_cast<float>(std::tanh(kMaxTanhPolynomial) * softcap * unit);
    const double coefficients[3] = {kTanh0, kTanh1, kTanh2};
    for (int i = 0; i < 3; ++i) {
      polynomial[i] =
          static_cast<float>(coefficients[i] * softcap * unit * std::pow(factor, 2 * i + 1));
    }
    inverse = static_cast<float>(factor);
    exponent = static_cast<float>(2 * kLog2e * factor);
    cap = static_cast<float>(softcap * unit);
    is_for_exponents = !has_alibi && cap >= kLeastCapLog2;
  }

 private:
  static constexpr double kMaxTanhPolynomial = 0.25;
  // From here on weights 2^(-cap tanh y) for y > 0.25 differ from the polynomial's by at most 2e-6.
  static constexpr float kLeastCapLog2 = 24.f;
};

// Where lengths are read on the GPU (cu_seqlens_q, seqlens_k): what prepare_sequences.cuh writes.
// Otherwise maps == nullptr.
struct EntryTables {
  const CUtensorMap* maps = nullptr;  // (batch, maps_per_entry)
  int maps_per_entry = 0;
  const SequenceTile* tiles = nullptr;
  const int* num_tiles = nullptr;
};

// Dropout as the kernel applies it. Weights are multiplied by a power of two first, which is at
// least `keep_scale`: lest small ones lose bits as they are rounded to fp16, where weights up to
// 2^8 times kMaxFactor still fit.
struct KernelDropout {
  const uint64_t* rng_state = nullptr;
  uint32_t thresholds;  // the threshold, twice
  float factor_log2;    // of that power
  float sum_factor;     // turns the sum of such weights into that of the weights
  float out_factor;     // and of products

  KernelDropout() = default;
  explicit KernelDropout(const Dropout& dropout) : rng_state(dropout.rng_state) {
    // Where all is dropped it is this factor of 0 that does it.
    thresholds = (dropout.threshold & 0xffff) * 0x10001u;
    const float least = dropout.keep_scale < kMaxFactor ? dropout.keep_scale : kMaxFactor;
    factor_log2 = least > 1.f ? std::ceil(std::log2(least)) : 0.f;
    sum_factor = std::exp2(-factor_log2);
    out_factor = dropout.keep_scale * sum_factor;
  }

 private:
  static constexpr float kMaxFactor = 128.f;
};

// attn_mask, see mask_tiles.cuh.
struct KernelMask {
  CUtensorMap map;  // (key, row, head, batch), boxes of a warp's rows
  bool has_rows;    // otherwise one row is that of all
  // What S is multiplied by before a float mask is added; or, where it is accumulated on the mask,
  // what the mask and Q are multiplied by before that.
  float score_factor;
  float mask_factor;
  float q_factor;
};

// Of general calls. `scale` is that of the scores which the softcap leaves, if there is one.
struct GeneralKernelParams : KernelParams {
  BandMask band;
  HeadTensor alibi_slopes;
  HeadTensor sinks;
  float bias_factor;  // slopes times this are in the units of scores
  Softcap softcap;
  KernelDropout dropout;
  KernelMask attn_mask;
  Sequences sequences;
  EntryTables entries;
  BlockMask block_mask;
  int long_ranks;            // see TileOrder
  bool is_top_left = false;  // the band's diagonal begins in that corner, whatever the lengths
  int* num_taken = nullptr;  // how many tiles have been, see tile_queue.cuh
};

}  // namespace flash_ext::v3::forward
