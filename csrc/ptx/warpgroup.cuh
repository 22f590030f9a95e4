// What the four warps of a warpgroup do together (Hopper): registers and named barriers. PTX ISA
// 9.7.13.1, 9.7.20.5.
#pragma once

namespace flash_ext::ptx {

// The same value, of which ptxas now knows that a whole warp has it: lane 0's.
__device__ __forceinline__ int warp_uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Every warp of the warpgroup gives registers back, or waits for its share of what others gave. The
// sum over the thread block must stay within what the kernel was launched with: one register too
// many, and setmaxnreg_inc never returns.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Barrier 0 is __syncthreads(). `threads` counts those that wait and those that only arrive.
__device__ __forceinline__ void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace flash_ext::ptx
