// After a forward whose keys were split: O and L of a row from those of its shares.
#pragma once

#include "common/numeric.cuh"
#include "common/online_softmax.cuh"
#include "params.h"
#include "v3/forward/kernel_params.cuh"

namespace flash_ext::v3::forward {

struct MergeParams {
  Shares shares;
  TensorView out;
  float* lse;
  SoftmaxScale scale;
  int num_splits;
  int64_t num_rows;  // batch * heads_q * seqlen_q
  int heads_q;
  int seqlen_q;
  int head_dim;
};

inline constexpr int kMergeThreads = 128;

// Eight columns a thread. Shares are weighed relative to the largest maximum, as blocks are.
template <typename Element, int kHeadDim>
__global__ void __launch_bounds__(kMergeThreads)
    merge_shares_kernel(const __grid_constant__ MergeParams p) {
  constexpr int kThreadsPerRow = kHeadDim / 8;
  constexpr int kRowsPerBlock = kMergeThreads / kThreadsPerRow;
  const int64_t index = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / kThreadsPerRow;
  const int col = threadIdx.x % kThreadsPerRow * 8;
  if (threadIdx.x >= kRowsPerBlock * kThreadsPerRow || index >= p.num_rows) return;

  float row_max = -INFINITY;
  for (int s = 0; s < p.num_splits; ++s) {
    row_max = fmaxf(row_max, p.shares.stats[s * p.num_rows + index].x);
  }
  const ExponentBase base(row_max, p.scale.log2);
  float row_sum = 0.f;
  float acc_o[8] = {};
  for (int s = 0; s < p.num_splits; ++s) {
    const int64_t share = s * p.num_rows + index;
    const float2 stats = p.shares.stats[share];
    if (stats.y == 0.f) continue;  // it has no O
    const float weight = base.rescale(stats.x, p.scale.log2) * stats.y;
    const auto* o = reinterpret_cast<const float4*>(p.shares.out + share * kHeadDim + col);
    const float4 left = o[0], right = o[1];
    row_sum += weight;
    acc_o[0] += weight * left.x, acc_o[1] += weight * left.y;
    acc_o[2] += weight * left.z, acc_o[3] += weight * left.w;
    acc_o[4] += weight * right.x, acc_o[5] += weight * right.y;
    acc_o[6] += weight * right.z, acc_o[7] += weight * right.w;
  }
  if (col == 0) p.lse[index] = log_sum_exp(row_max * p.scale.natural, row_sum);
  if (col >= p.head_dim) return;
  const float inverse = row_sum > 0.f ? 1.f / row_sum : 0.f;
  const int64_t batch_head = index / p.seqlen_q;
  Element* const out =
      static_cast<Element*>(p.out.data) + batch_head / p.heads_q * p.out.batch_stride +
      batch_head % p.heads_q * p.out.head_stride + index % p.seqlen_q * p.out.row_stride + col;
  *reinterpret_cast<uint4*>(out) =
      make_uint4(pack<Element>(acc_o[0] * inverse, acc_o[1] * inverse),
                 pack<Element>(acc_o[2] * inverse, acc_o[3] * inverse),
                 pack<Element>(acc_o[4] * inverse, acc_o[5] * inverse),
                 pack<Element>(acc_o[6] * inverse, acc_o[7] * inverse));
}

}  // namespace flash_ext::v3::forward
