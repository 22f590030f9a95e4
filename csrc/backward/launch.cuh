// Host side of the backward: which kernels run for the gradients that are asked for.
//
//   asked for                        kernels
//   dQ and dK or dV                  row_stats, key_mean, kv (adds dQ up in fp32), dq_postprocess
//   the same, deterministic          row_stats, key_mean, kv, dq
//   dK, dV                           row_stats, kv
//   dQ                               row_stats, key_mean, dq
//
// Where the groups of query heads are split into parts (backward/parts.h), sum_parts follows kv.
//
// On Hopper each begins while the one before it ends.
#pragma once

#include "backward/dq_kernel.cuh"
#include "backward/kv_kernel.cuh"
#include "backward/postprocess.cuh"
#include "backward/preprocess.cuh"
#include "common/launch_kernel.cuh"
#include "launch.h"

namespace flash_ext {
namespace backward {

inline int64_t num_blocks(int64_t rows, int block) { return (rows + block - 1) / block; }

// Calls `visit` with the first configuration that fits this GPU.
template <typename Element, int kHeadDim, template <typename, int, typename> typename ConfigOf,
          typename Visit, typename Shape, typename... Smaller>
void with_kv_config(ShapeList<Shape, Smaller...>, const AttentionShape& shape, Visit visit) {
  using Config = ConfigOf<Element, kHeadDim, Shape>;
  constexpr int64_t kSmemBytes = sizeof(typename Config::SharedStorage);
  const int64_t limit = shared_memory_limit(shape);
  if (kSmemBytes <= limit) {
    visit(Config{});
  } else if constexpr (sizeof...(Smaller) > 0) {
    with_kv_config<Element, kHeadDim, ConfigOf>(ShapeList<Smaller...>{}, shape, visit);
  } else {
    throw std::runtime_error("flash_ext.backward: dk and dv at this head_dim need " +
                             std::to_string(kSmemBytes) +
                             " bytes of shared memory per thread block, " + "this GPU has " +
                             std::to_string(limit) + ", with " + to_string(shape));
  }
}

template <typename Element, int kHeadDim>
void launch_preprocess(const BackwardParams& params, const KernelParams& p, Overlap overlap,
                       cudaStream_t stream) {
  const AttentionShape& s = params.shape;
  constexpr int kRowsPerBlock = kPreprocessThreads / (kHeadDim / 8);
  launch_kernel(row_stats_kernel<Element, kHeadDim>,
                s.batch * s.heads_q * (p.padded_seqlen_q / kRowsPerBlock), kPreprocessThreads, 0,
                stream, "the backward's row_stats kernel", p, s);
  if (params.dq.data == nullptr) return;
  launch_kernel(key_mean_kernel<Element, kHeadDim>, s.batch * s.heads_kv, kMeanThreads, 0, stream,
                "the backward's key_mean kernel", p, s, overlap);
}

template <typename Element, int kHeadDim>
void launch_sum_parts(const BackwardParams& params, const KernelParams& p, Overlap overlap,
                      cudaStream_t stream) {
  const AttentionShape& s = params.shape;
  const int64_t blocks_per_head = num_blocks(s.seqlen_k, kSumRows<kHeadDim>);
  PartSumParams sums{{},
                     p.num_parts,
                     static_cast<int>(s.batch * s.heads_kv),
                     static_cast<int>(s.seqlen_k),
                     p.head_dim,
                     p.heads_kv,
                     Divisor(blocks_per_head)};
  int num_sums = 0;
  if (p.dk.data != nullptr) sums.sums[num_sums++] = {p.dk_parts, p.dk, p.softmax_scale};
  if (p.dv.data != nullptr) sums.sums[num_sums++] = {p.dv_parts, p.dv, 1.f};
  launch_kernel(sum_parts_kernel<Element, kHeadDim>,
                num_sums * s.batch * s.heads_kv * blocks_per_head, kSumThreads, 0, stream,
                "the backward's sum_parts kernel", sums, s, overlap);
}

template <typename Config>
void launch_kv(const BackwardParams& params, KernelParams p, Overlap overlap, cudaStream_t stream) {
  const AttentionShape& s = params.shape;
  const bool with_dq = BackwardWorkspace::accumulates_dq(params);
  // Q and dO of one query head at a time, and dQ's accumulator.
  const int64_t head_bytes =
      s.seqlen_q * s.head_dim * (2 * sizeof(typename Config::Element) + with_dq * sizeof(float));
  const int64_t num_n_blocks = num_blocks(s.seqlen_k, Config::kBlockN);
  const int64_t all_parts = s.batch * p.parts_per_sequence;
  p.order = tile_order(s, params.mask.is_causal, num_n_blocks, all_parts, head_bytes);
  launch_kernel(with_dq ? kv_kernel<Config, true> : kv_kernel<Config, false>,
                all_parts * num_n_blocks, Config::kNumThreads,
                sizeof(typename Config::SharedStorage), stream, "the backward's kv kernel", p, s,
                overlap);
  if (p.num_parts > 1) {
    launch_sum_parts<typename Config::Element, Config::kHeadDim>(params, p, overlap, stream);
  }
  if (!with_dq) return;
  const int64_t num_m_blocks = num_blocks(s.seqlen_q, Config::kBlockM);
  p.order = tile_order(s, false, num_m_blocks, s.batch * s.heads_q, 0);
  launch_kernel(dq_postprocess_kernel<Config>, s.batch * s.heads_q * num_m_blocks,
                Config::kNumThreads, sizeof(typename Config::QTile), stream,
                "the backward's dq_postprocess kernel", p, s, overlap);
}

template <typename Config>
void launch_dq(const BackwardParams& params, KernelParams p, Overlap overlap, cudaStream_t stream) {
  const AttentionShape& s = params.shape;
  const int64_t head_bytes =
      s.seqlen_k * s.head_dim * 2 * sizeof(typename Config::Element);  // K, V
  const int64_t num_m_blocks = num_blocks(s.seqlen_q, Config::kBlockM);
  p.order = tile_order(s, params.mask.is_causal, num_m_blocks, s.batch * s.heads_q, head_bytes);
  launch_kernel(dq_kernel<Config>, s.batch * s.heads_q * num_m_blocks, Config::kNumThreads,
                sizeof(typename Config::SharedStorage), stream, "the backward's dq kernel", p, s,
                overlap);
}

}  // namespace backward

template <typename Element, int kHeadDim>
void launch_backward(const BackwardParams& params, CudaStream stream) {
  using Shapes = typename backward::KVShapes<sizeof(Element), kHeadDim>::type;
  const backward::KernelParams p(params,
                                 num_group_parts(params.shape, multiprocessor_count(params.shape)));
  const Overlap overlap = overlap_of(backward::row_stats_kernel<Element, kHeadDim>,
                                     "the backward's row_stats kernel", params.shape);
  backward::launch_preprocess<Element, kHeadDim>(params, p, overlap, stream);
  if (params.dk.data != nullptr || params.dv.data != nullptr) {
    backward::with_kv_config<Element, kHeadDim, backward::KVConfig>(
        Shapes{}, params.shape,
        [&](auto config) { backward::launch_kv<decltype(config)>(params, p, overlap, stream); });
  }
  if (params.dq.data != nullptr && !BackwardWorkspace::accumulates_dq(params)) {
    backward::launch_dq<backward::QConfig<Element, kHeadDim>>(params, p, overlap, stream);
  }
}

}  // namespace flash_ext
