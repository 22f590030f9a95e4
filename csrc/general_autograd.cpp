// Gradients and autocast of torch.ops.flash_ext.general_forward and general_backward, as
// autograd.cpp has them for plain attention.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "general_options.h"

namespace flash_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using torch::jit::Stack;

c10::OperatorHandle operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

// q, k, v, attn_mask, alibi_slopes, sinks: what has gradients. Undefined stands for None.
using Inputs = std::array<Tensor, 6>;

void push(Stack& stack, at::ArrayRef<Tensor> tensors) {
  for (const Tensor& tensor : tensors) stack.push_back(none_if_undefined(tensor));
}

variable_list pop_tensors(Stack& stack) {
  variable_list tensors;
  for (const c10::IValue& value : stack) tensors.push_back(value.toTensor());
  return tensors;
}

variable_list call_forward(const Inputs& inputs, const GeneralOptions& options) {
  static const auto op = operator_named("flash_ext::general_forward");
  Stack stack;
  push(stack, inputs);
  options.push(stack);
  op.callBoxed(stack);
  return pop_tensors(stack);
}

// `tensors`: dout, q, k, v, out, lse, dlse, attn_mask, alibi_slopes, sinks.
variable_list call_backward(at::ArrayRef<Tensor> tensors, const GeneralOptions& options,
                            const c10::IValue& needs) {
  static const auto op = operator_named("flash_ext::general_backward");
  Stack stack;
  push(stack, tensors);
  options.push(stack);
  stack.push_back(needs);
  op.callBoxed(stack);
  return pop_tensors(stack);
}

bool needs_gradient(at::ArrayRef<Tensor> tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) {
           return tensor.defined() &&
                  (tensor.requires_grad() || tensor._fw_grad(/*level=*/0).defined());
         });
}

// Autograd takes no undefined tensors for arguments.
using OptionalTensor = std::optional<Tensor>;

OptionalTensor none_or(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

class GeneralFunction : public torch::autograd::Function<GeneralFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, const OptionalTensor& attn_mask,
                               const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                               const GeneralOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Inputs inputs = {q,
                           k,
                           v,
                           attn_mask.value_or(Tensor()),
                           alibi_slopes.value_or(Tensor()),
                           sinks.value_or(Tensor())};
    auto results = call_forward(inputs, options);
    variable_list saved(inputs.begin(), inputs.end());
    saved.insert(saved.end(), results.begin(), results.end());
    for (Tensor& tensor : options.tensors()) saved.push_back(std::move(tensor));
    ctx->save_for_backward(std::move(saved));
    c10::List<c10::IValue> values(c10::AnyType::get());
    for (c10::IValue& value : options.values()) values.push_back(std::move(value));
    ctx->saved_data["options"] = std::move(values);
    ctx->set_materialize_grads(false);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    variable_list gradients(7);  // one for every argument of forward
    if (!grad_outputs[0].defined() && !grad_outputs[1].defined()) return gradients;

    const auto saved = ctx->get_saved_variables();
    const auto& out = saved[6];
    const auto dout = grad_outputs[0].defined() ? grad_outputs[0] : at::zeros_like(out);
    c10::List<bool> needs;
    size_t edge = 0;  // autograd numbers the tensors that were given
    for (int i = 0; i < 6; ++i) {
      needs.push_back(saved[i].defined() && ctx->needs_input_grad(edge));
      edge += saved[i].defined();
    }
    std::vector<c10::IValue> values;
    for (const c10::IValue& value : ctx->saved_data["options"].toListRef()) values.push_back(value);
    const auto options = GeneralOptions::from(at::ArrayRef<Tensor>(saved).slice(8), values);
    const auto results = call_backward({dout, saved[0], saved[1], saved[2], out, saved[7],
                                        grad_outputs[1], saved[3], saved[4], saved[5]},
                                       options, needs);
    for (size_t i = 0; i < 6; ++i) {
      if (needs[i]) gradients[i] = results[i];
    }
    return gradients;
  }
};

void forward_autograd(const c10::OperatorHandle&, Stack* stack) {
  const auto arguments = torch::jit::last(*stack, 6 + GeneralOptions::kNumArguments);
  Inputs inputs;
  for (int i = 0; i < 6; ++i) inputs[i] = tensor_or_undefined(arguments[i]);
  const auto options = GeneralOptions::from(arguments.slice(6));
  torch::jit::drop(*stack, arguments.size());
  variable_list results;
  if (needs_gradient(inputs)) {
    const auto& [q, k, v, attn_mask, alibi_slopes, sinks] = inputs;
    results = GeneralFunction::apply(q, k, v, none_or(attn_mask), none_or(alibi_slopes),
                                     none_or(sinks), options);
  } else {
    const at::AutoDispatchBelowADInplaceOrView guard;
    results = call_forward(inputs, options);
  }
  push(*stack, results);
}

// Stands in the graph of a gradient made with create_graph=True, and refuses to be walked.
class GeneralBackwardFunction : public torch::autograd::Function<GeneralBackwardFunction> {
 public:
  static variable_list forward(AutogradContext*, const Tensor& dout, const Tensor& q,
                               const Tensor& k, const Tensor& v, const Tensor& out,
                               const Tensor& lse, const OptionalTensor& dlse,
                               const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                               const OptionalTensor& sinks, const GeneralOptions& options,
                               const c10::IValue& needs) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call_backward(
        {dout, q, k, v, out, lse, dlse.value_or(Tensor()), attn_mask.value_or(Tensor()),
         alibi_slopes.value_or(Tensor()), sinks.value_or(Tensor())},
        options, needs);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "flash_ext.general_backward: is not differentiable: attention has first "
                "derivatives only. For second derivatives use flash_ext.attention_reference.");
  }
};

void backward_autograd(const c10::OperatorHandle&, Stack* stack) {
  const auto arguments = torch::jit::last(*stack, 10 + GeneralOptions::kNumArguments + 1);
  std::array<Tensor, 10> t;
  for (int i = 0; i < 10; ++i) t[i] = tensor_or_undefined(arguments[i]);
  const auto options = GeneralOptions::from(arguments.slice(10, GeneralOptions::kNumArguments));
  const c10::IValue needs = arguments.back();
  torch::jit::drop(*stack, arguments.size());
  variable_list results;
  if (needs_gradient(t)) {
    results =
        GeneralBackwardFunction::apply(t[0], t[1], t[2], t[3], t[4], t[5], none_or(t[6]),
                                       none_or(t[7]), none_or(t[8]), none_or(t[9]), options, needs);
  } else {
    const at::AutoDispatchBelowADInplaceOrView guard;
    results = call_backward(t, options, needs);
  }
  push(*stack, results);
}

// Under autocast q, k and v are cast to its dtype, as scaled_dot_product_attention does, and a
// float mask with them; alibi_slopes and sinks are few and keep theirs where that is float32.
template <c10::DeviceType kDevice, c10::DispatchKey kKey>
void forward_autocast(const c10::OperatorHandle& op, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kKey);
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto first = stack->end() - (6 + GeneralOptions::kNumArguments);
  for (int i = 0; i < 6; ++i) {
    const auto tensor = tensor_or_undefined(first[i]);
    if (!tensor.defined() || !tensor.is_floating_point()) continue;
    if (i >= 4 && tensor.scalar_type() == at::kFloat) continue;
    first[i] = at::autocast::cached_cast(dtype, tensor, kDevice);
  }
  op.callBoxed(stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_ext, Autograd, m) {
  m.impl("general_forward", boxed<&forward_autograd>());
  m.impl("general_backward", boxed<&backward_autograd>());
}

TORCH_LIBRARY_IMPL(flash_ext, AutocastCPU, m) {
  m.impl("general_forward", boxed<&forward_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>>());
}

TORCH_LIBRARY_IMPL(flash_ext, AutocastCUDA, m) {
  m.impl("general_forward", boxed<&forward_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>>());
}

}  // namespace flash_ext
