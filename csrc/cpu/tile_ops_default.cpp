// The tile operations for any machine, with vectors of 16 bytes (SSE2, NEON). The block of C leaves
// room among the 16 registers of SSE2 for the products that it has to form before it adds them.
#define FLASH_CPU_ISA baseline
#define FLASH_VECTOR_BYTES 16
#define FLASH_MICRO_ROWS 4
#define FLASH_MICRO_VECS 2
#include "cpu/tile_ops_impl.h"
