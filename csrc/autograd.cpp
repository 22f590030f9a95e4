// Gradients and autocast of torch.ops.flash_ext.*. Autograd lives in C++, so that a call costs no
// Python, and a call that needs no gradient costs one check.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace flash_ext {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTile = at::OptionalIntArrayRef;

using ForwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                    std::optional<double>, c10::string_view,
                                                    c10::string_view, bool, OptionalTile);
using BackwardSignature = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
    const std::optional<Tensor>&, std::optional<double>, c10::string_view, c10::string_view, bool,
    std::array<bool, 3>, OptionalTile);

const auto& forward_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flash_ext::forward", "")
                             .typed<ForwardSignature>();
  return op;
}

const auto& backward_operator() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flash_ext::backward", "")
                             .typed<BackwardSignature>();
  return op;
}

// Dual tensors of forward-mode differentiation count, so that torch refuses them: below autograd
// their tangents would be lost without a word.
template <typename... Tensors>
bool needs_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() &&
         ((tensors.requires_grad() || tensors._fw_grad(/*level=*/0).defined()) || ...);
}

class AttentionFunction : public torch::autograd::Function<AttentionFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& q, const Tensor& k,
                               const Tensor& v, std::optional<double> scale,
                               c10::string_view causal, c10::string_view algorithm,
                               bool deterministic, OptionalTile tile) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, lse] =
        forward_operator().call(q, k, v, scale, causal, algorithm, deterministic, tile);
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["causal"] = std::string(causal);
    ctx->saved_data["algorithm"] = std::string(algorithm);
    ctx->saved_data["deterministic"] = deterministic;
    ctx->saved_data["tile"] = tile ? std::make_optional(tile->vec()) : std::nullopt;
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    variable_list gradients(8);  // one for every argument of forward
    if (!grad_outputs[0].defined() && !grad_outputs[1].defined()) return gradients;

    const auto saved = ctx->get_saved_variables();
    const auto& out = saved[3];
    const auto dout = grad_outputs[0].defined() ? grad_outputs[0] : at::zeros_like(out);
    const auto dlse =
        grad_outputs[1].defined() ? std::make_optional(grad_outputs[1]) : std::nullopt;
    const std::array<bool, 3> needs = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                       ctx->needs_input_grad(2)};
    const auto tile = ctx->saved_data["tile"].toOptional<std::vector<int64_t>>();
    auto [dq, dk, dv] = backward_operator().call(
        dout, saved[0], saved[1], saved[2], out, saved[4], dlse,
        ctx->saved_data["scale"].toOptional<double>(), ctx->saved_data["causal"].toStringRef(),
        ctx->saved_data["algorithm"].toStringRef(), ctx->saved_data["deterministic"].toBool(),
        needs, tile ? OptionalTile(*tile) : std::nullopt);
    if (needs[0]) gradients[0] = dq;
    if (needs[1]) gradients[1] = dk;
    if (needs[2]) gradients[2] = dv;
    return gradients;
  }
};

std::tuple<Tensor, Tensor> forward_autograd(const Tensor& q, const Tensor& k, const Tensor& v,
                                            std::optional<double> scale, c10::string_view causal,
                                            c10::string_view algorithm, bool deterministic,
                                            OptionalTile tile) {
  if (!needs_gradient(q, k, v)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return forward_operator().call(q, k, v, scale, causal, algorithm, deterministic, tile);
  }
  auto results = AttentionFunction::apply(q, k, v, scale, causal, algorithm, deterministic, tile);
  return {results[0], results[1]};
}

// Stands in the graph of a gradient made with create_graph=True, and refuses to be walked.
class AttentionBackwardFunction : public torch::autograd::Function<AttentionBackwardFunction> {
 public:
  static variable_list forward(AutogradContext*, const Tensor& dout, const Tensor& q,
                               const Tensor& k, const Tensor& v, const Tensor& out,
                               const Tensor& lse, const std::optional<Tensor>& dlse,
                               std::optional<double> scale, c10::string_view causal,
                               c10::string_view algorithm, bool deterministic,
                               std::array<bool, 3> needs, OptionalTile tile) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [dq, dk, dv] = backward_operator().call(dout, q, k, v, out, lse, dlse, scale, causal,
                                                 algorithm, deterministic, needs, tile);
    return {dq, dk, dv};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "flash_ext.backward: is not differentiable: attention has first derivatives only. "
                "For second derivatives use flash_ext.attention_reference.");
  }
};

std::tuple<Tensor, Tensor, Tensor> backward_autograd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const std::optional<Tensor>& dlse, std::optional<double> scale,
    c10::string_view causal, c10::string_view algorithm, bool deterministic,
    std::array<bool, 3> needs, OptionalTile tile) {
  if (!needs_gradient(dout, q, k, v, out, lse) && !(dlse && needs_gradient(*dlse))) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return backward_operator().call(dout, q, k, v, out, lse, dlse, scale, causal, algorithm,
                                    deterministic, needs, tile);
  }
  auto results = AttentionBackwardFunction::apply(dout, q, k, v, out, lse, dlse, scale, causal,
                                                  algorithm, deterministic, needs, tile);
  return {results[0], results[1], results[2]};
}

// Under autocast q, k and v are cast to its dtype, as scaled_dot_product_attention does.
template <c10::DeviceType kDevice, c10::DispatchKey kKey>
std::tuple<Tensor, Tensor> forward_autocast(const Tensor& q, const Tensor& k, const Tensor& v,
                                            std::optional<double> scale, c10::string_view causal,
                                            c10::string_view algorithm, bool deterministic,
                                            OptionalTile tile) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kKey);
  const auto dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [dtype](const Tensor& tensor) {
    return at::autocast::cached_cast(dtype, tensor, kDevice);
  };
  return forward_operator().call(cast(q), cast(k), cast(v), scale, causal, algorithm, deterministic,
                                 tile);
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_ext, Autograd, m) {
  m.impl("forward", forward_autograd);
  m.impl("backward", backward_autograd);
}

TORCH_LIBRARY_IMPL(flash_ext, AutocastCPU, m) {
  m.impl("forward", forward_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(flash_ext, AutocastCUDA, m) {
  m.impl("forward", forward_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace flash_ext
