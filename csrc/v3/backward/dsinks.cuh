// dsinks: what the preprocess kernel has summed over each block of query rows, summed over these.
#pragma once

#include "v3/backward/general_params.cuh"

namespace flash_ext::v3::backward {

struct DsinksParams {
  const float* blocks;  // (batch, heads_q, num_m_blocks)
  HeadTensor dsinks;
  int batch;
  int heads_q;
  int num_m_blocks;
};

inline constexpr int kDsinksThreads = 128;

// A thread block a head, in one order in every run; in fp64, for the rows may be millions.
template <int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    dsinks_kernel(const __grid_constant__ DsinksParams p) {
  __shared__ double partial[kNumThreads];
  const int head_idx = static_cast<int>(blockIdx.x);
  double sum = 0.0;
  for (int batch_idx = 0; batch_idx < p.batch; ++batch_idx) {
    const float* from = p.blocks + (int64_t{batch_idx} * p.heads_q + head_idx) * p.num_m_blocks;
    for (int i = static_cast<int>(threadIdx.x); i < p.num_m_blocks; i += kNumThreads) {
      sum += from[i];
    }
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kNumThreads; ++i) sum += partial[i];
  *p.dsinks.at<float>(0, head_idx) = static_cast<float>(sum);
}

}  // namespace flash_ext::v3::backward
