// Which calls v3 can serve. Asked before a launch, by the dispatcher and by explain().
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "params.h"
#include "v3/sequence_workspace.h"

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

inline std::string lacks(const std::string& name) { return "has no kernels with " + name; }

// What of general attention neither v3's forward nor its backward has kernels for.
inline std::string general_refusal(const AttentionShape& shape, const GeneralParams& general) {
  if (shape.head_dim > 128) {
    return "needs a head_dim of at most 128 in general attention, got " +
           std::to_string(shape.head_dim);
  }
  // TMA takes no empty tensors.
  if (shape.seqlen_k == 0) return "needs keys, got seqlen_k 0";
  if (general.sequences.is_packed() && general.sequences.total_k == 0) {
    return "needs keys, got packed k without rows";
  }
  return {};
}

// Masks come by TMA.
inline std::string mask_refusal(const AttentionShape& shape, const GeneralParams& general) {
  const ScoreTensor& mask = general.mask;
  if (mask.data == nullptr) return {};
  if (general.mask_type == MaskType::kFloat || general.mask_type == MaskType::kDouble) {
    return "needs an attn_mask in bool or q's dtype, got float32";
  }
  if (mask.key_stride != 1 && shape.seqlen_k > 1) {
    return "needs an attn_mask whose keys lie side by side, got them with a stride of " +
           std::to_string(mask.key_stride);
  }
  const int64_t piece = general.mask_type == MaskType::kBool ? 16 : 8;  // elements in 16 bytes
  if (reinterpret_cast<uintptr_t>(mask.data) % 16 != 0 || mask.row_stride % piece != 0 ||
      mask.head_stride % piece != 0 || mask.batch_stride % piece != 0) {
    return "needs an attn_mask with rows that begin at multiples of 16 bytes, got one with others";
  }
  return {};
}

inline std::string refusal(const ForwardParams& p, int element_bytes, bool is_compiled_in,
                           int compute_capability) {
  auto reason = refusal(p.shape, {{"q", p.q}, {"k", p.k}, {"v", p.v}}, element_bytes,
                        is_compiled_in, compute_capability);
  if (!reason.empty() || !p.is_general) return reason;
  reason = general_refusal(p.shape, p.general);
  if (reason.empty()) reason = mask_refusal(p.shape, p.general);
  if (!reason.empty()) return reason;
  if (p.general.block_mask.data != nullptr) {
    if (p.general.mask.data != nullptr) return lacks("block_mask and attn_mask together");
    if (p.general.dropout.rng_state != nullptr) return lacks("block_mask and dropout_p together");
    if (has_own_lengths(p.general.sequences)) {
      return lacks("block_mask and lengths of batch entries together");
    }
  }
  // The powers of softmax_scale / softcap in its polynomial would leave fp32. See Softcap.
  const double softcap = p.general.softcap;
  const double ratio = std::fabs(p.softmax_scale) / softcap;
  if (softcap > 0.0 && p.softmax_scale != 0.0 && !(ratio >= 1e-4 && ratio <= 1e4)) {
    return "needs a softcap of 1e-4 to 1e4 times the scale, got " + std::to_string(softcap) +
           " with a scale of " + std::to_string(p.softmax_scale);
  }
  return {};
}

// Of what the gradient of an attn_mask is summed over.
inline std::string dmask_refusal(const BackwardParams& p) {
  const AttentionShape& s = p.shape;
  const ScoreTensor& dmask = p.general_gradients.dmask;
  if (dmask.data == nullptr) return {};
  if (dmask.row_stride == 0 && s.seqlen_q > 1) {
    return lacks("the gradient of an attn_mask that is broadcast over queries");
  }
  const bool is_summed =
      (dmask.head_stride == 0 && s.heads_q > 1) || (dmask.batch_stride == 0 && s.batch > 1);
  if (is_summed && p.deterministic) {
    return lacks("a deterministic gradient of an attn_mask that is broadcast over heads or batch");
  }
  return {};
}

// The exp2 of a tanh errs by about 2^-22: times more than this it would show in weights. Below the
// least the cap of what the mask hides would be too small.
inline constexpr double kMinSoftcap = 1e-3;
inline constexpr double kMaxSoftcap = 1e3;

inline std::string refusal(const BackwardParams& p, int element_bytes, bool is_compiled_in,
                           int compute_capability) {
  auto reason =
      refusal(p.shape, {{"q", p.q}, {"k", p.k}, {"v", p.v}, {"out", p.out}, {"dout", p.dout}},
              element_bytes, is_compiled_in, compute_capability);
  if (!reason.empty() || !p.is_general) return reason;
  // Thread blocks would wait for tiles that have not been dispatched.
  if (p.deterministic && p.general.sequences.is_packed()) {
    return "has no deterministic kernels with cu_seqlens_q";
  }
  if (p.deterministic && p.general.sequences.seqlens_k != nullptr) {
    return "has no deterministic kernels with seqlens_k";
  }
  reason = general_refusal(p.shape, p.general);
  if (!reason.empty()) return reason;
  if (p.general_gradients.dslopes.data != nullptr) {
    return lacks("the gradient of alibi_slopes");
  }
  const double softcap = p.general.softcap;
  if (softcap > 0.0 && (softcap < kMinSoftcap || softcap > kMaxSoftcap)) {
    return "needs a softcap of 0.001 to 1000 in the backward, got " + std::to_string(softcap);
  }
  if (p.general.mask.data != nullptr) {
    if (has_own_lengths(p.general.sequences)) {
      return lacks("attn_mask and lengths of batch entries in the backward");
    }
    if (softcap > 0.0) return lacks("softcap and attn_mask in the backward");
    if (p.general.alibi_slopes.data != nullptr) {
      return lacks("alibi_slopes and attn_mask in the backward");
    }
    reason = mask_refusal(p.shape, p.general);
    if (reason.empty()) reason = dmask_refusal(p);
    if (!reason.empty()) return reason;
  }
  const Dropout& dropout = p.general.dropout;
  if (dropout.rng_state != nullptr) {
    if (softcap > 0.0) return lacks("softcap and dropout_p in the backward");
    // Weights are multiplied by all of it before they are rounded. See backward/dropout.cuh.
    if (dropout.keep_scale != dropout.weight_factor() || dropout.keep_scale == 0.f) {
      return "needs a dropout_p of at most 0.999 in the backward";
    }
  }
  return {};
}

}  // namespace flash_ext::v3
