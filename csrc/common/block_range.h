// Which blocks of the score matrix a tile visits, and which of those need element-wise masking.
// AnyMask is Mask or BandMask.
#pragma once

#include "common/mask.h"

namespace flash_ext {

FLASH_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Blocks [begin, end) are visited, the others hold no visible element. Empty where end <= begin.
struct BlockRange {
  int begin;
  int end;
};

// K/V blocks seen by the query rows [row0, row0 + block_m). Rows past seqlen_q see nothing.
template <typename AnyMask>
FLASH_HOST_DEVICE BlockRange key_blocks(const AnyMask& mask, int row0, int block_m, int block_n) {
  const int last = row0 + block_m < mask.seqlen_q ? row0 + block_m - 1 : mask.seqlen_q - 1;
  return {mask.key_begin(row0) / block_n, last < row0 ? 0 : ceil_div(mask.key_end(last), block_n)};
}

// Query blocks that see a key of [key0, last_key]. Without a window that is key0, or a later one.
template <typename AnyMask>
FLASH_HOST_DEVICE BlockRange query_blocks(const AnyMask& mask, int key0, int last_key,
                                          int block_m) {
  return {mask.row_begin(key0) / block_m, ceil_div(mask.row_end(last_key), block_m)};
}

// For kernels without windows, whose last row sees every key that any row sees.
FLASH_HOST_DEVICE BlockRange query_blocks(const Mask& mask, int key0, int block_m) {
  return query_blocks(mask, key0, key0, block_m);
}

// Every row of [row0, last_row] sees all of [key0, key0 + block_n): no masking of this block is
// needed.
template <typename AnyMask>
FLASH_HOST_DEVICE bool block_is_full(const AnyMask& mask, int row0, int last_row, int key0,
                                     int block_n) {
  return mask.key_begin(last_row) <= key0 && key0 + block_n <= mask.key_end(row0);
}

// The same from row0 on, without a window.
FLASH_HOST_DEVICE bool block_is_full(const Mask& mask, int row0, int key0, int block_n) {
  return key0 + block_n <= mask.key_end(row0);
}

}  // namespace flash_ext
