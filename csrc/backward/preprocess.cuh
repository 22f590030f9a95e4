// Before the main kernel: per query row delta = rowsum(dO * O) - dL and L in units of log2, padded
// to whole tiles; dQ's accumulator cleared; per key head a mean of K.
#pragma once

#include "backward/params.cuh"
#include "common/block_range.h"
#include "sm80/copy_tile.cuh"

namespace flash_ext::backward {

inline constexpr int kPreprocessThreads = 128;

// A row is read by kHeadDim / 8 neighbouring threads, eight elements each.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kPreprocessThreads)
    row_stats_kernel(const __grid_constant__ KernelParams p) {
  constexpr int kThreadsPerRow = kHeadDim / 8;
  constexpr int kRowsPerBlock = kPreprocessThreads / kThreadsPerRow;
  const int col = threadIdx.x % kThreadsPerRow * 8;
  const int64_t padded_row =
      static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreadsPerRow;
  const int row = static_cast<int>(padded_row % p.padded_seqlen_q);
  const int64_t batch_head = padded_row / p.padded_seqlen_q;
  const bool is_row = row < p.mask.seqlen_q;  // padding otherwise; uniform over the row's threads

  float sum = 0.f;
  if (is_row) {
    const int64_t batch_idx = batch_head / p.heads_q;
    const int64_t head_idx = batch_head % p.heads_q;
    const auto out = sm80::gmem_rows<const Element>(p.out, batch_idx, head_idx, p.head_dim);
    const auto dout = sm80::gmem_rows<const Element>(p.dout, batch_idx, head_idx, p.head_dim);
    const Element* o = out.data + row * out.row_stride + col;
    const Element* d = dout.data + row * dout.row_stride + col;
    if (out.aligned16 && dout.aligned16 && col + 8 <= p.head_dim) {
      constexpr int kVectors = sizeof(Element) / 2;
      uint4 o_bits[kVectors], d_bits[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        o_bits[i] = reinterpret_cast<const uint4*>(o)[i];
        d_bits[i] = reinterpret_cast<const uint4*>(d)[i];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        sum += to_float(reinterpret_cast<const Element*>(o_bits)[i]) *
               to_float(reinterpret_cast<const Element*>(d_bits)[i]);
      }
    } else {
      for (int i = 0; i < 8 && col + i < p.head_dim; ++i) sum += to_float(o[i]) * to_float(d[i]);
    }
  }
#pragma unroll
  for (int offset = kThreadsPerRow / 2; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  }
  if (col == 0) {
    const int64_t i = batch_head * p.mask.seqlen_q + row;
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
inline constexpr int kMeanThreads = 1024;
inline constexpr float kSmallMean = 0.25f;  // of the root mean square

template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kMeanThreads)
    key_mean_kernel(const __grid_constant__ KernelParams p) {
  constexpr int kRowGroups = kMeanThreads / kHeadDim;
  __shared__ float2 partial[kRowGroups][kHeadDim];  // sums, and of squares
  const int64_t batch_idx = blockIdx.x / p.heads_kv;
  const int64_t kv_head_idx = blockIdx.x % p.heads_kv;
  const auto k = sm80::gmem_rows<const Element>(p.k, batch_idx, kv_head_idx, p.head_dim);
  const int col = threadIdx.x % kHeadDim;
  const int row_group = threadIdx.x / kHeadDim;
  const int step = ceil_div(p.mask.seqlen_k, kMeanRows);
  const int num_rows = ceil_div(p.mask.seqlen_k, step);
  float2 sum = make_float2(0.f, 0.f);
  if (col < p.head_dim) {
#pragma unroll 16
    for (int i = row_group; i < num_rows; i += kRowGroups) {
      const float x = to_float(k.data[static_cast<int64_t>(i) * step * k.row_stride + col]);
      sum.x += x;
      sum.y += x * x;
    }
  }
  partial[row_group][col] = sum;
  __syncthreads();
  if (row_group > 0) return;
#pragma unroll
  for (int i = 1; i < kRowGroups; ++i) {
    sum.x += partial[i][col].x;
    sum.y += partial[i][col].y;
  }
  const float mean = sum.x / static_cast<float>(num_rows);
  const float mean_of_squares = sum.y / static_cast<float>(num_rows);
  const bool is_small = mean * mean <= kSmallMean * kSmallMean * mean_of_squares;
  p.key_mean[static_cast<int64_t>(blockIdx.x) * kHeadDim + col] =
      is_small ? 0.f : to_float(from_float<Element>(mean));
}

}  // namespace flash_ext::backward
