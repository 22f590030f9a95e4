// Kernel launches: checked, with all the shared memory they ask for.
#pragma once

#include "common/cuda_check.h"

namespace flash_ext {

// The number of thread blocks as a launch takes it: all tiles lie on grid.x, whose limit is 2^31
// - 1.
inline unsigned grid_size(int64_t num_blocks, const AttentionShape& shape) {
  if (num_blocks > 0x7fffffff) {
    throw std::runtime_error("flash_ext: " + std::to_string(num_blocks) +
                             " thread blocks exceed the grid limit of 2147483647 with " +
                             to_string(shape));
  }
  return static_cast<unsigned>(num_blocks);
}

// Whether a kernel may begin while the one before it on the stream still runs. It must then wait
// for that one before it touches what the two share (ptx/griddepcontrol.cuh).
enum class Overlap { kNone, kPrevious };

// kPrevious where the code of `kernel` that this GPU runs has the wait in it. Asked once a launch
// of several kernels from one source file, which are all compiled for the same GPUs.
template <typename Params>
Overlap overlap_of(void (*kernel)(Params), const char* name, const AttentionShape& shape) {
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), name, shape);
  return attributes.ptxVersion >= 90 ? Overlap::kPrevious : Overlap::kNone;
}

// Launches `kernel` with more than the default 48 KB of shared memory where it needs it.
template <typename Params>
void launch_kernel(void (*kernel)(Params), int64_t num_blocks, int num_threads, int smem_bytes,
                   cudaStream_t stream, const char* name, const Params& params,
                   const AttentionShape& shape, Overlap overlap = Overlap::kNone) {
  if (num_blocks == 0) return;
  const unsigned grid = grid_size(num_blocks, shape);
  if (smem_bytes > 48 * 1024) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes), name,
        shape);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = num_threads;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap == Overlap::kPrevious ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), name, shape);
}

}  // namespace flash_ext
