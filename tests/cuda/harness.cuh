// What the kernels of these files share. tests/test_sm90.py compiles them with nvcc, calls them
// through ctypes and says what the results must be. No torch here.
//
// Shared memory enters and leaves the kernels as raw bytes, so that the layout of a tile is stated
// a second time, in Python, and not by the code under test. Whatever a kernel should not read or
// write is filled with 0xff, which is NaN in every type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace flash_ext {

// Threads 0..127 of a block are the warpgroup. Where somebody waits for a barrier, one thread of a
// fifth warp feeds it and one of a sixth ends a kernel that waits in vain.
inline constexpr int kWorkers = 128;
inline constexpr int kFeeder = kWorkers;
inline constexpr int kWatchdog = kWorkers + 32;
inline constexpr int kThreadsWhereSomeoneWaits = kWorkers + 64;

template <typename Storage>
__device__ Storage& shared_memory() {
  extern __shared__ __align__(1024) char smem_bytes[];
  return *reinterpret_cast<Storage*>(smem_bytes);
}

// By the workers; `bytes` is a multiple of 4.
inline __device__ void poison(void* to, int bytes) {
  for (int i = threadIdx.x; i < bytes / 4; i += kWorkers) static_cast<uint32_t*>(to)[i] = ~0u;
}
inline __device__ void copy(void* to, const void* from, int bytes) {
  for (int i = threadIdx.x; i < bytes / 4; i += kWorkers) {
    static_cast<uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[i];
  }
}

// A kernel that hangs would take the whole test run along; a trap is an error with a name.
inline __device__ void trap_unless_done(const volatile int& done) {
  const auto now = [] {
    uint64_t nanoseconds;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
    return nanoseconds;
  };
  const uint64_t start = now();
  while (done < kWorkers) {
    if (now() - start > 20'000'000'000ull) __trap();
    __nanosleep(1000);
  }
}

// Calls visit(element, index in a dense row-major matrix of 64 rows) for each element of a thread's
// accumulator, by the map at the top of ptx/wgmma.cuh.
template <int kTiles, typename Visit>
__device__ __forceinline__ void visit_accumulator(float (&acc)[kTiles][4], Visit visit) {
  const int warp_idx = threadIdx.x / 32;
  const int lane_idx = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * warp_idx + lane_idx / 4 + (i < 2 ? 0 : 8);
      visit(acc[j][i], row * 8 * kTiles + 8 * j + 2 * (lane_idx % 4) + i % 2);
    }
  }
}
template <int kTiles>
__device__ __forceinline__ void read_accumulator(float (&acc)[kTiles][4], const float* from) {
  visit_accumulator(acc, [&](float& x, int i) { x = from[i]; });
}
template <int kTiles>
__device__ __forceinline__ void write_accumulator(float (&acc)[kTiles][4], float* to) {
  visit_accumulator(acc, [&](float x, int i) { to[i] = x; });
}
template <int kTiles>
__device__ __forceinline__ void poison_accumulator(float (&acc)[kTiles][4]) {
  visit_accumulator(acc, [](float& x, int) { x = __int_as_float(-1); });
}

// ---- host: launches, and templates for run-time values ------------------------------------------

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status));
  }
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t smem_bytes,
            Arguments... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(smem_bytes)),
        "cudaFuncSetAttribute");
  kernel<<<grid, threads, smem_bytes>>>(arguments...);
  check(cudaGetLastError(), "launch");
  check(cudaDeviceSynchronize(), "kernel");
}

// f(std::integral_constant<int, value>) for one of kValues.
template <int... kValues, typename F>
void with_one_of(int64_t value, F f) {
  const bool found =
      ((value == kValues && (f(std::integral_constant<int, kValues>()), true)) || ...);
  if (!found) throw std::runtime_error("no kernel for " + std::to_string(value));
}
template <typename F>
void with_element(int64_t is_bf16, F f) {
  is_bf16 ? f(__nv_bfloat16()) : f(__half());
}
template <typename F>
void with_head_dim(int64_t head_dim, F f) {
  with_one_of<64, 96, 128, 192, 256>(head_dim, f);
}

// What went wrong, or nullptr. ctypes copies it before the next call.
template <typename F>
const char* message_of(F f) {
  static std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace flash_ext
