// Which blocks of the score matrix a tile visits, and which of those need element-wise masking.
#pragma once

#include "common/mask.h"

namespace flash_ext {

FLASH_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Blocks [begin, end) are visited, the others hold no visible element.
struct BlockRange {
  int begin;
  int end;
};

// K/V blocks seen by the query rows [row0, row0 + block_m). Rows past seqlen_q see nothing.
FLASH_HOST_DEVICE BlockRange key_blocks(const Mask& mask, int row0, int block_m, int block_n) {
  const int last = row0 + block_m < mask.seqlen_q ? row0 + block_m - 1 : mask.seqlen_q - 1;
  return {0, last < row0 ? 0 : ceil_div(mask.key_end(last), block_n)};
}

// Query blocks that see key0, the first key of a K/V block, or a later one.
FLASH_HOST_DEVICE BlockRange query_blocks(const Mask& mask, int key0, int block_m) {
  return {mask.row_begin(key0) / block_m, ceil_div(mask.seqlen_q, block_m)};
}

// Every row from row0 on sees all of [key0, key0 + block_n): no masking of this block is needed.
FLASH_HOST_DEVICE bool block_is_full(const Mask& mask, int row0, int key0, int block_n) {
  return key0 + block_n <= mask.key_end(row0);
}

}  // namespace flash_ext
