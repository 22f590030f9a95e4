// The CUDA kernels behind the operators: device, stream, scratch and the right instance.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "backend.h"
#include "backward/workspace.h"
#include "dispatch.h"
#include "v1/workspace.h"

namespace flash_ext::cuda_backend {
namespace {

// The caching allocator hands the memory out again only to work behind us on the same stream, so
// the scratch may be dropped as soon as the kernels are launched.
at::Tensor allocate_workspace(int64_t floats, c10::Device device) {
  return at::empty({floats}, at::TensorOptions(at::kFloat).device(device));
}

int64_t forward_workspace_floats(Algorithm algorithm, const AttentionShape& shape) {
  return algorithm == Algorithm::kV1 ? v1_workspace_floats(shape) : 0;
}

}  // namespace

void forward(Algorithm algorithm, c10::ScalarType dtype, ForwardParams params, c10::Device device) {
  const c10::cuda::CUDAGuard device_guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
  at::Tensor workspace;
  if (const auto floats = forward_workspace_floats(algorithm, params.shape); floats > 0) {
    workspace = allocate_workspace(floats, device);
    params.workspace = workspace.mutable_data_ptr<float>();
  }
  dispatch_instance(dtype, params.shape, [&](auto element, auto head_dim) {
    using Element = typename decltype(element)::type;
    algorithm == Algorithm::kV1 ? launch_forward_v1<Element, head_dim()>(params, stream)
                                : launch_forward_v2<Element, head_dim()>(params, stream);
  });
}

void backward(c10::ScalarType dtype, BackwardParams params, c10::Device device) {
  const c10::cuda::CUDAGuard device_guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
  const auto workspace = allocate_workspace(backward_workspace_floats(params), device);
  params.workspace = workspace.mutable_data_ptr<float>();
  dispatch_instance(dtype, params.shape, [&](auto element, auto head_dim) {
    launch_backward<typename decltype(element)::type, head_dim()>(params, stream);
  });
}

KernelPlan plan_forward(Algorithm algorithm, c10::ScalarType dtype, const ForwardParams& params,
                        c10::Device device) {
  const c10::cuda::CUDAGuard device_guard(device);
  KernelPlan plan;
  dispatch_instance(dtype, params.shape, [&](auto element, auto head_dim) {
    using Element = typename decltype(element)::type;
    plan = algorithm == Algorithm::kV1 ? plan_forward_v1<Element, head_dim()>(params)
                                       : plan_forward_v2<Element, head_dim()>(params);
  });
  return plan;
}

int64_t forward_workspace_bytes(Algorithm algorithm, const AttentionShape& shape) {
  return forward_workspace_floats(algorithm, shape) * static_cast<int64_t>(sizeof(float));
}

}  // namespace flash_ext::cuda_backend
