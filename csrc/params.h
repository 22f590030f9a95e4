// What a kernel launch needs to know: plain structs, no torch, no CUDA types.
#pragma once

#include <cstdint>

#include "common/general.h"
#include "common/mask.h"

namespace flash_ext {

// A (batch, heads, seqlen, head_dim) tensor. Strides are in elements, may be 0 (expanded), and the
// last dimension is dense. `data == nullptr` means "not wanted" for outputs.
struct TensorView {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
  // Base address and all strides are multiples of 16 bytes: rows may be moved by 16-byte copies.
  bool aligned16 = false;
};

struct AttentionShape {
  int64_t batch = 0;
  int64_t heads_q = 0;
  int64_t heads_kv = 0;  // divides heads_q
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int64_t head_dim = 0;  // 1..256; kernels round it up to their kHeadDim with zeros

  int64_t group_size() const { return heads_q / heads_kv; }

  // The kHeadDim of the CUDA kernels that serve this head_dim. The v3 forward's are finer.
  int64_t padded_head_dim() const { return head_dim <= 64 ? 64 : (head_dim <= 128 ? 128 : 256); }
  int64_t padded_head_dim_v3() const {
    if (head_dim <= 64 || (head_dim > 96 && head_dim <= 128)) return padded_head_dim();
    return head_dim <= 96 ? 96 : (head_dim <= 192 ? 192 : 256);
  }
};

// Plain calls, of the operators forward and backward, have all of `mask`, and of `general` no more
// than it can say of a plain call. General calls, of general_forward and general_backward, have
// `general` and no `mask`; their shape.seqlen_q and seqlen_k are the largest of any batch entry,
// and packed tensors have batch_stride 0.
struct ForwardParams {
  AttentionShape shape;
  Mask mask;
  bool is_general = false;
  GeneralParams general;
  double softmax_scale = 1.0;
  TensorView q, k, v, out;
  // (batch, heads_q, seqlen_q) dense, packed (heads_q, total_q); fp32, fp64 for fp64 inputs.
  void* lse = nullptr;
  // v1: O, l and m of Algorithm 1 between two K/V blocks, see v1_workspace_floats(). v2, v3:
  // results of shares of the keys, see v2:: and v3::forward_workspace_floats(). v3, general: what
  // SequenceWorkspace lists.
  float* workspace = nullptr;
};

struct BackwardParams {
  AttentionShape shape;
  Mask mask;
  bool is_general = false;
  GeneralParams general;
  GeneralGradients general_gradients;
  double softmax_scale = 1.0;
  TensorView q, k, v, out, dout;
  TensorView dq, dk, dv;       // data == nullptr: gradient not asked for
  const void* lse = nullptr;   // as in the forward
  const void* dlse = nullptr;  // like lse, or nullptr for zero
  bool deterministic = false;
  // Scratch of the CUDA kernels, see the two functions backward_workspace_floats().
  float* workspace = nullptr;
};

}  // namespace flash_ext
