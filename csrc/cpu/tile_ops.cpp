// The choice of the tile operations, once per process.
#include "cpu/tile_ops.h"

#include <ATen/Version.h>

#include <string>

#include "cpu/attention.h"

namespace flash_ext::cpu {

namespace avx512 {
extern const TileTables tables;
}
namespace avx2 {
extern const TileTables tables;
}
namespace baseline {
extern const TileTables tables;
}

namespace {

struct InstructionSet {
  const char* name;
  const TileTables& tables;
};

// Torch's own finding, so that its ATEN_CPU_CAPABILITY environment variable holds here too. Its
// "AVX512" implies F, BW, DQ, VL and FMA, its "AVX2" FMA.
const InstructionSet& instruction_set() {
  static const InstructionSet chosen = []() -> InstructionSet {
#ifdef __x86_64__
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return {"avx512", avx512::tables};
    if (capability == "AVX2") return {"avx2", avx2::tables};
#endif
    return {"default", baseline::tables};
  }();
  return chosen;
}

}  // namespace

const char* cpu_capability() { return instruction_set().name; }

template <>
const TileOps<float>& tile_ops<float>() {
  return instruction_set().tables.float_ops;
}

template <>
const TileOps<double>& tile_ops<double>() {
  return instruction_set().tables.double_ops;
}

template <>
const TileLoads<float>& tile_loads<float>() {
  return instruction_set().tables.float_loads;
}

template <>
const TileLoads<double>& tile_loads<double>() {
  return instruction_set().tables.double_loads;
}

template <>
const TileLoads<c10::Half>& tile_loads<c10::Half>() {
  return instruction_set().tables.half_loads;
}

template <>
const TileLoads<c10::BFloat16>& tile_loads<c10::BFloat16>() {
  return instruction_set().tables.bfloat16_loads;
}

}  // namespace flash_ext::cpu
