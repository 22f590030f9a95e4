// Scratch memory of the CUDA backward: linear in the sequence lengths.
#pragma once

#include "params.h"

namespace flash_ext {

// Query rows are padded to this many, the tallest tile of any configuration, so that tiles of row
// statistics and of dQ need no edge handling.
inline constexpr int64_t kBackwardRowPadding = 128;

// The sections of BackwardParams::workspace, as offsets in floats.
//   lse_log2, delta, dq_row_sum: (batch, heads_q, padded seqlen_q)
//   key_mean:                    (batch, heads_kv, padded head_dim)
//   dq_accum:                    (batch, heads_q, padded seqlen_q, padded head_dim), and only where
//   dQ
//                                is accumulated by several thread blocks
struct BackwardWorkspace {
  int64_t padded_seqlen_q = 0;
  int64_t lse_log2 = 0;
  int64_t delta = 0;
  int64_t dq_row_sum = 0;
  int64_t key_mean = 0;
  int64_t dq_accum = 0;
  int64_t num_floats = 0;

  // dQ alone, or dQ to the bit, comes from a kernel of its own that needs no accumulator in memory.
  static bool accumulates_dq(const BackwardParams& params) {
    return params.dq.data != nullptr && !params.deterministic &&
           (params.dk.data != nullptr || params.dv.data != nullptr);
  }

  explicit BackwardWorkspace(const BackwardParams& params) {
    const AttentionShape& s = params.shape;
    padded_seqlen_q =
        (s.seqlen_q + kBackwardRowPadding - 1) / kBackwardRowPadding * kBackwardRowPadding;
    const int64_t rows = s.batch * s.heads_q * padded_seqlen_q;
    delta = lse_log2 + rows;
    dq_row_sum = delta + rows;
    key_mean = dq_row_sum + rows;
    dq_accum = key_mean + s.batch * s.heads_kv * s.padded_head_dim();
    num_floats = dq_accum + (accumulates_dq(params) ? rows * s.padded_head_dim() : 0);
  }
};

inline int64_t backward_workspace_floats(const BackwardParams& params) {
  return BackwardWorkspace(params).num_floats;
}

}  // namespace flash_ext
