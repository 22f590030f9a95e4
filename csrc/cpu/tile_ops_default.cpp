// The tile operations for any machine, with vectors of 16 bytes (SSE2, NEON). Two columns of vectors
// fit the 16 registers of SSE2 as well.
#define FLASH_CPU_ISA baseline
#define FLASH_VECTOR_BYTES 16
#define FLASH_MICRO_ROWS 4
#define FLASH_MICRO_VECS 2
#include "cpu/tile_ops_impl.h"
