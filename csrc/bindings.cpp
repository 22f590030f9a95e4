// flash_ext._C. Loading it registers the operators; what it exposes itself are host-side facts for
// build_info() and explain(). No torch types cross here, so no heavy torch headers are needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "backend.h"
#include "checks.h"

namespace flash_ext {
namespace {

c10::ScalarType parse_dtype(const std::string& name) {
  if (name == "float16") return c10::ScalarType::Half;
  if (name == "bfloat16") return c10::ScalarType::BFloat16;
  return name == "float64" ? c10::ScalarType::Double : c10::ScalarType::Float;
}

const char* algorithm_name(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::kV1:
      return "v1";
    case Algorithm::kV3:
      return "v3";
    default:
      return "v2";
  }
}

// What v3 asks of an attn_mask.
struct MaskFacts {
  std::string dtype;
  std::array<int64_t, 4> strides;  // 0 where it is broadcast
  bool is_aligned;                 // its first element, to 16 bytes
};

// What decides about a general call: which features it has, but none of their tensors.
GeneralParams describe_general(const std::string& causal, const AttentionShape& shape,
                               std::array<int64_t, 2> window, double softcap, int block_size,
                               const std::vector<std::string>& given, const MaskFacts& mask) {
  alignas(16) static int present[2];
  const auto pointer = [&](const char* name) -> int* {
    return std::find(given.begin(), given.end(), name) != given.end() ? present : nullptr;
  };
  GeneralParams general(parse_causal("explain", causal), shape.seqlen_q, shape.seqlen_k);
  general.window_left = window[0];
  general.window_right = window[1];
  general.softcap = softcap;
  if (pointer("attn_mask") != nullptr) {
    const auto [batch, head, row, key] = mask.strides;
    general.mask = {mask.is_aligned ? present : present + 1, batch, head, row, key};
    general.mask_type = mask.dtype == "bool"       ? MaskType::kBool
                        : mask.dtype == "float16"  ? MaskType::kHalf
                        : mask.dtype == "bfloat16" ? MaskType::kBFloat16
                                                   : MaskType::kFloat;
  }
  general.block_mask.data = pointer("block_mask");
  general.block_mask.block_size = block_size;
  general.alibi_slopes.data = pointer("alibi_slopes");
  general.sinks.data = pointer("sinks");
  general.dropout.rng_state = reinterpret_cast<const uint64_t*>(pointer("dropout_p"));
  general.sequences.seqlens_k = pointer("seqlens_k");
  return general;
}

// The kernel that torch.ops.flash_ext.forward, or general_forward, would run on tensors of this
// shape; `is_aligned`: of q, k and v, whether their rows begin at multiples of 16 bytes; `given`:
// the names of the arguments beyond plain attention; `mask_*`: of attn_mask, if that is given.
pybind11::dict plan_forward(const std::string& device_name, const std::string& algorithm,
                            const std::string& dtype, int64_t batch, int64_t heads_q,
                            int64_t heads_kv, int64_t seqlen_q, int64_t seqlen_k, int64_t head_dim,
                            const std::string& causal, std::array<bool, 3> is_aligned, double scale,
                            std::array<int64_t, 2> window, double softcap, int block_size,
                            const std::vector<std::string>& given, const std::string& mask_dtype,
                            std::array<int64_t, 4> mask_strides, bool mask_is_aligned) {
  const c10::Device device(device_name);
  ForwardParams params;
  params.shape = {batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim};
  params.mask = Mask::make(parse_causal("explain", causal), seqlen_q, seqlen_k);
  params.softmax_scale = scale;
  params.is_general = !given.empty();
  if (params.is_general)
    params.general = describe_general(causal, params.shape, window, softcap, block_size, given,
                                      {mask_dtype, mask_strides, mask_is_aligned});
  TensorView* const views[] = {&params.q, &params.k, &params.v};
  for (int i = 0; i < 3; ++i) views[i]->aligned16 = is_aligned[i];
  const auto asked = parse_algorithm("explain", algorithm);
  const auto plan = device.is_cuda()
                        ? cuda_backend::plan_forward(asked, parse_dtype(dtype), params, device)
                        : cpu_backend::plan_forward(asked);
  pybind11::dict result;
  result["algorithm"] = algorithm_name(plan.algorithm);
  result["backward"] = algorithm_name(plan.backward);
  result["block_m"] = plan.kernel.block_m;
  result["block_n"] = plan.kernel.block_n;
  result["num_warps"] = plan.kernel.num_warps;
  result["shared_memory_bytes"] = plan.kernel.shared_memory_bytes;
  result["num_thread_blocks"] = plan.kernel.num_thread_blocks;
  result["workspace_bytes"] = plan.workspace_bytes;
  result["v3_refusal"] = plan.v3_refusal;
  return result;
}

}  // namespace
}  // namespace flash_ext

PYBIND11_MODULE(_C, m) {
  using namespace pybind11::literals;
  m.doc() = "Operators of flash_ext (registered on import) and facts about their kernels.";
  m.def("cpu_capability", &flash_ext::cpu_backend::capability);
  m.def("plan_forward", &flash_ext::plan_forward, pybind11::kw_only(), "device"_a, "algorithm"_a,
        "dtype"_a, "batch"_a, "heads_q"_a, "heads_kv"_a, "seqlen_q"_a, "seqlen_k"_a, "head_dim"_a,
        "causal"_a, "is_aligned"_a, "scale"_a, "window"_a, "softcap"_a, "block_size"_a, "given"_a,
        "mask_dtype"_a, "mask_strides"_a, "mask_is_aligned"_a);
}
