// torch.ops.flash_ext.*: the schemas and the kernels of the CPU, CUDA and Meta keys. An operator
// checks its inputs, allocates its results, describes both in plain structs and asks a backend to
// launch. Gradients and autocast are in autograd.cpp.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "backend.h"
#include "checks.h"
#include "layout.h"

namespace flash_ext {
namespace {

using at::Tensor;
using OptionalTile = at::OptionalIntArrayRef;

double softmax_scale(std::optional<double> scale, const AttentionShape& shape) {
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(shape.head_dim));
}

void check_no_tile_on_cuda(const char* op, const Tensor& q, OptionalTile tile) {
  TORCH_CHECK(!tile || !q.is_cuda(), "flash_ext.", op,
              ": tile must not be given for CUDA tensors, whose kernels have it compiled in, got ",
              *tile);
}

// ---- forward -----------------------------------------------------------------------------------

void check_forward(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                   OptionalTile tile) {
  constexpr auto op = "forward";
  check_qkv({op, "q", q}, {op, "k", k}, {op, "v", v});
  check_scale(op, scale);
  check_tile(op, tile);
  check_no_tile_on_cuda(op, q, tile);
}

std::tuple<Tensor, Tensor> forward_meta(const Tensor& q, const Tensor& k, const Tensor& v,
                                        std::optional<double> scale, c10::string_view causal,
                                        c10::string_view algorithm, bool /*deterministic*/,
                                        OptionalTile tile) {
  check_forward(q, k, v, scale, tile);
  parse_causal("forward", causal);
  parse_algorithm("forward", algorithm);
  return {empty_in_order_of(q), empty_lse(q)};
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   std::optional<double> scale, c10::string_view causal,
                                   c10::string_view algorithm_name, bool /*deterministic*/,
                                   OptionalTile tile) {
  check_forward(q, k, v, scale, tile);
  const auto causal_mode = parse_causal("forward", causal);
  const auto algorithm = parse_algorithm("forward", algorithm_name);
  auto out = empty_in_order_of(q);
  auto lse = empty_lse(q);

  ForwardParams params;
  params.shape = attention_shape(q, k);
  if (lse.numel() == 0) return {out, lse};
  if (params.shape.seqlen_k == 0) {
    out.zero_();
    lse.fill_(-std::numeric_limits<double>::infinity());
    return {out, lse};
  }
  params.mask = Mask::make(causal_mode, params.shape.seqlen_q, params.shape.seqlen_k);
  params.general = GeneralParams(causal_mode, params.shape.seqlen_q, params.shape.seqlen_k);
  params.softmax_scale = softmax_scale(scale, params.shape);
  params.q = input_view(q);
  params.k = input_view(k);
  params.v = input_view(v);
  params.out = output_view(out);
  params.lse = lse.mutable_data_ptr();
  if (q.is_cuda()) {
    cuda_backend::forward(algorithm, q.scalar_type(), params, q.device());
  } else {
    cpu_backend::forward(algorithm, q.scalar_type(), params, tile);
  }
  return {out, lse};
}

// ---- backward ----------------------------------------------------------------------------------

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

void check_backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                    const Tensor& out, const Tensor& lse, const std::optional<Tensor>& dlse,
                    std::optional<double> scale, OptionalTile tile) {
  constexpr auto op = "backward";
  const Argument q_arg{op, "q", q};
  check_qkv(q_arg, {op, "k", k}, {op, "v", v});
  for (const Argument& arg : {Argument{op, "out", out}, Argument{op, "dout", dout}}) {
    check_same_device(arg, q_arg);
    check_same_dtype(arg, q_arg);
    check_same_shape(arg, q_arg);
  }
  check_last_dim_dense({op, "out", out});
  const auto check_lse = [&](const Argument& arg) {
    check_same_device(arg, q_arg);
    check_dtype(arg, lse_dtype(q.scalar_type()));
    check_lse_shape(arg, q_arg);
  };
  check_lse({op, "lse", lse});
  if (dlse) check_lse({op, "dlse", *dlse});
  check_scale(op, scale);
  check_tile(op, tile);
  check_no_tile_on_cuda(op, q, tile);
}

Gradients empty_gradients(const Tensor& q, const Tensor& k, const Tensor& v,
                          std::array<bool, 3> needs) {
  const auto gradient = [](const Tensor& input, bool is_needed) {
    return is_needed ? empty_in_order_of(input) : at::empty({0}, input.options());
  };
  return {gradient(q, needs[0]), gradient(k, needs[1]), gradient(v, needs[2])};
}

Gradients backward_meta(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                        const Tensor& out, const Tensor& lse, const std::optional<Tensor>& dlse,
                        std::optional<double> scale, c10::string_view causal,
                        c10::string_view algorithm, bool /*deterministic*/,
                        std::array<bool, 3> needs, OptionalTile tile) {
  check_backward(dout, q, k, v, out, lse, dlse, scale, tile);
  parse_causal("backward", causal);
  parse_algorithm("backward", algorithm);
  return empty_gradients(q, k, v, needs);
}

Gradients backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& out, const Tensor& lse, const std::optional<Tensor>& dlse,
                   std::optional<double> scale, c10::string_view causal,
                   c10::string_view algorithm_name, bool deterministic, std::array<bool, 3> needs,
                   OptionalTile tile) {
  check_backward(dout, q, k, v, out, lse, dlse, scale, tile);
  const auto causal_mode = parse_causal("backward", causal);
  const auto algorithm = parse_algorithm("backward", algorithm_name);
  const auto gradients = empty_gradients(q, k, v, needs);
  const auto& [dq, dk, dv] = gradients;

  BackwardParams params;
  params.shape = attention_shape(q, k);
  if (lse.numel() == 0 || params.shape.seqlen_k == 0) {  // nothing attends to anything
    for (const Tensor& gradient : {dq, dk, dv}) gradient.zero_();
    return gradients;
  }
  if (!needs[0] && !needs[1] && !needs[2]) return gradients;

  const auto dout_rows = readable_dout(dout, algorithm);
  const auto lse_dense = lse.contiguous();
  const auto dlse_dense = dlse ? dlse->contiguous() : Tensor();

  params.mask = Mask::make(causal_mode, params.shape.seqlen_q, params.shape.seqlen_k);
  params.general = GeneralParams(causal_mode, params.shape.seqlen_q, params.shape.seqlen_k);
  params.softmax_scale = softmax_scale(scale, params.shape);
  params.q = input_view(q);
  params.k = input_view(k);
  params.v = input_view(v);
  params.out = input_view(out);
  params.dout = input_view(dout_rows);
  if (needs[0]) params.dq = output_view(dq);
  if (needs[1]) params.dk = output_view(dk);
  if (needs[2]) params.dv = output_view(dv);
  params.lse = lse_dense.const_data_ptr();
  if (dlse) params.dlse = dlse_dense.const_data_ptr();
  params.deterministic = deterministic || at::globalContext().deterministicAlgorithms();
  if (q.is_cuda()) {
    cuda_backend::backward(algorithm, q.scalar_type(), params, q.device());
  } else {
    cpu_backend::backward(algorithm, q.scalar_type(), params, tile);
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY(flash_ext, m) {
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, float? scale=None, str causal=\"none\", "
      "str algorithm=\"auto\", bool deterministic=False, int[2]? tile=None) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? dlse=None, float? scale=None, str causal=\"none\", str algorithm=\"auto\", "
      "bool deterministic=False, bool[3] needs=[True, True, True], int[2]? tile=None) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
}

TORCH_LIBRARY_IMPL(flash_ext, CPU, m) {
  m.impl("forward", forward);
  m.impl("backward", backward);
}

TORCH_LIBRARY_IMPL(flash_ext, CUDA, m) {
  m.impl("forward", forward);
  m.impl("backward", backward);
}

TORCH_LIBRARY_IMPL(flash_ext, Meta, m) {
  m.impl("forward", forward_meta);
  m.impl("backward", backward_meta);
}

}  // namespace flash_ext
