// After the main kernel: dQ from its fp32 accumulator, with the correction for the mean of K.
#pragma once

#include "backward/kv_kernel.cuh"
#include "common/centred_keys.cuh"
#include "ptx/griddepcontrol.cuh"

namespace flash_ext::backward {

// The thread that added acc_dq[m][n] to the accumulator reads it back, so the layout never matters.
template <typename Config>
__global__ void __launch_bounds__(Config::kNumThreads, 1)
    dq_postprocess_kernel(const __grid_constant__ KernelParams p) {
  using Element = typename Config::Element;
  using Dq = DqTile<Config>;
  constexpr int kBlockM = Config::kBlockM;
  constexpr int kHeadDim = Config::kHeadDim;
  extern __shared__ __align__(128) char smem_bytes[];
  auto& tile = *reinterpret_cast<typename Config::QTile*>(smem_bytes);

  ptx::griddepcontrol_wait();
  const int lane_idx = threadIdx.x % 32;
  const Dq dq(threadIdx.x / 32, lane_idx);
  const TileOrder::Place place = p.order.place(static_cast<int>(blockIdx.x));
  const int m0 = place.rank * kBlockM;
  const int batch_head = place.head;
  const int batch_idx = batch_head / p.heads_q;
  const int head_idx = batch_head % p.heads_q;
  const int64_t tile_row = static_cast<int64_t>(batch_head) * p.padded_seqlen_q + m0;

  constexpr float kFactor = Config::kCentresKeys ? 1.f / kCentredKeyScale<Element> : 1.f;
  float acc_dq[Dq::kM][Dq::kN][4];
  float row_sum_error[Dq::kM][2];
  const float* accum = p.dq_accum + tile_row * kHeadDim;
#pragma unroll
  for (int m = 0; m < Dq::kM; ++m) {
#pragma unroll
    for (int n = 0; n < Dq::kN; ++n) {
      const float4 x = *reinterpret_cast<const float4*>(accum + dq.offset(m, n));
      acc_dq[m][n][0] = kFactor * x.x;
      acc_dq[m][n][1] = kFactor * x.y;
      acc_dq[m][n][2] = kFactor * x.z;
      acc_dq[m][n][3] = kFactor * x.w;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row_sum_error[m][half] = p.dq_row_sum[tile_row + dq.row0 + 16 * m + 8 * half + lane_idx / 4];
    }
  }
  const int64_t kv_head = static_cast<int64_t>(batch_idx) * p.heads_kv + head_idx / p.group_size;
  correct_and_scale_dq(acc_dq, row_sum_error, p.key_mean + kv_head * kHeadDim, p.softmax_scale,
                       dq.col0 + lane_idx % 4 * 2);
  sm80::store_accumulator(tile, acc_dq, dq.row0, dq.col0, lane_idx);
  __syncthreads();
  sm80::store_tile<Config::kNumThreads>(
      sm80::gmem_rows<Element>(p.dq, batch_idx, head_idx, p.head_dim), tile, m0, p.mask.seqlen_q,
      threadIdx.x);
}

}  // namespace flash_ext::backward
