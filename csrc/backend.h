// Where attention runs. The operators check, allocate and describe; a backend launches.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/OptionalArrayRef.h>

#include <string>

#include "algorithm.h"
#include "launch.h"
#include "params.h"

namespace flash_ext {

// What `explain` reports about a call.
struct ForwardPlan {
  Algorithm algorithm = Algorithm::kV2;  // what "auto" stands for
  Algorithm backward = Algorithm::kV2;   // the same for the gradients, where v1 shares v2's kernels
  KernelPlan kernel;
  int64_t workspace_bytes = 0;
  std::string v3_refusal;  // why v3 cannot run the call; empty if it can
};

namespace cpu_backend {
using Tile = at::OptionalIntArrayRef;  // (block_m, block_n); none = the kernel's own choice
void forward(Algorithm algorithm, c10::ScalarType dtype, const ForwardParams& params, Tile tile);
void backward(Algorithm algorithm, c10::ScalarType dtype, const BackwardParams& params, Tile tile);
ForwardPlan plan_forward(Algorithm algorithm);
const char* capability();  // the SIMD level in use
}  // namespace cpu_backend

// Defined by cuda_backend.cpp, or by cuda_backend_absent.cpp in a CPU-only build.
namespace cuda_backend {
// Whether forward() also writes the rows of packed tensors that belong to no sequence.
bool fills_unowned_rows(Algorithm algorithm, c10::ScalarType dtype, const ForwardParams& params,
                        c10::Device device);
// Whether backward() does.
bool fills_unowned_rows(Algorithm algorithm, c10::ScalarType dtype, const BackwardParams& params,
                        c10::Device device);
// Allocate scratch and launch on the current stream of `device`.
void forward(Algorithm algorithm, c10::ScalarType dtype, ForwardParams params, c10::Device device);
void backward(Algorithm algorithm, c10::ScalarType dtype, BackwardParams params,
              c10::Device device);

ForwardPlan plan_forward(Algorithm algorithm, c10::ScalarType dtype, const ForwardParams& params,
                         c10::Device device);
}  // namespace cuda_backend

}  // namespace flash_ext
