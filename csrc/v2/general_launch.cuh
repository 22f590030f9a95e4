// Host side of the v2 forward for general attention.
#pragma once

#include "common/launch_kernel.cuh"
#include "launch.h"
#include "v2/general_kernel.cuh"

namespace flash_ext {
namespace v2 {

template <typename Config>
int64_t num_general_tiles(const AttentionShape& s) {
  return (s.seqlen_q + Config::kBlockM - 1) / Config::kBlockM;
}

}  // namespace v2

template <typename Element, int kHeadDim>
void launch_general_forward(const ForwardParams& params, CudaStream stream) {
  using Config = v2::GeneralConfig<Element, kHeadDim>;
  const AttentionShape& s = params.shape;
  const int64_t tiles_per_head = v2::num_general_tiles<Config>(s);
  const int64_t num_heads = s.batch * s.heads_q;
  const int64_t kv_bytes = 2 * sizeof(Element) * s.seqlen_k * s.head_dim;
  const bool is_causal = params.general.causal != CausalMode::kNone;
  const v2::GeneralKernelParams p{params.q,
                                  params.k,
                                  params.v,
                                  params.out,
                                  static_cast<float*>(params.lse),
                                  params.general,
                                  ScoreScale(params.softmax_scale, params.general),
                                  static_cast<int>(s.head_dim),
                                  Divisor(s.heads_q),
                                  Divisor(s.group_size()),
                                  tile_order(s, is_causal, tiles_per_head, num_heads, kv_bytes)};
  launch_kernel(v2::general_forward_kernel<Config>, num_heads * tiles_per_head, Config::kNumThreads,
                sizeof(typename Config::SharedStorage), stream, "the v2 general forward kernel", p,
                s);
}

template <typename Element, int kHeadDim>
KernelPlan plan_general_forward(const ForwardParams& params) {
  using Config = v2::GeneralConfig<Element, kHeadDim>;
  const AttentionShape& s = params.shape;
  return {Config::kBlockM, Config::kBlockN, Config::kNumWarps,
          sizeof(typename Config::SharedStorage),
          s.batch * s.heads_q * v2::num_general_tiles<Config>(s)};
}

}  // namespace flash_ext
