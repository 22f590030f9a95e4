// torch.ops.flash_ext.general_forward and general_backward: attention with masks, biases, windows,
// sinks, dropout, packed sequences and block sparsity. They stand beside forward and backward,
// whose schema stays short: torch's dispatcher charges for every argument of it, given or not.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "backend.h"
#include "general_checks.h"
#include "general_options.h"
#include "layout.h"

namespace flash_ext {
namespace {

using at::Tensor;
using torch::jit::Stack;

// Packed (total, heads, head_dim) as (1, heads, total, head_dim), and back.
Tensor with_batch(const Argument& arg, bool is_packed) {
  if (!is_packed) return arg.tensor;
  TORCH_CHECK(arg.tensor.dim() == 3, arg,
              " must have 3 dimensions (total, heads, head_dim) with cu_seqlens_q, got ",
              arg.tensor.dim());
  return arg.tensor.transpose(0, 1).unsqueeze(0);
}

Tensor without_batch(const Tensor& tensor, bool is_packed) {
  if (!is_packed) return tensor;
  return tensor.dim() == 4 ? tensor.squeeze(0).transpose(0, 1) : tensor.squeeze(0);
}

// What both operators are given, with q, k and v as (batch, heads, seqlen, head_dim).
struct Inputs {
  const char* op;
  Tensor q, k, v, attn_mask, alibi_slopes, sinks;
  GeneralOptions options;
  GeneralSizes sizes;
  CausalMode causal;
  Algorithm algorithm;

  bool is_packed() const { return options.is_packed(); }
};

Inputs check_inputs(const char* op, at::ArrayRef<c10::IValue> qkv, at::ArrayRef<c10::IValue> bias,
                    at::ArrayRef<c10::IValue> options) {
  Inputs in{op};
  in.options = GeneralOptions::from(options);
  check_both_cu_seqlens(op, in.options);
  in.q = with_batch({op, "q", qkv[0].toTensor()}, in.is_packed());
  in.k = with_batch({op, "k", qkv[1].toTensor()}, in.is_packed());
  in.v = with_batch({op, "v", qkv[2].toTensor()}, in.is_packed());
  in.attn_mask = tensor_or_undefined(bias[0]);
  in.alibi_slopes = tensor_or_undefined(bias[1]);
  in.sinks = tensor_or_undefined(bias[2]);
  in.sizes = check_general({op, "q", in.q}, {op, "k", in.k}, {op, "v", in.v}, in.attn_mask,
                           in.alibi_slopes, in.sinks, in.options);
  in.causal = parse_causal(op, in.options.causal);
  in.algorithm = parse_algorithm(op, in.options.algorithm);
  return in;
}

// ---- plain structs -----------------------------------------------------------------------------

int64_t stride_or_0(const Tensor& tensor, int dim) {
  return tensor.size(dim) > 1 ? tensor.stride(dim) : 0;
}

ScoreTensor score_tensor(const Tensor& tensor) {
  return {const_cast<void*>(tensor.const_data_ptr()), stride_or_0(tensor, 0),
          stride_or_0(tensor, 1), stride_or_0(tensor, 2), stride_or_0(tensor, 3)};
}

HeadTensor head_tensor(const Tensor& tensor) {
  const bool has_batch = tensor.dim() == 2;
  return {const_cast<void*>(tensor.const_data_ptr()), has_batch ? stride_or_0(tensor, 0) : 0,
          stride_or_0(tensor, has_batch ? 1 : 0)};
}

MaskType mask_type(const Tensor& mask) {
  switch (mask.scalar_type()) {
    case at::kBool:
      return MaskType::kBool;
    case at::kHalf:
      return MaskType::kHalf;
    case at::kBFloat16:
      return MaskType::kBFloat16;
    case at::kDouble:
      return MaskType::kDouble;
    default:
      return MaskType::kFloat;
  }
}

const int* lengths(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<int>() : nullptr;
}

// Fills what ForwardParams and BackwardParams have in common. `slopes` and `sinks` are in the type
// of lse and must outlive the launch.
template <typename Params>
void describe(const Inputs& in, const Tensor& slopes, const Tensor& sinks, Params* params) {
  const GeneralOptions& options = in.options;
  validate_lengths(in.op, in.q, in.k, options);
  params->is_general = true;
  params->shape = attention_shape(in.q, in.k);
  params->shape.batch = in.sizes.batch.expect_int();
  params->shape.seqlen_q = in.sizes.seqlen_q.expect_int();
  params->shape.seqlen_k = in.sizes.seqlen_k.expect_int();
  params->softmax_scale =
      options.scale.value_or(1.0 / std::sqrt(static_cast<double>(params->shape.head_dim)));
  params->q = input_view(in.q);
  params->k = input_view(in.k);
  params->v = input_view(in.v);

  GeneralParams& general = params->general;
  general = GeneralParams(in.causal, params->shape.seqlen_q, params->shape.seqlen_k);
  general.window_left = options.window[0];
  general.window_right = options.window[1];
  if (in.attn_mask.defined()) {
    general.mask = score_tensor(in.attn_mask);
    general.mask_type = mask_type(in.attn_mask);
  }
  if (slopes.defined()) general.alibi_slopes = head_tensor(slopes);
  if (sinks.defined()) general.sinks = head_tensor(sinks);
  general.softcap = options.softcap;
  if (options.dropout_p > 0.0) {
    general.dropout = Dropout::make(options.dropout_p, options.rng_state.const_data_ptr());
  }
  general.sequences.seqlens_k = lengths(options.seqlens_k);
  general.sequences.cu_seqlens_q = lengths(options.cu_seqlens_q);
  general.sequences.cu_seqlens_k = lengths(options.cu_seqlens_k);
  general.sequences.total_q = in.q.size(2);
  general.sequences.total_k = in.k.size(2);
  if (options.block_mask.defined()) {
    static_cast<ScoreTensor&>(general.block_mask) = score_tensor(options.block_mask);
    general.block_mask.block_size = static_cast<int>(options.block_size);
  }
}

// In the type that kernels read parameters of heads in.
Tensor head_values(const Tensor& tensor, const Tensor& q) {
  return tensor.defined() ? tensor.to(lse_dtype(q.scalar_type())) : tensor;
}

at::OptionalIntArrayRef tile_of(const GeneralOptions& options) {
  return options.tile ? at::OptionalIntArrayRef(*options.tile) : std::nullopt;
}

// ---- forward -----------------------------------------------------------------------------------

constexpr int kForwardTensors = 6;  // q, k, v, attn_mask, alibi_slopes, sinks

Inputs pop_forward(Stack* stack) {
  const auto arguments = torch::jit::last(*stack, kForwardTensors + GeneralOptions::kNumArguments);
  auto in = check_inputs("general_forward", arguments.slice(0, 3), arguments.slice(3, 3),
                         arguments.slice(kForwardTensors));
  torch::jit::drop(*stack, arguments.size());
  return in;
}

void general_forward_meta(const c10::OperatorHandle&, Stack* stack) {
  const auto in = pop_forward(stack);
  stack->push_back(without_batch(empty_in_order_of(in.q), in.is_packed()));
  stack->push_back(without_batch(empty_lse(in.q), in.is_packed()));
}

void general_forward(const c10::OperatorHandle&, Stack* stack) {
  const auto in = pop_forward(stack);
  const auto out = empty_in_order_of(in.q);
  const auto lse = empty_lse(in.q);
  const auto slopes = head_values(in.alibi_slopes, in.q);
  const auto sinks = head_values(in.sinks, in.q);
  ForwardParams params;
  describe(in, slopes, sinks, &params);
  const bool has_rows = lse.numel() > 0 && params.shape.batch > 0 && params.shape.seqlen_q > 0;
  const bool fills_rows =
      in.is_packed() && has_rows && in.q.is_cuda() &&
      cuda_backend::fills_unowned_rows(in.algorithm, in.q.scalar_type(), params, in.q.device());
  if (in.is_packed() && !fills_rows) {  // rows that belong to no sequence
    out.zero_();
    lse.fill_(-std::numeric_limits<double>::infinity());
  }
  if (has_rows) {
    params.out = output_view(out);
    params.lse = lse.mutable_data_ptr();
    if (in.q.is_cuda()) {
      cuda_backend::forward(in.algorithm, in.q.scalar_type(), params, in.q.device());
    } else {
      cpu_backend::forward(in.algorithm, in.q.scalar_type(), params, tile_of(in.options));
    }
  }
  stack->push_back(without_batch(out, in.is_packed()));
  stack->push_back(without_batch(lse, in.is_packed()));
}

// ---- backward ----------------------------------------------------------------------------------

// dout, q, k, v, out, lse, dlse, attn_mask, alibi_slopes, sinks; after the options come the needs.
constexpr int kBackwardTensors = 10;

struct BackwardInputs {
  Inputs in;
  Tensor dout, out, lse, dlse;
  std::array<bool, 6> needs;
};

void check_gradient_inputs(const BackwardInputs& b) {
  const char* op = b.in.op;
  const Argument q{op, "q", b.in.q};
  for (const Argument& arg : {Argument{op, "out", b.out}, Argument{op, "dout", b.dout}}) {
    check_same_device(arg, q);
    check_same_dtype(arg, q);
    check_same_shape(arg, q);
  }
  check_last_dim_dense({op, "out", b.out});
  for (const Argument& arg : {Argument{op, "lse", b.lse}, Argument{op, "dlse", b.dlse}}) {
    if (!arg.tensor.defined()) continue;
    check_same_device(arg, q);
    check_dtype(arg, lse_dtype(b.in.q.scalar_type()));
    check_lse_shape(arg, q);
  }
}

BackwardInputs pop_backward(Stack* stack) {
  constexpr auto op = "general_backward";
  const auto arguments =
      torch::jit::last(*stack, kBackwardTensors + GeneralOptions::kNumArguments + 1);
  BackwardInputs b{check_inputs(op, arguments.slice(1, 3), arguments.slice(7, 3),
                                arguments.slice(kBackwardTensors, GeneralOptions::kNumArguments))};
  const bool is_packed = b.in.is_packed();
  const auto with_batch_of_lse = [&](const Tensor& tensor) {
    return is_packed && tensor.defined() ? tensor.unsqueeze(0) : tensor;
  };
  b.dout = with_batch({op, "dout", arguments[0].toTensor()}, is_packed);
  b.out = with_batch({op, "out", arguments[4].toTensor()}, is_packed);
  b.lse = with_batch_of_lse(arguments[5].toTensor());
  b.dlse = with_batch_of_lse(tensor_or_undefined(arguments[6]));
  const auto needs = arguments.back().toBoolList();
  std::copy_n(needs.begin(), b.needs.size(), b.needs.begin());
  check_gradient_inputs(b);
  torch::jit::drop(*stack, arguments.size());
  return b;
}

// Whether the gradient of this mask or these parameters of heads is wanted and exists.
bool is_wanted(const Tensor& input, bool is_needed) {
  return is_needed && input.defined() && input.is_floating_point();
}

Tensor empty_gradient(const Tensor& input, bool is_needed, const Tensor& q) {
  return is_needed ? empty_in_order_of(input) : at::empty({0}, q.options());
}

void general_backward_meta(const c10::OperatorHandle&, Stack* stack) {
  const auto b = pop_backward(stack);
  const Inputs& in = b.in;
  const std::array<Tensor, 3> qkv = {in.q, in.k, in.v};
  for (int i = 0; i < 3; ++i) {
    const auto gradient = empty_gradient(qkv[i], b.needs[i], in.q);
    stack->push_back(b.needs[i] ? without_batch(gradient, in.is_packed()) : gradient);
  }
  const std::array<Tensor, 3> others = {in.attn_mask, in.alibi_slopes, in.sinks};
  for (int i = 0; i < 3; ++i) {
    stack->push_back(is_wanted(others[i], b.needs[3 + i])
                         ? at::empty_symint(others[i].sym_sizes(), others[i].options())
                         : at::empty({0}, in.q.options()));
  }
}

void general_backward(const c10::OperatorHandle&, Stack* stack) {
  const auto b = pop_backward(stack);
  const Inputs& in = b.in;
  const auto slopes = head_values(in.alibi_slopes, in.q);
  const auto sinks = head_values(in.sinks, in.q);
  BackwardParams params;
  describe(in, slopes, sinks, &params);

  std::array<Tensor, 6> gradients;
  const std::array<Tensor, 3> qkv = {in.q, in.k, in.v};
  for (int i = 0; i < 3; ++i) gradients[i] = empty_gradient(qkv[i], b.needs[i], in.q);
  const bool is_empty = b.lse.numel() == 0 || params.shape.batch == 0 || params.shape.seqlen_q == 0;
  const auto clear = [&] {
    for (int i = 0; i < 3; ++i) gradients[i].zero_();
  };
  if (is_empty) clear();
  const std::array<Tensor, 3> others = {in.attn_mask, in.alibi_slopes, in.sinks};
  for (int i = 0; i < 3; ++i) {
    gradients[3 + i] =
        is_wanted(others[i], b.needs[3 + i])
            ? at::zeros(others[i].sizes(), in.q.options().dtype(lse_dtype(in.q.scalar_type())))
            : at::empty({0}, in.q.options());
  }

  if (!is_empty) {
    const auto dout = readable_dout(b.dout, in.algorithm);
    const auto lse = b.lse.contiguous();
    const auto dlse = b.dlse.defined() ? b.dlse.contiguous() : Tensor();
    params.out = input_view(b.out);
    params.dout = input_view(dout);
    params.lse = lse.const_data_ptr();
    if (dlse.defined()) params.dlse = dlse.const_data_ptr();
    if (b.needs[0]) params.dq = output_view(gradients[0]);
    if (b.needs[1]) params.dk = output_view(gradients[1]);
    if (b.needs[2]) params.dv = output_view(gradients[2]);
    GeneralGradients& wanted = params.general_gradients;
    if (is_wanted(others[0], b.needs[3])) wanted.dmask = score_tensor(gradients[3]);
    if (is_wanted(others[1], b.needs[4])) wanted.dslopes = head_tensor(gradients[4]);
    if (is_wanted(others[2], b.needs[5])) wanted.dsinks = head_tensor(gradients[5]);
    params.deterministic =
        in.options.deterministic || at::globalContext().deterministicAlgorithms();
    const bool fills_rows =
        in.is_packed() && in.q.is_cuda() &&
        cuda_backend::fills_unowned_rows(in.algorithm, in.q.scalar_type(), params, in.q.device());
    if (in.is_packed() && !fills_rows) clear();  // rows that belong to no sequence
    if (in.q.is_cuda()) {
      cuda_backend::backward(in.algorithm, in.q.scalar_type(), params, in.q.device());
    } else {
      cpu_backend::backward(in.algorithm, in.q.scalar_type(), params, tile_of(in.options));
    }
  }
  for (int i = 0; i < 3; ++i) {
    stack->push_back(b.needs[i] ? without_batch(gradients[i], in.is_packed()) : gradients[i]);
  }
  for (int i = 0; i < 3; ++i) {
    const bool is_given = is_wanted(others[i], b.needs[3 + i]);
    stack->push_back(is_given ? gradients[3 + i].to(others[i].scalar_type()) : gradients[3 + i]);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(flash_ext, m) {
  const std::string common =
      std::string("Tensor? attn_mask=None, Tensor? alibi_slopes=None, Tensor? sinks=None, ") +
      GeneralOptions::kSchema;
  const auto forward =
      "general_forward(Tensor q, Tensor k, Tensor v, " + common + ") -> (Tensor out, Tensor lse)";
  const auto backward =
      "general_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? dlse=None, " +
      common +
      ", bool[6] needs=[True, True, True, True, True, True]) -> (Tensor dq, Tensor dk, Tensor dv, "
      "Tensor dmask, Tensor dslopes, Tensor dsinks)";
  m.def(forward.c_str());
  m.def(backward.c_str());
}

TORCH_LIBRARY_IMPL(flash_ext, CPU, m) {
  m.impl("general_forward", boxed<&general_forward>());
  m.impl("general_backward", boxed<&general_backward>());
}

TORCH_LIBRARY_IMPL(flash_ext, CUDA, m) {
  m.impl("general_forward", boxed<&general_forward>());
  m.impl("general_backward", boxed<&general_backward>());
}

TORCH_LIBRARY_IMPL(flash_ext, Meta, m) {
  m.impl("general_forward", boxed<&general_forward_meta>());
  m.impl("general_backward", boxed<&general_backward_meta>());
}

}  // namespace flash_ext
