// Host side of the v2 forward: picks a configuration, fills the kernel's parameters, launches.
#pragma once

#include "common/launch_kernel.cuh"
#include "launch.h"
#include "v2/kernel.cuh"

namespace flash_ext {
namespace v2 {

template <typename Config>
int num_m_blocks(const AttentionShape& shape) {
  return static_cast<int>((shape.seqlen_q + Config::kBlockM - 1) / Config::kBlockM);
}

// A sequence of at most this many tall tiles cannot fill a GPU on its own.
inline constexpr int kSmallGridTiles = 16;

// Whether a multiprocessor of this GPU holds two of its thread blocks.
template <typename Config>
bool fits_twice(const AttentionShape& shape) {
  constexpr int kReserved = 1024;  // by the system, for each thread block
  constexpr int kBytes = static_cast<int>(sizeof(typename Config::SharedStorage)) + kReserved;
  return 2 * kBytes <= device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, shape);
}

// Calls `visit` with the configuration for sequences of this length and number of heads.
template <typename Element, int kHeadDim, typename Visit>
auto with_config(const ForwardParams& params, Visit visit) {
  using Full = Config<Element, kHeadDim, Grid::kFull>;
  using Small = Config<Element, kHeadDim, Grid::kSmall>;
  if constexpr (Full::kNumWarps != Small::kNumWarps) {
    const AttentionShape& s = params.shape;
    if (s.heads_q * num_m_blocks<Full>(s) <= kSmallGridTiles) return visit(Small{});
  }
  if constexpr (sizeof(Element) == 2 && kHeadDim <= 128) {
    using TwoStages = Config<Element, kHeadDim, Grid::kFull, Stages::kTwo>;
    if (fits_twice<TwoStages>(params.shape)) return visit(TwoStages{});
  }
  return visit(Full{});
}

}  // namespace v2

template <typename Element, int kHeadDim>
void launch_forward_v2(const ForwardParams& params, CudaStream stream) {
  v2::with_config<Element, kHeadDim>(params, [&](auto config) {
    using Config = decltype(config);
    const AttentionShape& s = params.shape;
    const int num_m_blocks = v2::num_m_blocks<Config>(s);
    const int64_t kv_bytes = 2 * sizeof(Element) * s.seqlen_k * s.head_dim;
    const v2::KernelParams p{params.q,
                             params.k,
                             params.v,
                             params.out,
                             static_cast<float*>(params.lse),
                             params.mask,
                             SoftmaxScale(params.softmax_scale),
                             static_cast<int>(s.head_dim),
                             Divisor(s.heads_q),
                             Divisor(s.group_size()),
                             tile_order(s, params.mask.is_causal, num_m_blocks,
                                        s.batch * s.heads_q, kv_bytes)};
    launch_kernel(v2::forward_kernel<Config>, s.batch * s.heads_q * num_m_blocks,
                  Config::kNumThreads, sizeof(typename Config::SharedStorage), stream,
                  "the v2 forward kernel", p, s);
  });
}

template <typename Element, int kHeadDim>
KernelPlan plan_forward_v2(const ForwardParams& params) {
  return v2::with_config<Element, kHeadDim>(params, [&](auto config) {
    using Config = decltype(config);
    const AttentionShape& s = params.shape;
    return KernelPlan{Config::kBlockM, Config::kBlockN, Config::kNumWarps,
                      sizeof(typename Config::SharedStorage),
                      s.batch * s.heads_q * v2::num_m_blocks<Config>(s)};
  });
}

}  // namespace flash_ext
