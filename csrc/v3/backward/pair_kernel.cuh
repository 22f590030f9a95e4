#pragma once

#include "ptx/warpgroup.cuh"
#include "v3/backward/pair_dk.cuh"
#include "v3/backward/pair_dq.cuh"
#include "v3/backward/pair_dv.cuh"
#include "v3/backward/pair_producer.cuh"

namespace flash_ext::v3::backward {

template <typename Config>
__global__ void
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // what else is compiled for, and never runs it, has no clusters
__cluster_dims__(Config::kClusterSize)
#endif
    __launch_bounds__(Config::kNumThreads, 1) pair_kernel(const __grid_constant__ KernelParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(smem_bytes);
  if (threadIdx.x == 0) {
    smem.k_barriers.init(3 * 4);  // a warp at a time
    smem.v_barriers.init(4);
    smem.q_barriers.init(2 * 4);
    smem.dout_barriers.init(2 * 4);
    for (auto& stage : smem.p_full) {
      for (auto& bar : stage) ptx::mbarrier_init(bar, 1);
    }
    smem.ds_barriers.init(4, 3 * 4);
    for (auto& bar : smem.other_ds_full) ptx::mbarrier_init(bar, 1);
    ptx::mbarrier_init_fence();
  }
  ptx::cluster_sync();

  // The shuffle tells ptxas that a whole warp has the same value.
  const int warpgroup_idx = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (warpgroup_idx == 0) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x == 0) produce_keys<Config>(smem, p);
    if (threadIdx.x == 32) produce_queries<Config>(smem, p);
    if (threadIdx.x == 64) produce_douts<Config>(smem, p);
  } else if (warpgroup_idx == 1) {
    ptx::setmaxnreg_inc<Config::kDvRegisters>();
    ValueGradient<Config>(smem, p).run();
  } else if (warpgroup_idx == 2) {
    ptx::setmaxnreg_inc<Config::kDkRegisters>();
    KeyGradient<Config>(smem, p).run();
  } else {
    ptx::setmaxnreg_dec<Config::kDqRegisters>();
    QueryGradient<Config>(smem, p).run();
  }
  __syncwarp();
  ptx::cluster_sync();  // the other thread block may still write to this one's shared memory
#endif
}

}  // namespace flash_ext::v3::backward
