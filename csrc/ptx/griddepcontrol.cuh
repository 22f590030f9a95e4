// Programmatic dependent launch (Hopper): a kernel that begins while the one before it still runs.
// PTX ISA 9.7.13.13. Nothing in what is compiled for older GPUs.
#pragma once

namespace flash_ext::ptx {

// The next kernel may begin once every thread block has said so or has ended.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Until the kernel before has ended and what it wrote is visible.
__device__ __forceinline__ void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace flash_ext::ptx
