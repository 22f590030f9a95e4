// Before the main kernel, in one launch: per query row delta = rowsum(dO * O) - dL and L in units
// of log2; dQ's accumulator cleared; per key head the mean of K.
#pragma once

#include "common/numeric.cuh"
#include "ptx/griddepcontrol.cuh"
#include "v3/backward/row_blocks.cuh"
#include "v3/backward/steps.cuh"
#include "v3/backward/workspace.h"

namespace flash_ext::v3::backward {

inline constexpr int kPreprocessThreads = 256;

// Rows that go into the mean: of many keys every second, and no more than these, evenly spaced. Any
// vector will do that is the same for all key blocks; the nearer to the mean, the more of the error
// it removes. (2,048 rows took a head's thread block longer than all the rest.)
inline constexpr int kMeanRows = 512;
inline constexpr int kManyKeys = 512;

template <typename Element>
__device__ __forceinline__ const Element* row_of(const TensorView& view, int64_t batch_idx,
                                                 int64_t head_idx, int64_t row) {
  return static_cast<const Element*>(view.data) + batch_idx * view.batch_stride +
         head_idx * view.head_stride + row * view.row_stride;
}

// Eight elements of a row; zeros where it is shorter.
template <typename Element>
__device__ __forceinline__ uint4 load_eight(const Element* row, int col, int cols) {
  return col < cols ? *reinterpret_cast<const uint4*>(row + col) : make_uint4(0, 0, 0, 0);
}

template <typename Element>
__device__ __forceinline__ float element(const uint4& eight, int i) {
  return to_float(reinterpret_cast<const Element*>(&eight)[i]);
}

// Key blocks add to the dQ of a block of query rows in turns, which begin with the first that does.
template <int kBlockM>
__device__ __forceinline__ int first_turn(const KernelParams&, int, int, int) {
  return 0;
}
template <int kBlockM>
__device__ __forceinline__ int first_turn(const GeneralKernelParams& p, int batch_idx, int head_idx,
                                          int m_block) {
  const int first = p.band.key_begin(m_block * kBlockM) / kBackwardBlockN;
  if (p.block_mask.data == nullptr) return first;
  return MaskGrid<kBlockM>(p).next_on(batch_idx, head_idx, m_block, first);
}

// Under a softcap none is: scores are small, and a bias is the caller's.
__device__ __forceinline__ bool subtracts_huge_lse(const KernelParams&) { return true; }
__device__ __forceinline__ bool subtracts_huge_lse(const GeneralKernelParams& p) {
  return !p.has_softcap;
}

// One block of query rows. A row is read by kHeadDim / 8 neighbouring threads.
template <typename Element, int kHeadDim, int kBlockM, typename Params>
__device__ __forceinline__ void row_statistics(const Params& p, int64_t block) {
  constexpr int kThreadsPerRow = kHeadDim / 8;
  constexpr int kRowsPerPass = kPreprocessThreads / kThreadsPerRow;
  constexpr int kPasses = kBlockM / kRowsPerPass;
  const BlockRows rows = rows_of_block<kBlockM>(p, block);
  const int row0 = rows.row0;
  const int col = threadIdx.x % kThreadsPerRow * 8;
  const int row_in_pass = threadIdx.x / kThreadsPerRow;
  __shared__ float row_sums[kBlockM];

  // Everything is asked for first; elements, since as floats they would leave room for fewer warps.
  const int own_row = row0 + threadIdx.x;
  const int64_t at = rows.lse_begin + own_row;
  const bool owns_row = threadIdx.x < kBlockM && own_row < rows.seqlen_q;
  const float lse = owns_row ? p.lse[at] : -INFINITY;
  const float dlse = owns_row && p.dlse != nullptr ? p.dlse[at] : 0.f;
  uint4 o[kPasses], d[kPasses];
  const int64_t first_row = rows.first_row + row0 + row_in_pass;
  const Element* o_row = row_of<Element>(p.out, rows.tensor_batch_idx, rows.head_idx, first_row);
  const Element* d_row = row_of<Element>(p.dout, rows.tensor_batch_idx, rows.head_idx, first_row);
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const bool is_row = row0 + i * kRowsPerPass + row_in_pass < rows.seqlen_q;
    o[i] = load_eight(o_row, col, is_row ? p.head_dim : 0);
    d[i] = load_eight(d_row, col, is_row ? p.head_dim : 0);
    o_row += kRowsPerPass * p.out.row_stride;
    d_row += kRowsPerPass * p.dout.row_stride;
  }
  if (p.dq_accum != nullptr) {
    auto* accum = reinterpret_cast<float4*>(p.dq_accum + block * (kBlockM * kHeadDim));
#pragma unroll
    for (int i = 0; i < kBlockM * kHeadDim / 4 / kPreprocessThreads; ++i) {
      accum[i * kPreprocessThreads + threadIdx.x] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
  if (p.dq_row_sum != nullptr && threadIdx.x < 2 * kBlockM) {
    p.dq_row_sum[block * (2 * kBlockM) + threadIdx.x] = 0.f;
  }
  if (p.dq_turns != nullptr && threadIdx.x < 2) {
    p.dq_turns[2 * block + threadIdx.x] = first_turn<kBlockM>(
        p, static_cast<int>(rows.batch_idx), static_cast<int>(rows.head_idx), row0 / kBlockM);
  }
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += element<Element>(o[i], j) * element<Element>(d[i], j);
#pragma unroll
    for (int offset = kThreadsPerRow / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    if (col == 0) row_sums[i * kRowsPerPass + row_in_pass] = sum;
  }
  auto& statistics = reinterpret_cast<RowStatistics<kBlockM>*>(p.row_statistics)[block];
  const bool is_huge = subtracts_huge_lse(p) && is_huge_lse(lse);
  const bool has_huge = __syncthreads_or(is_huge);
  if (threadIdx.x < kBlockM) {
    const float delta = row_sums[threadIdx.x] - (lse != -INFINITY ? dlse : 0.f);
    p.delta[block * kBlockM + threadIdx.x] = scaled_delta(p, delta);
    const float lse_log2 = (is_huge ? 0.f : backward_lse_log2(lse)) -
                           static_cast<float>(kWeightShift<Element, kHeadDim>);
    statistics.lse_log2[threadIdx.x] = shifted_lse(p, lse_log2);
    if constexpr (kIsGeneral<Params>) {
      const float weight = owns_row ? sink_weight(p, static_cast<int>(rows.head_idx), lse) : 0.f;
      row_sums[threadIdx.x] = -weight * delta;
    }
  }
  if (threadIdx.x == 0) {
    statistics.has_huge = has_huge;
    statistics.batch_head = static_cast<int>(rows.batch_idx * p.heads_q + rows.head_idx);
    statistics.row0 = row0;
  }
  if constexpr (kIsGeneral<Params>) {
    if (threadIdx.x == 0 && p.alibi_slopes.data != nullptr) {
      statistics.slope = p.slope_factor *
                         p.alibi_slopes.template at<const float>(rows.batch_idx, rows.head_idx)[0];
    }
    if (p.dsink_blocks == nullptr) return;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    float sum = 0.f;
    for (int row = static_cast<int>(threadIdx.x); row < kBlockM; row += 32) sum += row_sums[row];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    if (threadIdx.x == 0) p.dsink_blocks[block] = sum;
  }
}

// Rounded to an element, so that K minus it is one rounding of the true difference. Columns whose
// mean is small beside their values keep 0: subtracting it would only round K again.
//
// Under a softcap the mean is 0, and dQ comes from K as it is: what a row of dS sums to behind the
// softcap nobody knows but the sum itself.
template <typename Element, int kHeadDim, typename Params>
__device__ __forceinline__ void key_mean(const Params& p, int batch_kv_head) {
  constexpr int kThreadsPerRow = kHeadDim / 8;
  constexpr int kRowsPerPass = kPreprocessThreads / kThreadsPerRow;
  constexpr float kSmallMean = 0.25f;
  __shared__ float partial[2][kRowsPerPass][kHeadDim];
  if constexpr (kIsGeneral<Params>) {
    if (p.has_softcap) {
      if (threadIdx.x < kHeadDim) p.key_mean[int64_t{batch_kv_head} * kHeadDim + threadIdx.x] = 0.f;
      return;
    }
  }
  const int col = threadIdx.x % kThreadsPerRow * 8;
  const int row_in_pass = threadIdx.x / kThreadsPerRow;
  const HeadKeys keys = keys_of(p, batch_kv_head / p.heads_kv);
  const Element* k =
      row_of<Element>(p.k, keys.tensor_batch_idx, batch_kv_head % p.heads_kv, keys.first_row);
  const int step = max(ceil_div(keys.seqlen_k, kMeanRows), keys.seqlen_k < kManyKeys ? 1 : 2);
  const int num_rows = ceil_div(keys.seqlen_k, step);
  float sum[8] = {}, sum_of_squares[8] = {};
#pragma unroll 4
  for (int i = row_in_pass; i < num_rows; i += kRowsPerPass) {
    const uint4 eight = load_eight(k + int64_t{i} * step * p.k.row_stride, col, p.head_dim);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float x = element<Element>(eight, j);
      sum[j] += x;
      sum_of_squares[j] += x * x;
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    partial[0][row_in_pass][col + j] = sum[j];
    partial[1][row_in_pass][col + j] = sum_of_squares[j];
  }
  __syncthreads();
  if (threadIdx.x >= kHeadDim) return;
  float total[2] = {};
  for (int i = 0; i < kRowsPerPass; ++i) {
    total[0] += partial[0][i][threadIdx.x];
    total[1] += partial[1][i][threadIdx.x];
  }
  const auto divisor = static_cast<float>(kIsGeneral<Params> ? max(num_rows, 1) : num_rows);
  const float mean = total[0] / divisor;
  const float mean_of_squares = total[1] / divisor;
  const bool is_small = mean * mean <= kSmallMean * kSmallMean * mean_of_squares;
  p.key_mean[int64_t{batch_kv_head} * kHeadDim + threadIdx.x] =
      is_small ? 0.f : to_float(from_float<Element>(mean));
}

// The key heads first: theirs is the longer work. Then the query rows from the last to the first:
// what was touched last is what the main kernel begins with, and finds in L2.
template <typename Element, int kHeadDim, int kBlockM, typename Params>
__global__ void __launch_bounds__(kPreprocessThreads)
    preprocess_kernel(const __grid_constant__ Params p) {
  // For the kernel that prepares sequences. What it wrote the main kernel then sees from the start.
  if constexpr (kIsGeneral<Params>) ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const unsigned key_heads = num_key_heads(p);
  if (blockIdx.x < key_heads) {
    key_mean<Element, kHeadDim>(p, static_cast<int>(blockIdx.x));
  } else {
    row_statistics<Element, kHeadDim, kBlockM>(p, gridDim.x - 1 - blockIdx.x);
  }
}

}  // namespace flash_ext::v3::backward
