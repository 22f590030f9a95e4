// Around the main kernels of the general backward: per query row L in units of log2, D and what dS
// sums to; per key head a mean of K; and the sums over rows that dslopes and dsinks are.
#pragma once

#include "backward/general/params.cuh"
#include "backward/preprocess.cuh"

namespace flash_ext::backward {

template <typename Element, int kHeadDim>
inline constexpr int kStatsRowsPerBlock = kPreprocessThreads / (kHeadDim / 8);

// Padding up to a multiple of kBackwardRowPadding gets L = inf, with which every weight is 0.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kPreprocessThreads)
    general_row_stats_kernel(const __grid_constant__ GeneralKernelParams p) {
  constexpr int kThreadsPerRow = kHeadDim / 8;
  const TileOrder::Place place = p.order.place(static_cast<int>(blockIdx.x));
  const int batch_idx = place.head / p.heads_q;
  const int head_idx = place.head % p.heads_q;
  const Sequence sequence = p.general.sequences[batch_idx];
  const int row0 = place.rank * kStatsRowsPerBlock<Element, kHeadDim>;
  constexpr int kPadding = static_cast<int>(kBackwardRowPadding);
  if (row0 >= ceil_div(sequence.seqlen_q, kPadding) * kPadding) return;
  const int row = row0 + static_cast<int>(threadIdx.x) / kThreadsPerRow;
  const int col = static_cast<int>(threadIdx.x) % kThreadsPerRow * 8;
  const bool is_row = row < sequence.seqlen_q;

  float sum = 0.f;
  if (is_row) {
    const auto rows = [&](const TensorView& view) {
      return rows_of_sequence<const Element>(view, batch_idx, head_idx, sequence.q_begin,
                                             p.head_dim);
    };
    float o[8], d[8];
    load_eight(o, rows(p.out), row, col);
    load_eight(d, rows(p.dout), row, col);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += o[i] * d[i];
  }
#pragma unroll
  for (int offset = kThreadsPerRow / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  if (col != 0) return;
  const int64_t i = p.general.sequences.lse_index(sequence, batch_idx, head_idx, p.heads_q, row);
  const float lse = is_row ? p.lse[i] : -INFINITY;
  const float dlse = is_row && p.dlse != nullptr && lse != -INFINITY ? p.dlse[i] : 0.f;
  const float delta = sum - dlse;
  float sink_weight = 0.f;
  if (is_row && p.general.sinks.data != nullptr) {
    const float sink = *p.general.sinks.at<const float>(batch_idx, head_idx);
    if (sink != -INFINITY) sink_weight = expf(sink - lse);
  }
  const int64_t to = p.rows.begin(sequence, batch_idx, head_idx, p.heads_q) + row;
  p.delta[to] = delta;
  p.lse_log2[to] = backward_lse_log2(lse);
  p.row_sum[to] = dlse + sink_weight * delta;
  if (p.dsink_rows != nullptr) p.dsink_rows[to] = -sink_weight * delta;
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kMeanThreads)
    general_key_mean_kernel(const __grid_constant__ GeneralKernelParams p) {
  const int kv_head = static_cast<int>(blockIdx.x);
  const int batch_idx = kv_head / p.heads_kv;
  const Sequence sequence = p.general.sequences[batch_idx];
  float* const mean = p.key_mean + static_cast<int64_t>(kv_head) * kHeadDim;
  if (sequence.seqlen_k == 0) {
    if (threadIdx.x < kHeadDim) mean[threadIdx.x] = 0.f;
    return;
  }
  const auto k = rows_of_sequence<const Element>(p.k, batch_idx, kv_head % p.heads_kv,
                                                 sequence.k_begin, p.head_dim);
  compute_key_mean<Element, kHeadDim>(k, sequence.seqlen_k, mean);
}

// A gradient of one number for each (batch, head) or head, from what its rows contribute.
struct HeadSumParams {
  const float* from;  // as StatsRows says
  HeadTensor to;
  StatsRows rows;
  Sequences sequences;
  int batch;
  int heads_q;
};

inline constexpr int kHeadSumThreads = 256;

// A thread block a number, in one order in every run; in fp64, for the rows may be millions.
template <int kNumThreads>
__global__ void __launch_bounds__(kNumThreads)
    head_sum_kernel(const __grid_constant__ HeadSumParams p) {
  __shared__ double partial[kNumThreads];
  const int thread_idx = threadIdx.x;
  const int head_idx = static_cast<int>(blockIdx.x) % p.heads_q;
  const bool sums_batch = p.to.batch_stride == 0;
  const int first = sums_batch ? 0 : static_cast<int>(blockIdx.x) / p.heads_q;
  const int last = sums_batch ? p.batch - 1 : first;
  double sum = 0.0;
  for (int batch_idx = first; batch_idx <= last; ++batch_idx) {
    const Sequence sequence = p.sequences[batch_idx];
    const float* from = p.from + p.rows.begin(sequence, batch_idx, head_idx, p.heads_q);
    for (int row = thread_idx; row < sequence.seqlen_q; row += kNumThreads) sum += from[row];
  }
  partial[thread_idx] = sum;
  __syncthreads();
  if (thread_idx != 0) return;
  for (int i = 1; i < kNumThreads; ++i) sum += partial[i];
  *p.to.at<float>(first, head_idx) = static_cast<float>(sum);
}

}  // namespace flash_ext::backward
