// What the kernels of the v3 backward are launched with.
#pragma once

#include <cuda.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common/mask.h"
#include "common/online_softmax.cuh"
#include "params.h"
#include "v3/backward/scheduler.cuh"

namespace flash_ext::v3::backward {

// At head_dim 256 weights go from one warpgroup to another as elements. The smallest fp16 is 2^-24:
// there they are multiplied by 2^14 on the way, lest too many become 0.
template <typename Element, int kHeadDim>
inline constexpr int kWeightShift = kHeadDim == 256 && std::is_same_v<Element, __half> ? 14 : 0;

// The log-sum-exp of a block's query rows as the main kernel copies it to shared memory.
template <int kBlockM>
struct alignas(16) RowStatistics {
  // +inf: a row that sees nothing, or padding; 0: is_huge_lse(); all less kWeightShift
  float lse_log2[kBlockM];
  int has_huge;    // there is such a row
  int batch_head;  // whose rows these are
  int row0;        // the first of them
  float slope;     // of ALiBi, as GeneralKernelParams::slope_factor makes it
};

// Of a log-sum-exp in natural units: see kHugeLog2, and subtract_huge_lse(). A float mask may bring
// it so near to the largest number that in units of log2 it is infinite.
__device__ __forceinline__ bool is_huge_lse(float lse) {
  return fabsf(lse) * static_cast<float>(kLog2e) > kHugeLog2 && fabsf(lse) != INFINITY;
}

struct KernelParams {
  CUtensorMap q_map, k_map, v_map, dout_map;  // boxes of kBlockM and kThreadBlockN rows
  CUtensorMap dk_map, dv_map;                 // boxes of 64 rows, where these are asked for
  TensorView k, out, dout, dq, dk, dv;
  const float* lse;
  const float* dlse;  // nullptr: no gradient reached L
  Mask mask;
  SoftmaxScale scale;
  float softmax_scale;
  int head_dim;
  int heads_q;
  int heads_kv;
  int group_size;
  int num_m_blocks;
  Schedule schedule;
  // Sections of the workspace, see BackwardWorkspace.
  float* row_statistics;
  float* delta;
  float* key_mean;
  float* dq_accum;    // nullptr: dQ is not asked for
  float* dq_row_sum;  // nullptr: dQ is accumulated without the mean of K
  int* dq_turns;      // nullptr: dQ's summands may be added in any order
};

// The block of query rows that is m_block-th of its head, counted over all heads.
__device__ __forceinline__ int64_t row_block(const KernelParams& p, int batch_idx, int head_idx,
                                             int m_block) {
  return (int64_t{batch_idx} * p.heads_q + head_idx) * p.num_m_blocks + m_block;
}

// dQ's fp32 accumulator holds, for every 64 query rows, a 64 x kHeadDim accumulator as the threads
// of a warpgroup hold it: eight columns after eight columns, thread after thread, four floats each.
// Those of one row_block() are contiguous, block_m * kHeadDim floats.
template <int kHeadDim>
__device__ __forceinline__ constexpr int dq_accum_offset(int warpgroup_rows, int n, int thread) {
  return ((warpgroup_rows * (kHeadDim / 8) + n) * 128 + thread) * 4;
}

}  // namespace flash_ext::v3::backward
