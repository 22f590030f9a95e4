// One spelling for functions that run in kernels and, for the CPU kernels and unit tests, on the
// host.
#pragma once

#ifdef __CUDACC__
#define FLASH_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FLASH_HOST_DEVICE inline
#endif
