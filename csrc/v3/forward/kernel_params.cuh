// What the v3 kernel is launched with.
#pragma once

#include <cuda.h>

#include "common/mask.h"
#include "common/online_softmax.cuh"
#include "params.h"
#include "v3/forward/scheduler.cuh"

namespace flash_ext::v3::forward {

// Where the keys are split: O / l, m and l of every share and row, for merge_shares_kernel.
struct Shares {
  float* out;     // (split, batch, heads_q, seqlen_q, kHeadDim); nullptr: the keys are not split
  float2* stats;  // (split, batch, heads_q, seqlen_q): m of the unscaled scores, and l
};

struct KernelParams {
  CUtensorMap q_map, k_map, v_map, out_map;
  TensorView out;
  int head_dim;  // of the tensors, at most kHeadDim
  float* lse;
  Shares shares;
  Mask mask;
  SoftmaxScale scale;
  int group_size;
  Schedule schedule;
};

}  // namespace flash_ext::v3::forward
