// CUDA failures become exceptions that name the kernel and the shape; nothing here ends the
// process. And facts about the current GPU.
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

inline int device_attribute(cudaDeviceAttr attribute, const AttentionShape& shape) {
  int device = 0;
  int value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice", shape);
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute", shape);
  return value;
}

// What one thread block may have of the current GPU's shared memory, in bytes.
inline int shared_memory_limit(const AttentionShape& shape) {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, shape);
}

inline int multiprocessor_count(const AttentionShape& shape) {
  return device_attribute(cudaDevAttrMultiProcessorCount, shape);
}

}  // namespace flash_ext
