// Programmatic dependent launch (Hopper): a kernel that begins while the one before it still runs.
// PTX ISA 9.7.13.13. Nothing where other architectures are compiled for, too.
#pragma once

namespace flash_ext::ptx {

// The next kernel may begin once every thread block has said so or has ended.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Until the kernel before has ended and what it wrote is visible.
__device__ __forceinline__ void griddepcontrol_wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace flash_ext::ptx
