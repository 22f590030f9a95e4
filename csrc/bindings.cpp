// flash_ext._C. Loading it registers the operators; what it exposes itself are host-side facts for
// build_info() and explain(). No torch types cross here, so no heavy torch headers are needed.
#include <pybind11/pybind11.h>

#include "backend.h"
#include "checks.h"

namespace flash_ext {
namespace {

c10::ScalarType parse_dtype(const std::string& name) {
  if (name == "float16") return c10::ScalarType::Half;
  if (name == "bfloat16") return c10::ScalarType::BFloat16;
  return name == "float64" ? c10::ScalarType::Double : c10::ScalarType::Float;
}

// The kernel that torch.ops.flash_ext.forward would run on aligned tensors of this shape.
pybind11::dict plan_forward(const std::string& device_name, const std::string& algorithm_name,
                            const std::string& dtype, int64_t batch, int64_t heads_q,
                            int64_t heads_kv, int64_t seqlen_q, int64_t seqlen_k, int64_t head_dim,
                            const std::string& causal) {
  const c10::Device device(device_name);
  const auto algorithm = parse_algorithm("explain", algorithm_name);
  ForwardParams params;
  params.shape = {batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim};
  params.mask = Mask::make(parse_causal("explain", causal), seqlen_q, seqlen_k);
  const auto plan = device.is_cuda()
                        ? cuda_backend::plan_forward(algorithm, parse_dtype(dtype), params, device)
                        : cpu_backend::plan_forward();
  pybind11::dict result;
  result["algorithm"] = algorithm == Algorithm::kV1 ? "v1" : "v2";
  result["block_m"] = plan.block_m;
  result["block_n"] = plan.block_n;
  result["num_warps"] = plan.num_warps;
  result["shared_memory_bytes"] = plan.shared_memory_bytes;
  result["num_thread_blocks"] = plan.num_thread_blocks;
  result["workspace_bytes"] =
      device.is_cuda() ? cuda_backend::forward_workspace_bytes(algorithm, params.shape) : 0;
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
        "causal"_a);
}
