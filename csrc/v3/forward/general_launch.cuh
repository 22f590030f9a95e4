// Host side of the v3 forward with a window, softcap, ALiBi, sinks or dropout.
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
  return make_schedule<Config>(params.shape, ends_at_diagonal && !has_left_edge);
}

// Scores as the exponent takes them: q . k times |scale|, or what the softcap leaves, in units of
// log2.
inline SoftmaxScale score_scale(const ForwardParams& params) {
  SoftmaxScale scale(params.softmax_scale);
  if (params.general.softcap > 0.0) scale.log2 = 1.f;
  // Not 0 where the scale is: ALiBi is then divided by scale.log2, too.
  scale.natural = static_cast<float>(scale.log2 / kLog2e);
  return scale;
}

template <typename Config>
GeneralKernelParams make_general_kernel_params(const ForwardParams& params,
                                               const Schedule& schedule) {
  const AttentionShape& s = params.shape;
  const GeneralParams& general = params.general;
  const SoftmaxScale scale = score_scale(params);
  const Mask lengths = Mask::make(CausalMode::kNone, s.seqlen_q, s.seqlen_k);
  return {make_kernel_params<Config>(params, lengths, scale, schedule),
          general.band(general.sequences[0]),
          general.alibi_slopes,
          general.sinks,
          static_cast<float>(kLog2e / scale.log2),
          Softcap(general.softcap, std::fabs(params.softmax_scale)),
          KernelDropout(general.dropout)};
}

// Calls `f` with the configuration of the kernel that computes this.
template <typename Element, int kHeadDim, typename Function>
auto with_general_config(const ForwardParams& params, Function&& f) {
  if (params.general.dropout.rng_state != nullptr) {
    return f(Config<Element, kHeadDim, Variant::kDropout>());
  }
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
