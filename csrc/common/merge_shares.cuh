// After a forward whose keys were split: O and L of a row from those of its shares.
#pragma once

#include "common/launch_kernel.cuh"
#include "common/numeric.cuh"
#include "common/online_softmax.cuh"
#include "params.h"

namespace flash_ext {

// Of every share and row, in the workspace.
struct Shares {
  float* out;     // O / l: (split, batch, heads_q, seqlen_q, kHeadDim)
  float2* stats;  // (split, batch, heads_q, seqlen_q): m of the unscaled scores, and l
};

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

// Eight columns of a row, or what there is of them, `cols`.
template <typename Element>
__device__ __forceinline__ void store_eight(Element* to, const float (&x)[8], int cols,
                                            bool aligned16) {
  if (aligned16 && cols >= 8) {
    if constexpr (sizeof(Element) == 2) {
      *reinterpret_cast<uint4*>(to) =
          make_uint4(pack<Element>(x[0], x[1]), pack<Element>(x[2], x[3]),
                     pack<Element>(x[4], x[5]), pack<Element>(x[6], x[7]));
    } else {
      auto* vectors = reinterpret_cast<float4*>(to);
      vectors[0] = make_float4(x[0], x[1], x[2], x[3]);
      vectors[1] = make_float4(x[4], x[5], x[6], x[7]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < cols) to[i] = from_float<Element>(x[i]);
  }
}

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
  const float inverse = inverse_sum(row_sum);
#pragma unroll
  for (int i = 0; i < 8; ++i) acc_o[i] *= inverse;
  const int64_t batch_head = index / p.seqlen_q;
  Element* const out =
      static_cast<Element*>(p.out.data) + batch_head / p.heads_q * p.out.batch_stride +
      batch_head % p.heads_q * p.out.head_stride + index % p.seqlen_q * p.out.row_stride + col;
  store_eight(out, acc_o, p.head_dim - col, p.out.aligned16);
}

// Where the shares lie in the workspace: shares_floats() of it.
template <int kHeadDim>
Shares place_shares(const ForwardParams& params, int64_t num_splits) {
  const AttentionShape& s = params.shape;
  const int64_t rows = num_splits * s.batch * s.heads_q * s.seqlen_q;
  return {params.workspace, reinterpret_cast<float2*>(params.workspace + rows * kHeadDim)};
}

template <typename Element, int kHeadDim>
void launch_merge(const ForwardParams& params, const Shares& shares, int64_t num_splits,
                  cudaStream_t stream) {
  const AttentionShape& s = params.shape;
  constexpr int kRowsPerBlock = kMergeThreads / (kHeadDim / 8);
  const int64_t rows = s.batch * s.heads_q * s.seqlen_q;
  const MergeParams merge{shares,
                          params.out,
                          static_cast<float*>(params.lse),
                          SoftmaxScale(params.softmax_scale),
                          static_cast<int>(num_splits),
                          rows,
                          static_cast<int>(s.heads_q),
                          static_cast<int>(s.seqlen_q),
                          static_cast<int>(s.head_dim)};
  launch_kernel(merge_shares_kernel<Element, kHeadDim>, (rows + kRowsPerBlock - 1) / kRowsPerBlock,
                kMergeThreads, 0, stream, "the merge of split keys", merge, s);
}

}  // namespace flash_ext
