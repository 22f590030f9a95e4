// dK and dV of a group of query heads that was split into parts: in fp32 in memory, and added up.
#pragma once

#include "common/divisor.cuh"
#include "common/numeric.cuh"
#include "params.h"
#include "ptx/griddepcontrol.cuh"

namespace flash_ext::backward {

// A warp's accumulator to row0, col0 of a part, as far as it has rows. Four neighbouring threads
// fill a sector of 32 bytes.
template <int kHeadDim, int kM, int kN>
__device__ __forceinline__ void store_part(float* part, const float (&acc)[kM][kN][4], int row0,
                                           int col0, int num_rows, int thread_idx) {
  const int lane_idx = thread_idx % 32;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 16 * m + 8 * half + lane_idx / 4;
      if (row >= num_rows) continue;
      float* const to = part + static_cast<int64_t>(row) * kHeadDim + col0 + lane_idx % 4 * 2;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        store_pair(to + 8 * n, acc[m][n][2 * half], acc[m][n][2 * half + 1]);
      }
    }
  }
}

// dK or dV, as the sum of its parts times a factor.
struct PartSum {
  const float* parts;  // (batch, heads_kv, parts, seqlen_k, padded head_dim)
  TensorView out;
  float factor;
};

struct PartSumParams {
  PartSum sums[2];  // thread blocks for the second, where there is one, follow those for the first
  int num_parts;
  int num_heads;  // batch * heads_kv
  int seqlen_k;
  int head_dim;
  Divisor heads_kv;
  Divisor blocks_per_head;
};

inline constexpr int kSumThreads = 256;

// Rows of one gradient that a thread block adds up, four columns a thread.
template <int kHeadDim>
inline constexpr int kSumRows = kSumThreads / (kHeadDim / 4);

// In the order of the parts, so that the sum has the same bits in every run.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(const __grid_constant__ PartSumParams p) {
  constexpr int kThreadsPerRow = kHeadDim / 4;
  const int block_idx = static_cast<int>(blockIdx.x);
  const int head = block_idx / p.blocks_per_head;
  const int row = (block_idx - head * p.blocks_per_head) * kSumRows<kHeadDim> +
                  static_cast<int>(threadIdx.x) / kThreadsPerRow;
  const int col = static_cast<int>(threadIdx.x) % kThreadsPerRow * 4;
  ptx::griddepcontrol_wait();
  if (row >= p.seqlen_k || col >= p.head_dim) return;
  const bool is_first = head < p.num_heads;
  const int batch_head = is_first ? head : head - p.num_heads;
  const PartSum& sum = is_first ? p.sums[0] : p.sums[1];

  const int64_t part_floats = static_cast<int64_t>(p.seqlen_k) * kHeadDim;
  const float* from = sum.parts + batch_head * (p.num_parts * part_floats) +
                      static_cast<int64_t>(row) * kHeadDim + col;
  float total[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
  for (int part = 0; part < p.num_parts; ++part) {
    const float4 x = *reinterpret_cast<const float4*>(from + part * part_floats);
    total[0] += x.x;
    total[1] += x.y;
    total[2] += x.z;
    total[3] += x.w;
  }

  Element* const to =
      static_cast<Element*>(sum.out.data) + batch_head / p.heads_kv * sum.out.batch_stride +
      batch_head % p.heads_kv * sum.out.head_stride + row * sum.out.row_stride + col;
  if (sum.out.aligned16 && col + 4 <= p.head_dim) {
    store_pair(to, sum.factor * total[0], sum.factor * total[1]);
    store_pair(to + 2, sum.factor * total[2], sum.factor * total[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (col + i < p.head_dim) to[i] = from_float<Element>(sum.factor * total[i]);
  }
}

}  // namespace flash_ext::backward
