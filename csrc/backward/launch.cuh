// Host side of the backward: which kernels run for the gradients that are asked for.
//
//   asked for                        kernels
//   dQ and dK or dV                  row_stats, key_mean, kv (adds dQ up in fp32), dq_postprocess
//   the same, deterministic          row_stats, key_mean, kv, dq
//   dK, dV                           row_stats, kv
//   dQ                               row_stats, key_mean, dq
#pragma once

#include "backward/dq_kernel.cuh"
#include "backward/kv_kernel.cuh"
#include "backward/postprocess.cuh"
#include "backward/preprocess.cuh"
#include "common/cuda_check.h"
#include "launch.h"

namespace flash_ext {

template <typename Element, int kHeadDim>
void launch_backward(const BackwardParams& params, CudaStream stream) {
  using KVConfig = backward::KVConfig<Element, kHeadDim>;
  using QConfig = backward::QConfig<Element, kHeadDim>;
  const AttentionShape& s = params.shape;
  const backward::KernelParams p(params);
  const bool wants_kv = params.dk.data != nullptr || params.dv.data != nullptr;
  const bool wants_dq = params.dq.data != nullptr;
  const bool accumulates_dq = BackwardWorkspace::accumulates_dq(params);
  const auto num_blocks = [](int64_t rows, int block) { return (rows + block - 1) / block; };
  const int64_t num_kv_blocks =
      s.batch * s.heads_kv * num_blocks(s.seqlen_k, KVConfig::kBlockN);

  constexpr int kRowsPerBlock = backward::kPreprocessThreads / (kHeadDim / 8);
  launch_kernel(backward::row_stats_kernel<Element, kHeadDim>,
                s.batch * s.heads_q * (p.padded_seqlen_q / kRowsPerBlock),
                backward::kPreprocessThreads, 0, stream, "the backward's row_stats kernel", p, s);
  if (wants_dq) {
    launch_kernel(backward::key_mean_kernel<Element, kHeadDim>, s.batch * s.heads_kv, kHeadDim, 0,
                  stream, "the backward's key_mean kernel", p, s);
  }
  if (wants_kv) {
    const auto kernel = accumulates_dq ? backward::kv_kernel<KVConfig, true>
                                       : backward::kv_kernel<KVConfig, false>;
    launch_kernel(kernel, num_kv_blocks, KVConfig::kNumThreads,
                  sizeof(typename KVConfig::SharedStorage), stream, "the backward's kv kernel", p, s);
  }
  if (accumulates_dq) {
    launch_kernel(backward::dq_postprocess_kernel<KVConfig>,
                  s.batch * s.heads_q * num_blocks(s.seqlen_q, KVConfig::kBlockM),
                  KVConfig::kNumThreads, sizeof(typename KVConfig::QTile), stream,
                  "the backward's dq_postprocess kernel", p, s);
  } else if (wants_dq) {
    launch_kernel(backward::dq_kernel<QConfig>,
                  s.batch * s.heads_q * num_blocks(s.seqlen_q, QConfig::kBlockM),
                  QConfig::kNumThreads, sizeof(typename QConfig::SharedStorage), stream,
                  "the backward's dq kernel", p, s);
  }
}

template <typename Element, int kHeadDim>
KernelPlan plan_backward(const BackwardParams& params) {
  using Config = backward::KVConfig<Element, kHeadDim>;
  const AttentionShape& s = params.shape;
  return {Config::kBlockM, Config::kBlockN, Config::kNumWarps,
          sizeof(typename Config::SharedStorage),
          s.batch * s.heads_kv * ((s.seqlen_k + Config::kBlockN - 1) / Config::kBlockN)};
}

}  // namespace flash_ext
