// Between torch tensors and the plain structs of params.h: views of inputs, allocation of outputs.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/util/SmallVector.h>

#include <array>

#include "algorithm.h"
#include "params.h"

namespace flash_ext {

// The stride of a dimension of size 1 is never used and may be anything: it must neither reach an
// address nor spoil the alignment.
inline TensorView view_of(const at::Tensor& tensor, const void* data) {
  const auto stride = [&](int dim) { return tensor.size(dim) > 1 ? tensor.stride(dim) : 0; };
  TensorView view;
  view.data = const_cast<void*>(data);
  view.batch_stride = stride(0);
  view.head_stride = stride(1);
  view.row_stride = stride(2);
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  const auto all_bits = reinterpret_cast<int64_t>(data) | view.batch_stride * bytes |
                        view.head_stride * bytes | view.row_stride * bytes;
  view.aligned16 = all_bits % 16 == 0;
  return view;
}

inline TensorView input_view(const at::Tensor& tensor) {
  return view_of(tensor, tensor.const_data_ptr());
}

inline TensorView output_view(const at::Tensor& tensor) {
  return view_of(tensor, tensor.mutable_data_ptr());
}

// An output like `like`: dense, dimensions in the same order in memory. Unlike at::empty_like this
// gives the kernels and the Meta key the same strides for every input, symbolic sizes included.
inline at::Tensor empty_in_order_of(const at::Tensor& like) {
  if (like.is_contiguous()) return at::empty_symint(like.sym_sizes(), like.options());
  std::array<int, 3> order = {0, 1, 2};  // outermost first; head_dim is always innermost
  const auto is_outside = [&](int a, int b) { return like.sym_stride(a) > like.sym_stride(b); };
  if (is_outside(order[1], order[0])) std::swap(order[0], order[1]);
  if (is_outside(order[2], order[1])) std::swap(order[1], order[2]);
  if (is_outside(order[1], order[0])) std::swap(order[0], order[1]);
  c10::SmallVector<c10::SymInt, 4> strides(4, 1);
  c10::SymInt next = like.sym_size(3);
  for (int i = 2; i >= 0; --i) {
    strides[order[i]] = next;
    next = next * like.sym_size(order[i]);
  }
  return at::empty_strided_symint(like.sym_sizes(), strides, like.options());
}

// The type in which logsumexp is kept for inputs of type `dtype`.
inline at::ScalarType lse_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

inline at::Tensor empty_lse(const at::Tensor& q) {
  return at::empty_symint(q.sym_sizes().slice(0, 3), q.options().dtype(lse_dtype(q.scalar_type())));
}

inline AttentionShape attention_shape(const at::Tensor& q, const at::Tensor& k) {
  AttentionShape shape;
  shape.batch = q.size(0);
  shape.heads_q = q.size(1);
  shape.heads_kv = k.size(1);
  shape.seqlen_q = q.size(2);
  shape.seqlen_k = k.size(2);
  shape.head_dim = q.size(3);
  return shape;
}

// Autograd hands over whatever layout the next operator left behind: sum().backward() gives an
// expanded scalar. v3, which reads no misaligned rows, must not fail by it either.
inline at::Tensor readable_dout(const at::Tensor& dout, Algorithm algorithm) {
  if (dout.stride(3) != 1 && dout.size(3) != 1) return dout.contiguous();
  const bool may_be_v3 = algorithm == Algorithm::kAuto || algorithm == Algorithm::kV3;
  const bool is_misaligned = dout.size(3) % 8 == 0 && !input_view(dout).aligned16;
  const bool is_copied = dout.is_cuda() && may_be_v3 && is_misaligned;
  return is_copied ? dout.clone(at::MemoryFormat::Contiguous) : dout;
}

}  // namespace flash_ext
