// Which calls v3 can serve. Asked before a launch, by the dispatcher and by explain().
#pragma once

#include <initializer_list>
#include <string>

#include "params.h"

namespace flash_ext::v3 {

struct Input {
  const char* name;
  const TensorView& view;
};

// Why v3 cannot run this call; empty if it can. `inputs`: all tensors it would read.
inline std::string refusal(const AttentionShape& shape, std::initializer_list<Input> inputs,
                           int element_bytes, bool is_compiled_in, int compute_capability) {
  if (!is_compiled_in) return "is not part of this build, which has no kernels for sm_90a";
  if (compute_capability != 90) {
    return "needs a GPU of compute capability 9.0, got " + std::to_string(compute_capability / 10) +
           "." + std::to_string(compute_capability % 10);
  }
  if (element_bytes != 2) return "needs float16 or bfloat16, got float32";
  // TMA writes rows of results in whole pieces of 16 bytes, which therefore begin at such, too.
  if (shape.head_dim % 8 != 0) {
    return "needs a head_dim that is a multiple of 8, got " + std::to_string(shape.head_dim);
  }
  // TMA takes strides in multiples of 16 bytes. (And below 2^40, which no memory reaches.)
  for (const auto& [name, view] : inputs) {
    if (!view.aligned16) {
      return std::string("needs rows that begin at multiples of 16 bytes, got ") + name +
             " with others";
    }
  }
  return {};
}

inline constexpr auto kNotGeneral =
    "has no masks, biases, windows, sinks, dropout, lengths of sequences or block sparsity";

inline std::string refusal(const ForwardParams& p, int element_bytes, bool is_compiled_in,
                           int compute_capability) {
  if (p.is_general) return kNotGeneral;
  return refusal(p.shape, {{"q", p.q}, {"k", p.k}, {"v", p.v}}, element_bytes, is_compiled_in,
                 compute_capability);
}

inline std::string refusal(const BackwardParams& p, int element_bytes, bool is_compiled_in,
                           int compute_capability) {
  if (p.is_general) return kNotGeneral;
  return refusal(p.shape, {{"q", p.q}, {"k", p.k}, {"v", p.v}, {"out", p.out}, {"dout", p.dout}},
                 element_bytes, is_compiled_in, compute_capability);
}

}  // namespace flash_ext::v3
