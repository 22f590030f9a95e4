// v3 backward at head_dim up to 128.
#pragma once

#include "v3/backward/consumer.cuh"
#include "v3/backward/producer.cuh"

namespace flash_ext::v3::backward {

template <typename Config>
__global__ void __launch_bounds__(Config::kNumThreads, 1)
    backward_kernel(const __grid_constant__ KernelParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kConsumerWarps = 4 * Config::kConsumers;
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(smem_bytes);
  if (threadIdx.x == 0) {
    smem.tile_barriers.init(1, kConsumerWarps + (Config::kSharesDq ? 1 : 2));
    smem.query_barriers.init(1, kConsumerWarps);
    smem.k_barriers.init(1, kConsumerWarps);
    smem.v_barriers.init(1, kConsumerWarps);
    smem.k_centred_barriers.init(kConsumerWarps, kConsumerWarps);
    smem.gradient_barriers.init(kConsumerWarps, 1);
    smem.dq_barriers.init(4, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  // The shuffle tells ptxas that a whole warp has the same value.
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (warp_idx < 4) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x == 0) Producer<Config>(smem, p).run();
    if (threadIdx.x == 32) send_gradients<Config>(smem, p);
    if (!Config::kSharesDq && threadIdx.x == 64) add_dq<Config>(smem, p);
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    Consumer<Config>(smem, p, warp_idx / 4 - 1).run();
  }
#endif
}

}  // namespace flash_ext::v3::backward
