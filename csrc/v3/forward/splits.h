// Few query tiles leave most of the GPU idle. There each tile's keys are split into shares that are
// computed like tiles of their own and merged afterwards (Flash-Decoding; Dao et al. 2023).
#pragma once

#include <algorithm>

#include "params.h"

namespace flash_ext::v3 {

// Query rows of a tile where the keys may be split.
constexpr int64_t forward_block_m(int64_t padded_head_dim) {
  return padded_head_dim == 64 ? 192 : 128;
}

// Fewer keys a share are not worth the merging.
inline constexpr int64_t kMinKeysPerSplit = 1024;

// One sequence decides, not the batch, on which no row's bits may depend.
inline int64_t num_splits(const AttentionShape& s, int64_t num_multiprocessors) {
  const int64_t rows = forward_block_m(s.padded_head_dim_v3());
  const int64_t tiles = std::max<int64_t>(1, s.heads_q * ((s.seqlen_q + rows - 1) / rows));
  return std::max<int64_t>(1, std::min(num_multiprocessors / tiles, s.seqlen_k / kMinKeysPerSplit));
}

// Scratch: O / l in fp32, m and l of every share; none where the keys are not split.
inline int64_t forward_workspace_floats(const AttentionShape& s, int64_t num_multiprocessors) {
  const int64_t splits = num_splits(s, num_multiprocessors);
  return splits == 1 ? 0 : splits * s.batch * s.heads_q * s.seqlen_q * (s.padded_head_dim_v3() + 2);
}

}  // namespace flash_ext::v3
