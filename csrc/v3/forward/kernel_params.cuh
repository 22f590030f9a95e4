// What the v3 kernel is launched with.
#pragma once

#include <cuda.h>

#include "common/mask.h"
#include "common/merge_shares.cuh"
#include "common/online_softmax.cuh"
#include "params.h"
#include "v3/forward/scheduler.cuh"

namespace flash_ext::v3::forward {

struct KernelParams {
  CUtensorMap q_map, k_map, v_map, out_map;
  TensorView out;
  int head_dim;  // of the tensors, at most kHeadDim
  float* lse;
  Shares shares;  // where the keys are split
  Mask mask;
  SoftmaxScale scale;
  int group_size;
  Schedule schedule;
};

}  // namespace flash_ext::v3::forward
