// Into how many shares the v3 forward splits the keys.
#pragma once

#include "common/splits.h"

namespace flash_ext::v3 {

// Query rows of a tile where the keys may be split.
constexpr int64_t forward_block_m(int64_t padded_head_dim) {
  return padded_head_dim == 64 ? 192 : 128;
}

inline constexpr int64_t kMinKeysPerSplit = 1024;

inline int64_t forward_splits(const AttentionShape& s, int64_t num_multiprocessors) {
  const int64_t rows = forward_block_m(s.padded_head_dim_v3());
  return num_splits(s.heads_q * ((s.seqlen_q + rows - 1) / rows), num_multiprocessors, s.seqlen_k,
                    kMinKeysPerSplit);
}

inline int64_t forward_workspace_floats(const AttentionShape& s, int64_t num_multiprocessors) {
  return shares_floats(s, forward_splits(s, num_multiprocessors), s.padded_head_dim_v3());
}

}  // namespace flash_ext::v3
