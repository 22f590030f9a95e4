// Into how many shares the v2 forward splits the keys.
#pragma once

#include "common/splits.h"

namespace flash_ext::v2 {

// How many thread blocks one sequence yields decides their shape. One sequence, not the batch: a
// row's bits must not depend on its batch-mates.
enum class Grid {
  kFull,
  kSmall,  // too few to fill the GPU: smaller tiles, and several warps to a row
};

// Query rows of a tile.
constexpr int64_t forward_block_m(int64_t element_bytes, int64_t padded_head_dim, Grid grid) {
  const bool is_small = grid == Grid::kSmall;
  const int64_t rows_of_16_bits = padded_head_dim == 64
                                      ? (is_small ? 32 : 128)
                                      : (padded_head_dim == 128 && !is_small ? 128 : 64);
  const int64_t rows_of_fp32 = padded_head_dim == 256 || is_small ? 32 : 64;
  return element_bytes == 4 ? rows_of_fp32 : rows_of_16_bits;
}

// Thread blocks of one sequence.
inline int64_t sequence_tiles(const AttentionShape& s, int64_t element_bytes, Grid grid) {
  const int64_t rows = forward_block_m(element_bytes, s.padded_head_dim(), grid);
  return s.heads_q * ((s.seqlen_q + rows - 1) / rows);
}

// A sequence of at most this many tall tiles cannot fill a GPU on its own.
inline constexpr int kSmallGridTiles = 16;

inline Grid forward_grid(const AttentionShape& s, int64_t element_bytes) {
  return sequence_tiles(s, element_bytes, Grid::kFull) <= kSmallGridTiles ? Grid::kSmall
                                                                          : Grid::kFull;
}

// H200, bf16: 1x1x4096, d=128 takes 36 us so, 41 with one thread block a multiprocessor or 1024
// keys a share, 120 without shares; 1x8x1024, d=128 25 us, without shares 33; but 4x1x1024, d=64 15
// us, without shares 9.
inline constexpr int64_t kSplitSlotsPerMultiprocessor = 2;
inline constexpr int64_t kMinKeysPerSplit = 512;
inline constexpr int64_t kMinElementsToSplit = 128 * 1024;  // of one head's K

inline int64_t forward_splits(const AttentionShape& s, int64_t element_bytes,
                              int64_t num_multiprocessors) {
  if (s.seqlen_k * s.padded_head_dim() < kMinElementsToSplit) return 1;
  const int64_t tiles = sequence_tiles(s, element_bytes, forward_grid(s, element_bytes));
  if (2 * tiles > num_multiprocessors) return 1;
  return num_splits(tiles, kSplitSlotsPerMultiprocessor * num_multiprocessors, s.seqlen_k,
                    kMinKeysPerSplit);
}

inline int64_t forward_workspace_floats(const AttentionShape& s, int64_t element_bytes,
                                        int64_t num_multiprocessors) {
  return shares_floats(s, forward_splits(s, element_bytes, num_multiprocessors),
                       s.padded_head_dim());
}

}  // namespace flash_ext::v2
