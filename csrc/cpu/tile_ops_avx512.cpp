// The tile operations for AVX-512. Of the 32 registers of 16 floats 24 hold C and 4 a row of B.
#ifdef __x86_64__

#include "cpu/tile_ops.h"

// After the includes above, so that nothing of theirs is compiled for this instruction set.
#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define FLASH_CPU_ISA avx512
#define FLASH_VECTOR_BYTES 64
#define FLASH_MICRO_ROWS 6
#define FLASH_MICRO_VECS 4
#include "cpu/tile_ops_impl.h"

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif  // __x86_64__
