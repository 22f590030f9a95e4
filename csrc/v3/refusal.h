// Which calls v3 can serve. Asked before a launch, by the dispatcher and by explain().
#pragma once

#include <string>

#include "params.h"

namespace flash_ext::v3 {

// Why v3 cannot run this call; empty if it can.
inline std::string refusal(const ForwardParams& params, int element_bytes, bool is_compiled_in,
                           int compute_capability) {
  if (!is_compiled_in) return "is not part of this build, which has no kernels for sm_90a";
  if (compute_capability != 90) {
    return "needs a GPU of compute capability 9.0, got " + std::to_string(compute_capability / 10) +
           "." + std::to_string(compute_capability % 10);
  }
  if (element_bytes != 2) return "needs float16 or bfloat16, got float32";
  // TMA writes rows of O in whole pieces of 16 bytes, which therefore begin at such, too.
  if (params.shape.head_dim % 8 != 0) {
    return "needs a head_dim that is a multiple of 8, got " + std::to_string(params.shape.head_dim);
  }
  // TMA takes strides in multiples of 16 bytes. (And below 2^40, which no memory reaches.)
  const struct {
    const char* name;
    const TensorView& view;
  } tensors[] = {{"q", params.q}, {"k", params.k}, {"v", params.v}};
  for (const auto& [name, view] : tensors) {
    if (!view.aligned16) {
      return std::string("needs rows that begin at multiples of 16 bytes, got ") + name +
             " with others";
    }
  }
  return {};
}

}  // namespace flash_ext::v3
