// The arguments that torch.ops.flash_ext.general_forward and general_backward share after their
// differentiable tensors. The two operators are registered as boxed functions: this struct is read
// from and put on the dispatcher's stack, and nothing else repeats the list.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

namespace flash_ext {

struct GeneralOptions {
  // In the order of the schema: tensors first, which autograd saves apart from the rest.
  at::Tensor rng_state, seqlens_k, cu_seqlens_q, cu_seqlens_k, block_mask;
  int64_t block_size = 128;
  std::optional<c10::SymInt> max_seqlen_q, max_seqlen_k;
  std::vector<int64_t> window = {-1, -1};
  double softcap = 0.0;
  double dropout_p = 0.0;
  std::optional<double> scale;
  std::string causal = "none";
  std::string algorithm = "auto";
  bool deterministic = false;
  bool validate = false;
  std::optional<std::vector<int64_t>> tile;

  static constexpr auto kSchema =
      "Tensor? rng_state=None, Tensor? seqlens_k=None, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None, Tensor? block_mask=None, int block_size=128, "
      "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, int[2] window=[-1, -1], "
      "float softcap=0., float dropout_p=0., float? scale=None, str causal=\"none\", "
      "str algorithm=\"auto\", bool deterministic=False, bool validate=False, int[2]? tile=None";
  static constexpr int kNumTensors = 5;
  static constexpr int kNumValues = 12;
  static constexpr int kNumArguments = kNumTensors + kNumValues;

  bool is_packed() const { return cu_seqlens_q.defined() || cu_seqlens_k.defined(); }

  std::vector<at::Tensor> tensors() const {
    return {rng_state, seqlens_k, cu_seqlens_q, cu_seqlens_k, block_mask};
  }

  std::vector<c10::IValue> values() const {
    return {block_size, max_seqlen_q, max_seqlen_k, window,        softcap,  dropout_p,
            scale,      causal,       algorithm,    deterministic, validate, tile};
  }

  void push(torch::jit::Stack& stack) const;

  // From kNumTensors optional tensors and kNumValues other values.
  static GeneralOptions from(at::ArrayRef<at::Tensor> tensors, at::ArrayRef<c10::IValue> values);
  static GeneralOptions from(at::ArrayRef<c10::IValue> arguments);
};

// An optional tensor on the stack; undefined stands for None.
inline at::Tensor tensor_or_undefined(const c10::IValue& value) {
  return value.isNone() ? at::Tensor() : value.toTensor();
}

inline c10::IValue none_if_undefined(const at::Tensor& tensor) {
  return tensor.defined() ? c10::IValue(tensor) : c10::IValue();
}

// A kernel that takes its arguments from the stack, and leaves its results there.
template <c10::BoxedKernel::BoxedKernelFunction* kFunction>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<kFunction>();
}

inline void GeneralOptions::push(torch::jit::Stack& stack) const {
  for (const at::Tensor& tensor : tensors()) stack.push_back(none_if_undefined(tensor));
  for (c10::IValue& value : values()) stack.push_back(std::move(value));
}

inline GeneralOptions GeneralOptions::from(at::ArrayRef<at::Tensor> tensors,
                                           at::ArrayRef<c10::IValue> values) {
  const auto optional_size = [](const c10::IValue& value) {
    return value.isNone() ? std::nullopt : std::make_optional(value.toSymInt());
  };
  GeneralOptions options;
  options.rng_state = tensors[0];
  options.seqlens_k = tensors[1];
  options.cu_seqlens_q = tensors[2];
  options.cu_seqlens_k = tensors[3];
  options.block_mask = tensors[4];
  options.block_size = values[0].toInt();
  options.max_seqlen_q = optional_size(values[1]);
  options.max_seqlen_k = optional_size(values[2]);
  options.window = values[3].toIntVector();
  options.softcap = values[4].toDouble();
  options.dropout_p = values[5].toDouble();
  options.scale = values[6].toOptional<double>();
  options.causal = values[7].toStringRef();
  options.algorithm = values[8].toStringRef();
  options.deterministic = values[9].toBool();
  options.validate = values[10].toBool();
  if (!values[11].isNone()) options.tile = values[11].toIntVector();
  return options;
}

inline GeneralOptions GeneralOptions::from(at::ArrayRef<c10::IValue> arguments) {
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& value : arguments.slice(0, kNumTensors)) {
    tensors.push_back(tensor_or_undefined(value));
  }
  return from(tensors, arguments.slice(kNumTensors));
}

}  // namespace flash_ext
