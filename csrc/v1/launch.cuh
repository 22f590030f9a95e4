// Host side of the v1 forward.
#pragma once

#include "common/launch_kernel.cuh"
#include "launch.h"
#include "v1/kernel.cuh"
#include "v1/workspace.h"

namespace flash_ext {

template <typename Element, int kHeadDim>
void launch_forward_v1(const ForwardParams& params, CudaStream stream) {
  using Config = v1::Config<Element, kHeadDim>;
  const AttentionShape& s = params.shape;
  const int64_t rows = s.batch * s.heads_q * s.seqlen_q;
  float* o = params.workspace;
  float* l = o + rows * kHeadDim;
  const v1::KernelParams p{params.q,
                           params.k,
                           params.v,
                           params.out,
                           static_cast<float*>(params.lse),
                           params.mask,
                           SoftmaxScale(params.softmax_scale),
                           static_cast<int>(s.head_dim),
                           static_cast<int>(s.heads_q),
                           static_cast<int>(s.group_size()),
                           o,
                           l,
                           l + rows};
  launch_kernel(v1::forward_kernel<Config>, s.batch * s.heads_q, Config::kNumThreads,
                sizeof(typename Config::SharedStorage), stream, "the v1 forward kernel", p, s);
}

template <typename Element, int kHeadDim>
KernelPlan plan_forward_v1(const ForwardParams& params) {
  using Config = v1::Config<Element, kHeadDim>;
  return {Config::kBlockM, Config::kBlockN, Config::kNumWarps,
          sizeof(typename Config::SharedStorage), params.shape.batch * params.shape.heads_q};
}

}  // namespace flash_ext
