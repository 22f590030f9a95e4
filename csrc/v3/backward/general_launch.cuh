// Host side of the v3 backward beyond plain attention.
#pragma once

#include <cmath>

#include "v3/backward/dsinks.cuh"
#include "v3/backward/launch.cuh"
#include "v3/backward/prepare_entries.cuh"

namespace flash_ext {
namespace v3::backward {

// What plain kernels are told of a call: the kernels around the main one ask for no more.
inline BackwardParams without_band(BackwardParams params) {
  const AttentionShape& s = params.shape;
  params.mask = Mask::make(params.general.causal, s.seqlen_q, s.seqlen_k);
  return params;
}

// Of the mask's own strides: 0 where it is broadcast.
template <typename Config>
CUtensorMap make_mask_map(const ScoreTensor& mask, const AttentionShape& s) {
  using Element = typename Config::Element;
  const TensorView view{mask.data, mask.batch_stride, mask.head_stride, mask.row_stride};
  const auto make = [&](auto encode) {
    return encode(view, s.batch, s.heads_q, s.seqlen_q, s.seqlen_k, Config::kBlockM);
  };
  return Config::Scores::kMask == MaskKind::kBool ? make(sm90::make_tensor_map<bool, 64>)
                                                  : make(sm90::make_tensor_map<Element>);
}

// See TileOrder: by the rows that see a key tile.
inline int long_ranks(const BackwardParams& params, const BandMask& band,
                      const Schedule& schedule) {
  const int ranks = schedule.order.tiles_per_head;
  if (params.general.window_left < 0 || has_own_lengths(params.general.sequences)) return ranks;
  return num_long_ranks(ranks, [&](int n_block) {
    const int key0 = n_block * kBackwardBlockN;
    return band.row_end(std::min(key0 + kBackwardBlockN, band.seqlen_k) - 1) - band.row_begin(key0);
  });
}

template <typename Config>
GeneralKernelParams make_general_params(const BackwardParams& params) {
  const GeneralParams& general = params.general;
  const AttentionShape& s = params.shape;
  const Sequences& sequences = general.sequences;
  const GeneralBackwardWorkspace workspace(params);
  const BackwardWorkspace& sections = workspace.rows;
  GeneralKernelParams p{make_kernel_params<Config>(params)};
  p.sequences = sequences;
  p.is_top_left = general.causal == CausalMode::kTopLeft;
  p.num_key_heads = static_cast<int>(s.batch * s.heads_kv);
  p.lse_stride = sequences.is_packed() ? sequences.total_q : s.seqlen_q;
  if (sequences.is_packed()) {
    p.num_m_blocks = static_cast<int>(sections.num_m_blocks);
    p.delta = params.workspace + sections.delta;
    p.key_mean = params.workspace + workspace.key_mean;
    if (p.dq_accum != nullptr) p.dq_accum = params.workspace + sections.dq_accum;
  }
  if (has_own_lengths(sequences)) {
    p.schedule = make_listed_schedule<Config>(params, workspace.entries.max_tiles);
  }
  p.band = BandMask::make(general.causal, general.window_left, general.window_right,
                          static_cast<int>(s.seqlen_q), static_cast<int>(s.seqlen_k));
  p.long_ranks = long_ranks(params, p.band, p.schedule);
  p.block_mask = general.block_mask;
  p.alibi_slopes = general.alibi_slopes;
  p.sinks = general.sinks;
  p.dsink_blocks = params.general_gradients.dsinks.data != nullptr
                       ? params.workspace + sections.dsink_blocks
                       : nullptr;
  p.has_softcap = general.softcap > 0.0;
  // See general_params.cuh. A scale of 0 is not divided by: see softmax_scale_log2().
  const double scale = params.softmax_scale == 0.0 ? 1e-30 : params.softmax_scale;
  p.scale = SoftmaxScale(p.has_softcap                               ? general.softcap
                         : Config::Scores::kMask == MaskKind::kFloat ? 1.0
                                                                     : scale);
  p.slope_factor = static_cast<float>(p.has_softcap ? -kLog2e : -1.0 / scale);
  p.tanh_exponent = p.has_softcap
                        ? static_cast<float>(2.0 * kLog2e * params.softmax_scale / general.softcap)
                        : 0.f;
  if (Config::kHasMask) {
    p.mask_map = make_mask_map<Config>(general.mask, params.shape);
  }
  p.dmask = params.general_gradients.dmask;
  p.dropout = general.dropout;
  p.weight_factor = general.dropout.weight_factor();
  p.inverse_weight_factor = 1.f / p.weight_factor;
  p.weight_log2 = std::log2(p.weight_factor);
  return p;
}

template <typename Element, int kHeadDim, typename Scores>
void launch_general(const BackwardParams& params, cudaStream_t stream) {
  using Main = Config<Element, kHeadDim, /*kIsDeterministic=*/false, Scores>;
  GeneralKernelParams p = make_general_params<Main>(params);
  const bool has_own_lengths = v3::has_own_lengths(p.sequences);
  if (has_own_lengths) prepare_entries<Main>(params, &p, stream);
  const int64_t batch_of_rows = p.sequences.is_packed() ? 1 : params.shape.batch;
  launch_kernels<Main>(params, p, backward_kernel<Main>, stream, p.num_key_heads,
                       batch_of_rows * p.heads_q * p.num_m_blocks,
                       has_own_lengths ? Overlap::kPrevious : Overlap::kNone);
  const HeadTensor& dsinks = params.general_gradients.dsinks;
  if (dsinks.data == nullptr) return;
  const AttentionShape& s = params.shape;
  const DsinksParams sum{p.dsink_blocks, dsinks, static_cast<int>(batch_of_rows), p.heads_q,
                         p.num_m_blocks};
  launch_kernel(dsinks_kernel<kDsinksThreads>, s.heads_q, kDsinksThreads, 0, stream,
                "the v3 backward's dsinks kernel", sum, s);
}

template <typename Element, int kHeadDim, MaskKind kMask>
void launch_masked(const BackwardParams& params, cudaStream_t stream) {
  params.general.dropout.rng_state != nullptr
      ? launch_general<Element, kHeadDim, GeneralScores<false, false, true, kMask>>(params, stream)
      : launch_general<Element, kHeadDim, GeneralScores<false, false, false, kMask>>(params,
                                                                                     stream);
}

}  // namespace v3::backward

// As launch_backward_v3, for calls that v3::refusal() accepts.
template <typename Element, int kHeadDim>
void launch_general_backward_v3(const BackwardParams& call, CudaStream stream) {
  using namespace v3::backward;
  const BackwardParams params = without_band(call);
  const bool has_alibi = params.general.alibi_slopes.data != nullptr;
  if (params.general.softcap > 0.0) {
    has_alibi ? launch_general<Element, kHeadDim, GeneralScores<true, true>>(params, stream)
              : launch_general<Element, kHeadDim, GeneralScores<true, false>>(params, stream);
  } else if (params.general.mask.data != nullptr) {
    params.general.mask_type == MaskType::kBool
        ? launch_masked<Element, kHeadDim, MaskKind::kBool>(params, stream)
        : launch_masked<Element, kHeadDim, MaskKind::kFloat>(params, stream);
  } else if (params.general.dropout.rng_state != nullptr) {
    has_alibi
        ? launch_general<Element, kHeadDim, GeneralScores<false, true, true>>(params, stream)
        : launch_general<Element, kHeadDim, GeneralScores<false, false, true>>(params, stream);
  } else {
    has_alibi ? launch_general<Element, kHeadDim, GeneralScores<false, true>>(params, stream)
              : launch_general<Element, kHeadDim, GeneralScores<false, false>>(params, stream);
  }
}

}  // namespace flash_ext
