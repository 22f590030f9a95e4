// Host side of the v3 forward beyond plain attention.
#pragma once

#include "v3/forward/launch.cuh"

namespace flash_ext {
namespace v3::forward {

// Tiles get shorter towards the first row under a causal mask, unless a window makes them equal.
template <typename Config>
Schedule make_general_schedule(const ForwardParams& params) {
  const GeneralParams& general = params.general;
  const bool ends_at_diagonal = general.causal != CausalMode::kNone || general.window_right >= 0;
  const bool has_left_edge =
      general.window_left >= 0 && general.window_left < params.shape.seqlen_k;
  Schedule schedule = make_schedule<Config>(params.shape, ends_at_diagonal && !has_left_edge);
  const ScoreTensor& mask = general.mask;
  if (mask.data != nullptr && mask.row_stride != 0 && mask.head_stride == 0) {
    // All heads of a batch entry side by side, which read the same mask.
    schedule.order.heads_per_section =
        std::max(schedule.order.heads_per_section, static_cast<int>(params.shape.heads_q));
  }
  return schedule;
}

inline bool adds_mask(const GeneralParams& general) {
  return general.mask.data != nullptr && general.mask_type != MaskType::kBool;
}

// Scores as the exponent takes them: q . k times |scale|; what the softcap leaves, in units of
// log2; or what a float mask leaves, in natural units: masks may be as large as numbers get.
inline SoftmaxScale score_scale(const ForwardParams& params) {
  SoftmaxScale scale(params.softmax_scale);
  if (adds_mask(params.general)) {
    scale.log2 = static_cast<float>(kLog2e);
  } else if (params.general.softcap > 0.0) {
    scale.log2 = 1.f;
  }
  // Not 0 where the scale is: ALiBi is then divided by scale.log2, too.
  scale.natural = static_cast<float>(scale.log2 / kLog2e);
  return scale;
}

// Of the mask's own shape: what it is broadcast over has stride 0, but for rows. There a warp reads
// the only one.
template <typename Config>
KernelMask make_kernel_mask(const ForwardParams& params) {
  const ScoreTensor& mask = params.general.mask;
  const AttentionShape& s = params.shape;
  KernelMask kernel_mask{};
  kernel_mask.has_rows = mask.row_stride != 0;
  kernel_mask.scale =
      params.general.softcap > 0.0 ? 1.f : static_cast<float>(std::fabs(params.softmax_scale));
  if constexpr (Config::kAddsMask || Config::kHidesByMask) {
    const TensorView view{mask.data, mask.batch_stride, mask.head_stride, mask.row_stride};
    using MaskElement = std::conditional_t<Config::kAddsMask, typename Config::Element, bool>;
    kernel_mask.map = sm90::make_tensor_map<MaskElement>(
        view, s.batch, s.heads_q, kernel_mask.has_rows ? s.seqlen_q : 1, s.seqlen_k,
        kernel_mask.has_rows ? kRowsPerWarp : 1);
  }
  return kernel_mask;
}

template <typename Config>
GeneralKernelParams make_general_kernel_params(const ForwardParams& params,
                                               const Schedule& schedule) {
  const AttentionShape& s = params.shape;
  const GeneralParams& general = params.general;
  const SoftmaxScale scale = score_scale(params);
  const Mask lengths = Mask::make(CausalMode::kNone, s.seqlen_q, s.seqlen_k);
  return {
      make_kernel_params<Config>(params, lengths, scale, schedule),
      general.band(general.sequences[0]),
      general.alibi_slopes,
      general.sinks,
      static_cast<float>(kLog2e / scale.log2),
      Softcap(general.softcap, std::fabs(params.softmax_scale), adds_mask(general) ? 1.0 : kLog2e),
      KernelDropout(general.dropout),
      make_kernel_mask<Config>(params)};
}

// Calls `f` with the configuration of the kernel that computes this.
template <typename Element, int kHeadDim, typename Function>
auto with_general_config(const ForwardParams& params, Function&& f) {
  const bool drops_out = params.general.dropout.rng_state != nullptr;
  if (adds_mask(params.general)) {
    if (drops_out) return f(Config<Element, kHeadDim, Variant::kFloatMaskDropout>());
    return f(Config<Element, kHeadDim, Variant::kFloatMask>());
  }
  if (params.general.mask.data != nullptr) {
    if (drops_out) return f(Config<Element, kHeadDim, Variant::kBoolMaskDropout>());
    return f(Config<Element, kHeadDim, Variant::kBoolMask>());
  }
  if (drops_out) return f(Config<Element, kHeadDim, Variant::kDropout>());
  return f(Config<Element, kHeadDim, Variant::kGeneral>());
}

}  // namespace v3::forward

template <typename Element, int kHeadDim>
void launch_general_forward_v3(const ForwardParams& params, CudaStream stream) {
  using namespace v3::forward;
  with_general_config<Element, kHeadDim>(params, [&](auto config) {
    using Config = decltype(config);
    const Schedule schedule = make_general_schedule<Config>(params);
    launch_kernel(forward_kernel<Config>, schedule.num_thread_blocks, Config::kNumThreads,
                  sizeof(typename Config::SharedStorage), stream, "the v3 general forward kernel",
                  make_general_kernel_params<Config>(params, schedule), params.shape);
  });
}

template <typename Element, int kHeadDim>
KernelPlan plan_general_forward_v3(const ForwardParams& params) {
  using namespace v3::forward;
  return with_general_config<Element, kHeadDim>(params, [&](auto config) {
    using Config = decltype(config);
    return KernelPlan{Config::kBlockM, Config::kBlockN, Config::kNumThreads / 32,
                      sizeof(typename Config::SharedStorage),
                      make_general_schedule<Config>(params).num_thread_blocks};
  });
}

}  // namespace flash_ext
