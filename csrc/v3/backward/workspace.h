// Scratch memory of the v3 backward: linear in the sequence lengths.
#pragma once

#include "params.h"

namespace flash_ext::v3 {

// Query rows of a block. Rows are padded to whole ones, so that tiles of row statistics and of dQ
// need no edge handling.
inline constexpr int backward_block_m(int64_t padded_head_dim) {
  return padded_head_dim == 64 ? 128 : 64;
}

// Keys of a tile, at head_dim up to 128.
inline constexpr int kBackwardBlockN = 128;

// The sections of BackwardParams::workspace, as offsets in floats.
//   lse_log2:  (batch, heads_q, blocks of seqlen_q, kBlockM + 4); see RowStatistics
//   delta:     (batch, heads_q, padded seqlen_q)
//   key_mean:  (batch, heads_kv, padded head_dim)
//   dq_accum:  (batch, heads_q, padded seqlen_q, padded head_dim), where dQ is asked for
//   dq_row_sum: (batch, heads_q, blocks of seqlen_q, 2, kBlockM), likewise, at head_dim
//               256 only
//   dq_turns:   integers, (batch, heads_q, blocks of seqlen_q, 2), likewise, for deterministic
//               gradients only
//   dsink_blocks: (batch, heads_q, blocks of seqlen_q), where dsinks is asked for
struct BackwardWorkspace {
  int64_t num_m_blocks = 0;
  int64_t lse_log2 = 0;
  int64_t delta = 0;
  int64_t key_mean = 0;
  int64_t dq_accum = 0;
  int64_t dq_row_sum = 0;
  int64_t dq_turns = 0;
  int64_t dsink_blocks = 0;
  int64_t num_floats = 0;

  explicit BackwardWorkspace(const BackwardParams& params) {
    const AttentionShape& s = params.shape;
    const int64_t block_m = backward_block_m(s.padded_head_dim());
    num_m_blocks = (s.seqlen_q + block_m - 1) / block_m;
    const int64_t blocks = s.batch * s.heads_q * num_m_blocks;
    delta = lse_log2 + blocks * (block_m + 4);
    key_mean = delta + blocks * block_m;
    // Where whole lines of 128 bytes are added.
    dq_accum = (key_mean + s.batch * s.heads_kv * s.padded_head_dim() + 31) / 32 * 32;
    const int64_t dq_rows = params.dq.data != nullptr ? blocks * block_m : 0;
    dq_row_sum = dq_accum + dq_rows * s.padded_head_dim();
    dq_turns = dq_row_sum + (s.padded_head_dim() == 256 ? 2 * dq_rows : 0);
    dsink_blocks = dq_turns + (params.deterministic ? 2 * dq_rows / block_m : 0);
    num_floats = dsink_blocks + (params.general_gradients.dsinks.data != nullptr ? blocks : 0);
  }
};

inline int64_t backward_workspace_floats(const BackwardParams& params) {
  return BackwardWorkspace(params).num_floats;
}

}  // namespace flash_ext::v3
