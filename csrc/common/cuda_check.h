// CUDA failures become exceptions that name the kernel and the shape; nothing here ends the
// process.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "params.h"

namespace flash_ext {

inline std::string to_string(const AttentionShape& s) {
  return "batch=" + std::to_string(s.batch) + " heads_q=" + std::to_string(s.heads_q) +
         " heads_kv=" + std::to_string(s.heads_kv) + " seqlen_q=" + std::to_string(s.seqlen_q) +
         " seqlen_k=" + std::to_string(s.seqlen_k) + " head_dim=" + std::to_string(s.head_dim);
}

inline void check_cuda(cudaError_t status, const char* what, const AttentionShape& shape) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("flash_ext: ") + what +
                           " failed: " + cudaGetErrorName(status) + " (" +
                           cudaGetErrorString(status) + ") with " + to_string(shape));
}

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

// What one thread block may have of the current GPU's shared memory, in bytes.
inline int shared_memory_limit(const AttentionShape& shape) {
  int device = 0;
  int bytes = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice", shape);
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "cudaDeviceGetAttribute", shape);
  return bytes;
}

// Launches `kernel` with more than the default 48 KB of shared memory where it needs it.
template <typename Params>
void launch_kernel(void (*kernel)(Params), int64_t num_blocks, int num_threads, int smem_bytes,
                   cudaStream_t stream, const char* name, const Params& params,
                   const AttentionShape& shape) {
  if (num_blocks == 0) return;
  const unsigned grid = grid_size(num_blocks, shape);
  if (smem_bytes > 48 * 1024) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes), name,
        shape);
  }
  kernel<<<grid, num_threads, smem_bytes, stream>>>(params);
  check_cuda(cudaGetLastError(), name, shape);
}

}  // namespace flash_ext
