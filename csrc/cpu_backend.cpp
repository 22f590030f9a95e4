// The CPU kernels behind the operators.
#include "backend.h"
#include "cpu/attention.h"
#include "dispatch.h"

namespace flash_ext::cpu_backend {
namespace {

using CpuElements = TypeList<float, double, c10::Half, c10::BFloat16>;

cpu::TileShape tile_or(Tile tile, cpu::TileShape fallback) {
  if (!tile) return fallback;
  return {static_cast<int>((*tile)[0]), static_cast<int>((*tile)[1])};
}

constexpr auto kV3Refusal = "needs a GPU of compute capability 9.0, got the CPU";

// What "auto" stands for.
Algorithm resolve(const char* op, Algorithm algorithm) {
  TORCH_CHECK(algorithm != Algorithm::kV3, "flash_ext.", op, ": algorithm 'v3' ", kV3Refusal);
  return algorithm == Algorithm::kAuto ? Algorithm::kV2 : algorithm;
}

}  // namespace

void forward(Algorithm algorithm, c10::ScalarType dtype, const ForwardParams& params, Tile tile) {
  const auto shape = tile_or(tile, cpu::default_forward_tile());
  dispatch_dtype(CpuElements{}, dtype, [&](auto element) {
    using Scalar = typename decltype(element)::type;
    resolve("forward", algorithm) == Algorithm::kV1 ? cpu::forward_v1<Scalar>(params, shape)
                                                    : cpu::forward_v2<Scalar>(params, shape);
  });
}

// One backward serves v1 and v2.
void backward(Algorithm algorithm, c10::ScalarType dtype, const BackwardParams& params, Tile tile) {
  resolve("backward", algorithm);
  const auto shape = tile_or(tile, cpu::default_backward_tile());
  dispatch_dtype(CpuElements{}, dtype, [&](auto element) {
    cpu::backward<typename decltype(element)::type>(params, shape);
  });
}

ForwardPlan plan_forward(Algorithm algorithm) {
  const auto tile = cpu::default_forward_tile();
  ForwardPlan plan;
  plan.algorithm = resolve("forward", algorithm);
  plan.kernel.block_m = tile.block_m;
  plan.kernel.block_n = tile.block_n;
  plan.v3_refusal = kV3Refusal;
  return plan;
}

const char* capability() { return cpu::cpu_capability(); }

}  // namespace flash_ext::cpu_backend
