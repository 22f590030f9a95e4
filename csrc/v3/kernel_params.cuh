// What the v3 kernel is launched with.
#pragma once

#include <cuda.h>

#include "common/mask.h"
#include "common/online_softmax.cuh"
#include "v3/scheduler.cuh"

namespace flash_ext::v3 {

struct KernelParams {
  CUtensorMap q_map, k_map, v_map, out_map;
  float* lse;
  Mask mask;
  SoftmaxScale scale;
  int group_size;
  Schedule schedule;
};

}  // namespace flash_ext::v3
