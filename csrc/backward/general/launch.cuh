// Host side of the general backward: which kernels run for the gradients that are asked for.
//
//   always                                            row_stats
//   dQ                                                key_mean
//   dK or dV                                          kv
//   dQ, dslopes, dmask unless it comes from dmask     q
//   dmask that is summed over rows or keys; over
//   batch entries or heads, deterministic             dmask
//   dslopes, dsinks                                   head_sum, each
#pragma once

#include "backward/general/dmask_kernel.cuh"
#include "backward/general/kv_kernel.cuh"
#include "backward/general/preprocess.cuh"
#include "backward/general/q_kernel.cuh"
#include "backward/launch.cuh"
#include "common/launch_kernel.cuh"
#include "launch.h"

namespace flash_ext {
namespace backward {

// Which kernel makes dmask, and how.
struct MaskGradientPlan {
  MaskGradient of_q_kernel = MaskGradient::kNone;
  bool has_own_kernel = false;

  explicit MaskGradientPlan(const BackwardParams& params) {
    const AttentionShape& s = params.shape;
    const ScoreTensor& to = params.general_gradients.dmask;
    if (to.data == nullptr) return;
    const bool sums_scores =
        (to.row_stride == 0 && s.seqlen_q > 1) || (to.key_stride == 0 && s.seqlen_k > 1);
    const bool sums_heads =
        (to.batch_stride == 0 && s.batch > 1) || (to.head_stride == 0 && s.heads_q > 1);
    has_own_kernel = sums_scores || (sums_heads && params.deterministic);
    if (has_own_kernel) return;
    of_q_kernel = sums_heads ? MaskGradient::kAdded : MaskGradient::kStored;
  }
};

template <typename Element, int kHeadDim>
void launch_general_preprocess(const BackwardParams& params, GeneralKernelParams p,
                               cudaStream_t stream) {
  const AttentionShape& s = params.shape;
  const int64_t num_heads = s.batch * s.heads_q;
  const int64_t tiles = num_blocks(s.seqlen_q, kBackwardRowPadding) * kBackwardRowPadding /
                        kStatsRowsPerBlock<Element, kHeadDim>;
  p.order = tile_order(s, false, tiles, num_heads, 0);
  launch_kernel(general_row_stats_kernel<Element, kHeadDim>, num_heads * tiles, kPreprocessThreads,
                0, stream, "the general backward's row_stats kernel", p, s);
  if (params.dq.data == nullptr) return;
  launch_kernel(general_key_mean_kernel<Element, kHeadDim>, s.batch * s.heads_kv, kMeanThreads, 0,
                stream, "the general backward's key_mean kernel", p, s);
}

template <typename Config>
void launch_general_kv(const BackwardParams& params, GeneralKernelParams p, cudaStream_t stream) {
  const AttentionShape& s = params.shape;
  const int64_t head_bytes = s.seqlen_q * s.head_dim * 2 * sizeof(typename Config::Element);
  const int64_t tiles = num_blocks(s.seqlen_k, Config::kBlockN);
  const int64_t num_heads = s.batch * s.heads_kv;
  p.order = tile_order(s, params.general.causal != CausalMode::kNone, tiles, num_heads, head_bytes);
  launch_kernel(general_kv_kernel<Config>, num_heads * tiles, Config::kNumThreads,
                sizeof(typename Config::SharedStorage), stream, "the general backward's kv kernel",
                p, s);
}

template <typename Config>
void launch_general_q(const BackwardParams& params, GeneralKernelParams p, cudaStream_t stream) {
  const AttentionShape& s = params.shape;
  const int64_t head_bytes = s.seqlen_k * s.head_dim * 2 * sizeof(typename Config::Element);
  const int64_t tiles = num_blocks(s.seqlen_q, Config::kBlockM);
  const int64_t num_heads = s.batch * s.heads_q;
  p.order = tile_order(s, params.general.causal != CausalMode::kNone, tiles, num_heads, head_bytes);
  launch_kernel(general_q_kernel<Config>, num_heads * tiles, Config::kNumThreads,
                sizeof(typename Config::SharedStorage), stream, "the general backward's q kernel",
                p, s);
}

template <typename Config>
void launch_dmask(const BackwardParams& params, const GeneralKernelParams& p, cudaStream_t stream) {
  const AttentionShape& s = params.shape;
  const ScoreTensor& to = params.general_gradients.dmask;
  const int64_t tiles = num_spans(to.batch_stride, s.batch) * num_spans(to.head_stride, s.heads_q) *
                        num_spans(to.row_stride, num_blocks(s.seqlen_q, Config::kBlockM)) *
                        num_spans(to.key_stride, num_blocks(s.seqlen_k, Config::kBlockN));
  launch_kernel(dmask_kernel<Config>, s.seqlen_k > 0 ? tiles : 0, Config::kNumThreads,
                sizeof(DmaskStorage<Config>), stream, "the general backward's dmask kernel", p, s);
}

inline void launch_head_sum(const BackwardParams& params, const GeneralKernelParams& p,
                            const float* from, const HeadTensor& to, cudaStream_t stream) {
  if (to.data == nullptr) return;
  const AttentionShape& s = params.shape;
  const HeadSumParams sum{from,
                          to,
                          p.rows,
                          params.general.sequences,
                          static_cast<int>(s.batch),
                          static_cast<int>(s.heads_q)};
  launch_kernel(head_sum_kernel<kHeadSumThreads>, s.heads_q * num_spans(to.batch_stride, s.batch),
                kHeadSumThreads, 0, stream, "the general backward's head_sum kernel", sum, s);
}

}  // namespace backward

template <typename Element, int kHeadDim>
void launch_general_backward(const BackwardParams& params, CudaStream stream) {
  using QConfig = backward::QConfig<Element, kHeadDim>;
  using Shapes = typename backward::GeneralKVShapes<sizeof(Element), kHeadDim>::type;
  const GeneralGradients& gradients = params.general_gradients;
  const backward::MaskGradientPlan dmask(params);
  backward::GeneralKernelParams p(params);
  p.mask_gradient = dmask.of_q_kernel;
  backward::launch_general_preprocess<Element, kHeadDim>(params, p, stream);
  if (params.dk.data != nullptr || params.dv.data != nullptr) {
    backward::with_kv_config<Element, kHeadDim, backward::GeneralKVConfig>(
        Shapes{}, params.shape,
        [&](auto config) { backward::launch_general_kv<decltype(config)>(params, p, stream); });
  }
  if (params.dq.data != nullptr || gradients.dslopes.data != nullptr ||
      dmask.of_q_kernel != backward::MaskGradient::kNone) {
    backward::launch_general_q<QConfig>(params, p, stream);
  }
  if (dmask.has_own_kernel) backward::launch_dmask<QConfig>(params, p, stream);
  backward::launch_head_sum(params, p, p.dslope_rows, gradients.dslopes, stream);
  backward::launch_head_sum(params, p, p.dsink_rows, gradients.dsinks, stream);
}

}  // namespace flash_ext
