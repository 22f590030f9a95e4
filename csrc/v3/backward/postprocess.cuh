// After the main kernel: dQ from its fp32 accumulator.
#pragma once

#include "common/centred_keys.cuh"
#include "ptx/griddepcontrol.cuh"
#include "sm90/store_rows.cuh"
#include "v3/backward/row_blocks.cuh"

namespace flash_ext::v3::backward {

inline constexpr int kPostprocessThreads = 128;

// 64 query rows and 64 columns, by a warpgroup that reads back what another one added.
template <typename Element, int kHeadDim, int kBlockM, typename Params>
__global__ void __launch_bounds__(kPostprocessThreads)
    postprocess_kernel(const __grid_constant__ Params p) {
  constexpr int kCols = 64;
  constexpr int kTilesN = kCols / 8;
  constexpr int kPieces = kHeadDim / kCols;
  // What the main kernel has left last is still in L2.
  const unsigned block = gridDim.x - 1 - blockIdx.x;
  const int col0 = static_cast<int>(block % kPieces) * kCols;
  const int64_t rows64 = block / kPieces;
  if constexpr (kIsGeneral<Params>) ptx::griddepcontrol_wait();
  const BlockRows rows = rows_of_64<kBlockM>(p, rows64);
  const int row0 = rows.row0 + threadIdx.x / 32 * 16;
  const int batch_idx = static_cast<int>(rows.batch_idx);
  const int head_idx = static_cast<int>(rows.head_idx);
  const int lane_idx = threadIdx.x % 32;

  if constexpr (!kIsGeneral<Params>) ptx::griddepcontrol_wait();
  float acc_dq[kTilesN][4];
  const float* accum = p.dq_accum + rows64 * (64 * kHeadDim);
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    const int offset = dq_accum_offset<kHeadDim>(0, col0 / 8 + n, threadIdx.x);
    const float4 x = __ldcs(reinterpret_cast<const float4*>(accum + offset));
    acc_dq[n][0] = x.x;
    acc_dq[n][1] = x.y;
    acc_dq[n][2] = x.z;
    acc_dq[n][3] = x.w;
  }
  constexpr float kKeyScale = kHeadDim == 256 ? 1.f : kCentredKeyScale<Element>;
  // A row of dS sums to dL, and with a sink to exp(sink - L) D more. The main kernel has left the
  // mean of K out of the product, and with it dL times the mean; or, where there are row sums, it
  // has not, and their error is in the result.
  if (p.dlse != nullptr || p.dq_row_sum != nullptr || has_sinks(p)) {
    const int64_t kv_head = int64_t{batch_idx} * p.heads_kv + head_idx / p.group_size;
    const float* mean = p.key_mean + kv_head * kHeadDim + col0 + lane_idx % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane_idx / 4 + 8 * half;
      const int64_t at = rows.lse_begin + row;
      const bool has_dlse = p.dlse != nullptr && row < rows.seqlen_q && p.lse[at] != -INFINITY;
      float missing = has_dlse ? p.dlse[at] : 0.f;
      if (has_sinks(p) && row < rows.seqlen_q) {
        const float delta = true_delta(p, p.delta[rows64 * 64 + row % 64]);
        missing += sink_weight(p, head_idx, p.lse[at]) * delta;
      }
      if (p.dq_row_sum != nullptr) {
        const float* sums =
            p.dq_row_sum + rows64 * 128 + threadIdx.x / 32 * 16 + lane_idx / 4 + 8 * half;
        missing -= sums[0] + sums[64];
      }
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        acc_dq[n][2 * half] += kKeyScale * missing * mean[8 * n];
        acc_dq[n][2 * half + 1] += kKeyScale * missing * mean[8 * n + 1];
      }
    }
  }
  Element* dq = static_cast<Element*>(p.dq.data) + rows.tensor_batch_idx * p.dq.batch_stride +
                head_idx * p.dq.head_stride + (rows.first_row + row0) * p.dq.row_stride + col0;
  sm90::store_rows(dq, p.dq.row_stride, rows.seqlen_q - row0, p.head_dim - col0, acc_dq,
                   p.softmax_scale / kKeyScale, lane_idx);
}

}  // namespace flash_ext::v3::backward
