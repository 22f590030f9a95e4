// Before the main kernel: per query row delta = rowsum(dO * O) - dL and L in units of log2, padded
// to whole tiles; dQ's accumulator cleared; per key head a mean of K.
#pragma once

#include "backward/params.cuh"
#include "common/block_range.h"
#include "ptx/griddepcontrol.cuh"
#include "sm80/copy_tile.cuh"

namespace flash_ext::backward {

inline constexpr int kPreprocessThreads = 128;

// A row is read by kHeadDim / 8 neighbouring threads, eight elements each: those from column `col`,
// zeros where the row has ended.
template <typename Element>
__device__ __forceinline__ void load_eight(float (&x)[8], const sm80::GmemRows<const Element>& gmem,
                                           int64_t row, int col) {
  const Element* from = gmem.data + row * gmem.row_stride + col;
  if (gmem.aligned16 && col + 8 <= gmem.num_cols) {
    constexpr int kVectors = sizeof(Element) / 2;
    uint4 bits[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) bits[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = to_float(reinterpret_cast<const Element*>(bits)[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = col + i < gmem.num_cols ? to_float(from[i]) : 0.f;
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kPreprocessThreads)
    row_stats_kernel(const __grid_constant__ KernelParams p) {
  ptx::griddepcontrol_launch_dependents();
  constexpr int kThreadsPerRow = kHeadDim / 8;
  constexpr int kRowsPerBlock = kPreprocessThreads / kThreadsPerRow;
  const int col = threadIdx.x % kThreadsPerRow * 8;
  const int64_t padded_row =
      static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreadsPerRow;
  const int row = static_cast<int>(padded_row % p.padded_seqlen_q);
  const int batch_head = static_cast<int>(padded_row / p.padded_seqlen_q);
  const bool is_row = row < p.mask.seqlen_q;  // padding otherwise; uniform over the row's threads

  float sum = 0.f;
  if (is_row) {
    const int batch_idx = batch_head / p.heads_q;
    const int head_idx = batch_head % p.heads_q;
    float o[8], d[8];
    load_eight(o, sm80::gmem_rows<const Element>(p.out, batch_idx, head_idx, p.head_dim), row, col);
    load_eight(d, sm80::gmem_rows<const Element>(p.dout, batch_idx, head_idx, p.head_dim), row,
               col);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += o[i] * d[i];
  }
#pragma unroll
  for (int offset = kThreadsPerRow / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  if (col == 0) {
    const int64_t i = static_cast<int64_t>(batch_head) * p.mask.seqlen_q + row;
    const float lse = is_row ? p.lse[i] : -INFINITY;
    const float dlse = is_row && p.dlse != nullptr && lse != -INFINITY ? p.dlse[i] : 0.f;
    p.delta[padded_row] = sum - dlse;
    p.lse_log2[padded_row] = backward_lse_log2(lse);
    p.dq_row_sum[padded_row] = -dlse;  // what every row of dS sums to when nothing is rounded
  }
  if (p.dq_accum != nullptr) {
    float4* accum = reinterpret_cast<float4*>(p.dq_accum + padded_row * kHeadDim + col);
    accum[0] = accum[1] = make_float4(0.f, 0.f, 0.f, 0.f);
  }
}

// The mean of the keys, or beyond kMeanRows of them of evenly spaced ones: near enough to the mean
// for the correction of dQ (see correct_and_scale_dq), and the same in every run. Rounded to an
// element, so that K minus it is one rounding of the true difference; and 0 where it is small
// beside the values, for subtracting it would only round K again.
inline constexpr int kMeanRows = 512;
inline constexpr int kMeanThreads = 512;
inline constexpr float kSmallMean = 0.25f;  // of the root mean square

// By a thread block of kMeanThreads.
template <typename Element, int kHeadDim>
__device__ __forceinline__ void compute_key_mean(const sm80::GmemRows<const Element>& k,
                                                 int num_keys, float* key_mean) {
  constexpr int kThreadsPerRow = kHeadDim / 8;
  constexpr int kRowGroups = kMeanThreads / kThreadsPerRow;
  __shared__ float2 partial[kRowGroups][kHeadDim];  // sums, and of squares
  const int col = threadIdx.x % kThreadsPerRow * 8;
  const int row_group = threadIdx.x / kThreadsPerRow;
  const int step = ceil_div(num_keys, kMeanRows);
  const int num_rows = ceil_div(num_keys, step);
  float2 sum[8] = {};
#pragma unroll 8
  for (int i = row_group; i < num_rows; i += kRowGroups) {
    float x[8];
    load_eight(x, k, static_cast<int64_t>(i) * step, col);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sum[j].x += x[j];
      sum[j].y += x[j] * x[j];
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) partial[row_group][col + j] = sum[j];
  __syncthreads();
  if (threadIdx.x >= kHeadDim) return;
  float2 total = partial[0][threadIdx.x];
#pragma unroll
  for (int i = 1; i < kRowGroups; ++i) {
    total.x += partial[i][threadIdx.x].x;
    total.y += partial[i][threadIdx.x].y;
  }
  const float mean = total.x / static_cast<float>(num_rows);
  const float mean_of_squares = total.y / static_cast<float>(num_rows);
  const bool is_small = mean * mean <= kSmallMean * kSmallMean * mean_of_squares;
  key_mean[threadIdx.x] = is_small ? 0.f : to_float(from_float<Element>(mean));
}

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kMeanThreads)
    key_mean_kernel(const __grid_constant__ KernelParams p) {
  ptx::griddepcontrol_launch_dependents();
  const int kv_head = static_cast<int>(blockIdx.x);
  const auto k =
      sm80::gmem_rows<const Element>(p.k, kv_head / p.heads_kv, kv_head % p.heads_kv, p.head_dim);
  compute_key_mean<Element, kHeadDim>(k, p.mask.seqlen_k,
                                      p.key_mean + static_cast<int64_t>(kv_head) * kHeadDim);
  // Not for its own sake: the next kernel waits for this one alone.
  ptx::griddepcontrol_wait();
}

}  // namespace flash_ext::backward
