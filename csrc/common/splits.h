// Few query tiles leave most of the GPU idle. There each tile's keys are split into shares that are
// computed like tiles of their own and merged afterwards (Flash-Decoding; Dao et al. 2023).
#pragma once

#include <algorithm>

#include "common/block_range.h"
#include "params.h"

namespace flash_ext {

// How many shares let the tiles of one sequence, `tiles` over all its heads, fill `slots`, where a
// share of fewer than `min_keys` is not worth the merging. One sequence decides, not the batch, on
// which no row's bits may depend.
inline int64_t num_splits(int64_t tiles, int64_t slots, int64_t seqlen_k, int64_t min_keys) {
  return std::max<int64_t>(1, std::min(slots / std::max<int64_t>(1, tiles), seqlen_k / min_keys));
}

// What a share of the keys gets of a tile's `blocks`.
FLASH_HOST_DEVICE BlockRange split_blocks(int blocks, int split, int num_splits) {
  const int size = ceil_div(blocks, num_splits);
  const int begin = split * size;
  return {begin < blocks ? begin : blocks, begin + size < blocks ? begin + size : blocks};
}

// Scratch: O / l in fp32, m and l of every share and row; none where the keys are not split.
inline int64_t shares_floats(const AttentionShape& s, int64_t splits, int64_t padded_head_dim) {
  return splits == 1 ? 0 : splits * s.batch * s.heads_q * s.seqlen_q * (padded_head_dim + 2);
}

}  // namespace flash_ext
