// The CUDA kernels behind the operators: device, stream, scratch and the right instance.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "backend.h"
#include "backward/general/workspace.h"
#include "backward/workspace.h"
#include "common/cuda_check.h"
#include "dispatch.h"
#include "v1/workspace.h"
#include "v2/splits.h"
#include "v3/backward/general_workspace.h"
#include "v3/forward/general_workspace.h"
#include "v3/forward/splits.h"
#include "v3/refusal.h"

namespace flash_ext::cuda_backend {
namespace {

// The caching allocator hands the memory out again only to work behind us on the same stream, so
// the scratch may be dropped as soon as the kernels are launched.
at::Tensor allocate_workspace(int64_t floats, c10::Device device) {
  return at::empty({floats}, at::TensorOptions(at::kFloat).device(device));
}

int64_t forward_workspace_floats(Algorithm algorithm, c10::ScalarType dtype,
                                 const AttentionShape& shape) {
  if (algorithm == Algorithm::kV1) return v1_workspace_floats(shape);
  const int multiprocessors = multiprocessor_count(shape);
  if (algorithm == Algorithm::kV3) return v3::forward_workspace_floats(shape, multiprocessors);
  return v2::forward_workspace_floats(shape, static_cast<int64_t>(c10::elementSize(dtype)),
                                      multiprocessors);
}

template <typename Params>
std::string v3_refusal_on_current_device(c10::ScalarType dtype, const Params& params) {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor, params.shape);
  const int minor = device_attribute(cudaDevAttrComputeCapabilityMinor, params.shape);
  return v3::refusal(params, static_cast<int>(c10::elementSize(dtype)),
                     params.is_general ? kHasGeneralV3 : kHasV3, 10 * major + minor);
}

// One short head of at most 64, with too few keys for v3 to split: v2 splits them between warps. It
// is one sequence that decides, not the batch, on which no row's bits may depend. H200, d=64, v2
// over v3: 1x1x256 1.45, 2x1x512 1.53, 4x1x1024 1.48.
bool v2_is_faster(const AttentionShape& s) {
  return s.head_dim <= 64 && s.heads_q == 1 && s.seqlen_q <= 1024 &&
         v3::forward_splits(s, multiprocessor_count(s)) == 1;
}

// What "auto" stands for; raises where v3 was asked for and cannot run.
Algorithm resolve(Algorithm algorithm, c10::ScalarType dtype, const ForwardParams& params) {
  if (algorithm != Algorithm::kAuto && algorithm != Algorithm::kV3) return algorithm;
  const auto refusal = v3_refusal_on_current_device(dtype, params);
  if (algorithm == Algorithm::kAuto) {
    const bool takes_v2 = !params.is_general && v2_is_faster(params.shape);
    return refusal.empty() && !takes_v2 ? Algorithm::kV3 : Algorithm::kV2;
  }
  TORCH_CHECK(refusal.empty(), "flash_ext.", params.is_general ? "general_forward" : "forward",
              ": algorithm 'v3' ", refusal);
  return algorithm;
}

// The same for the gradients, where v1 shares v2's kernels.
Algorithm resolve(Algorithm algorithm, c10::ScalarType dtype, const BackwardParams& params) {
  if (algorithm != Algorithm::kAuto && algorithm != Algorithm::kV3) return Algorithm::kV2;
  const auto refusal = v3_refusal_on_current_device(dtype, params);
  TORCH_CHECK(refusal.empty() || algorithm == Algorithm::kAuto, "flash_ext.",
              params.is_general ? "general_backward" : "backward", ": algorithm 'v3' ", refusal);
  return refusal.empty() ? Algorithm::kV3 : Algorithm::kV2;
}

// The backward of a forward that is planned, of all inputs: out is allocated, and dout copied, as
// v3 wants them.
BackwardParams gradients_of(const ForwardParams& forward) {
  BackwardParams params;
  params.shape = forward.shape;
  params.is_general = forward.is_general;
  params.general = forward.general;
  params.softmax_scale = forward.softmax_scale;
  params.q = forward.q;
  params.k = forward.k;
  params.v = forward.v;
  params.out.aligned16 = params.dout.aligned16 = true;
  return params;
}

void general_backward(Algorithm algorithm, c10::ScalarType dtype, BackwardParams params,
                      c10::Device device, cudaStream_t stream) {
  const bool is_v3 = resolve(algorithm, dtype, params) == Algorithm::kV3;
  const auto workspace = allocate_workspace(is_v3 ? v3::general_backward_workspace_floats(params)
                                                  : general_backward_workspace_floats(params),
                                            device);
  params.workspace = workspace.mutable_data_ptr<float>();
  if (is_v3) {
    dispatch_general_backward_v3(dtype, params.shape, [&](auto element, auto head_dim) {
      launch_general_backward_v3<typename decltype(element)::type, head_dim()>(params, stream);
    });
    return;
  }
  dispatch_instance(dtype, params.shape, [&](auto element, auto head_dim) {
    launch_general_backward<typename decltype(element)::type, head_dim()>(params, stream);
  });
}

}  // namespace

bool fills_unowned_rows(Algorithm algorithm, c10::ScalarType dtype, const ForwardParams& params,
                        c10::Device device) {
  const c10::cuda::CUDAGuard device_guard(device);
  return resolve(algorithm, dtype, params) == Algorithm::kV3;
}

bool fills_unowned_rows(Algorithm algorithm, c10::ScalarType dtype, const BackwardParams& params,
                        c10::Device device) {
  const c10::cuda::CUDAGuard device_guard(device);
  return resolve(algorithm, dtype, params) == Algorithm::kV3;
}

void forward(Algorithm algorithm, c10::ScalarType dtype, ForwardParams params, c10::Device device) {
  const c10::cuda::CUDAGuard device_guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
  algorithm = resolve(algorithm, dtype, params);
  at::Tensor workspace;
  if (params.is_general && algorithm == Algorithm::kV3) {
    if (const auto floats = v3::general_workspace_floats(params); floats > 0) {
      workspace = allocate_workspace(floats, device);
      params.workspace = workspace.mutable_data_ptr<float>();
    }
    dispatch_general_forward_v3(dtype, params.shape, [&](auto element, auto head_dim) {
      launch_general_forward_v3<typename decltype(element)::type, head_dim()>(params, stream);
    });
    return;
  }
  if (params.is_general) {  // v2's kernels, also for v1
    dispatch_instance(dtype, params.shape, [&](auto element, auto head_dim) {
      launch_general_forward<typename decltype(element)::type, head_dim()>(params, stream);
    });
    return;
  }
  if (const auto floats = forward_workspace_floats(algorithm, dtype, params.shape); floats > 0) {
    workspace = allocate_workspace(floats, device);
    params.workspace = workspace.mutable_data_ptr<float>();
  }
  if (algorithm == Algorithm::kV3) {
    dispatch_forward_v3(dtype, params.shape, [&](auto element, auto head_dim) {
      launch_forward_v3<typename decltype(element)::type, head_dim()>(params, stream);
    });
    return;
  }
  dispatch_instance(dtype, params.shape, [&](auto element, auto head_dim) {
    using Element = typename decltype(element)::type;
    algorithm == Algorithm::kV1 ? launch_forward_v1<Element, head_dim()>(params, stream)
                                : launch_forward_v2<Element, head_dim()>(params, stream);
  });
}

void backward(Algorithm algorithm, c10::ScalarType dtype, BackwardParams params,
              c10::Device device) {
  const c10::cuda::CUDAGuard device_guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
  if (params.is_general) {
    general_backward(algorithm, dtype, params, device, stream);
    return;
  }
  const bool is_v3 = resolve(algorithm, dtype, params) == Algorithm::kV3;
  const auto workspace = allocate_workspace(
      is_v3 ? v3::backward_workspace_floats(params)
            : backward_workspace_floats(params, multiprocessor_count(params.shape)),
      device);
  params.workspace = workspace.mutable_data_ptr<float>();
  if (is_v3) {
    dispatch_backward_v3(dtype, params.shape, [&](auto element, auto head_dim) {
      launch_backward_v3<typename decltype(element)::type, head_dim()>(params, stream);
    });
    return;
  }
  dispatch_instance(dtype, params.shape, [&](auto element, auto head_dim) {
    launch_backward<typename decltype(element)::type, head_dim()>(params, stream);
  });
}

ForwardPlan plan_forward(Algorithm algorithm, c10::ScalarType dtype, const ForwardParams& params,
                         c10::Device device) {
  const c10::cuda::CUDAGuard device_guard(device);
  ForwardPlan plan;
  plan.algorithm = resolve(algorithm, dtype, params);
  plan.v3_refusal = v3_refusal_on_current_device(dtype, params);
  const bool may_be_v3 = algorithm == Algorithm::kAuto || algorithm == Algorithm::kV3;
  if (may_be_v3 && v3_refusal_on_current_device(dtype, gradients_of(params)).empty()) {
    plan.backward = Algorithm::kV3;
  }
  if (params.is_general) {
    if (plan.algorithm == Algorithm::kV3) {
      plan.workspace_bytes =
          v3::general_workspace_floats(params) * static_cast<int64_t>(sizeof(float));
      dispatch_general_forward_v3(dtype, params.shape, [&](auto element, auto head_dim) {
        plan.kernel = plan_general_forward_v3<typename decltype(element)::type, head_dim()>(params);
      });
    } else {
      dispatch_instance(dtype, params.shape, [&](auto element, auto head_dim) {
        plan.kernel = plan_general_forward<typename decltype(element)::type, head_dim()>(params);
      });
    }
    return plan;
  }
  plan.workspace_bytes = forward_workspace_floats(plan.algorithm, dtype, params.shape) *
                         static_cast<int64_t>(sizeof(float));
  if (plan.algorithm == Algorithm::kV3) {
    dispatch_forward_v3(dtype, params.shape, [&](auto element, auto head_dim) {
      plan.kernel = plan_forward_v3<typename decltype(element)::type, head_dim()>(params);
    });
    return plan;
  }
  dispatch_instance(dtype, params.shape, [&](auto element, auto head_dim) {
    using Element = typename decltype(element)::type;
    plan.kernel = plan.algorithm == Algorithm::kV1 ? plan_forward_v1<Element, head_dim()>(params)
                                                   : plan_forward_v2<Element, head_dim()>(params);
  });
  return plan;
}

}  // namespace flash_ext::cuda_backend
