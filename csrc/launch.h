// The launchers: all that the operators know of the kernels. Each template is instantiated in small
// generated translation units, one per (kernel, element type, head dimension); see
// build_tools/instances.py.
#pragma once

#include <cstdint>

#include "params.h"

struct CUstream_st;

namespace flash_ext {

using CudaStream = CUstream_st*;

// ---- CUDA: Element is __half, __nv_bfloat16 or float; shape.head_dim <= kHeadDim ----------------

template <typename Element, int kHeadDim>
void launch_forward_v1(const ForwardParams& params, CudaStream stream);

template <typename Element, int kHeadDim>
void launch_forward_v2(const ForwardParams& params, CudaStream stream);

template <typename Element, int kHeadDim>
void launch_backward(const BackwardParams& params, CudaStream stream);

// For params.is_general.
template <typename Element, int kHeadDim>
void launch_general_forward(const ForwardParams& params, CudaStream stream);

template <typename Element, int kHeadDim>
void launch_general_backward(const BackwardParams& params, CudaStream stream);

// sm_90a only, 16-bit elements, and calls that v3::refusal() accepts.
template <typename Element, int kHeadDim>
void launch_forward_v3(const ForwardParams& params, CudaStream stream);

// For general calls that v3::refusal() accepts; kHeadDim 64 or 128.
template <typename Element, int kHeadDim>
void launch_general_forward_v3(const ForwardParams& params, CudaStream stream);

// For plain calls that v3::refusal() accepts; kHeadDim 64, 128 or 256.
template <typename Element, int kHeadDim>
void launch_backward_v3(const BackwardParams& params, CudaStream stream);

// The same with window, softcap, alibi_slopes, sinks and dropout; kHeadDim 64 or 128.
template <typename Element, int kHeadDim>
void launch_general_backward_v3(const BackwardParams& params, CudaStream stream);

// What `explain` reports about a kernel.
struct KernelPlan {
  int block_m = 0;
  int block_n = 0;
  int num_warps = 0;
  int64_t shared_memory_bytes = 0;
  int64_t num_thread_blocks = 0;
};

template <typename Element, int kHeadDim>
KernelPlan plan_forward_v1(const ForwardParams& params);

template <typename Element, int kHeadDim>
KernelPlan plan_forward_v2(const ForwardParams& params);

template <typename Element, int kHeadDim>
KernelPlan plan_general_forward(const ForwardParams& params);

template <typename Element, int kHeadDim>
KernelPlan plan_forward_v3(const ForwardParams& params);

template <typename Element, int kHeadDim>
KernelPlan plan_general_forward_v3(const ForwardParams& params);

}  // namespace flash_ext
