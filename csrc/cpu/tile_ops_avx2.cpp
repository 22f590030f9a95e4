// The tile operations for AVX2 and FMA. Of the 16 registers of 8 floats 12 hold C and 2 a row of B.
#ifdef __x86_64__

#include "cpu/tile_ops.h"

// After the includes above, so that nothing of theirs is compiled for this instruction set.
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define FLASH_CPU_ISA avx2
#define FLASH_VECTOR_BYTES 32
#define FLASH_MICRO_ROWS 6
#define FLASH_MICRO_VECS 2
#include "cpu/tile_ops_impl.h"

#ifdef __clang__
#pragma clang attribute pop
#endif

#endif  // __x86_64__
