// Stands in for cuda_backend.cpp in a CPU-only build.
#include <c10/util/Exception.h>

#include "backend.h"

namespace flash_ext::cuda_backend {
namespace {

[[noreturn]] void raise_cpu_only(c10::Device device) {
  TORCH_CHECK(false, "flash_ext: q must be on the CPU in this CPU-only build, got ", device,
              ". Rebuild where nvcc and a CUDA build of torch are installed: "
              "pip install --no-build-isolation --force-reinstall --no-deps .");
}

}  // namespace

bool fills_unowned_rows(Algorithm, c10::ScalarType, const ForwardParams&, c10::Device device) {
  raise_cpu_only(device);
}

bool fills_unowned_rows(Algorithm, c10::ScalarType, const BackwardParams&, c10::Device device) {
  raise_cpu_only(device);
}

void forward(Algorithm, c10::ScalarType, ForwardParams, c10::Device device) {
  raise_cpu_only(device);
}

void backward(Algorithm, c10::ScalarType, BackwardParams, c10::Device device) {
  raise_cpu_only(device);
}

ForwardPlan plan_forward(Algorithm, c10::ScalarType, const ForwardParams&, c10::Device device) {
  raise_cpu_only(device);
}

}  // namespace flash_ext::cuda_backend
