// Scratch memory of the CUDA backward: linear in the sequence lengths.
#pragma once

#include "backward/parts.h"
#include "params.h"

namespace flash_ext {

// Query rows are padded to this many, the tallest tile of any configuration, so that tiles of row
// statistics and of dQ need no edge handling.
inline constexpr int64_t kBackwardRowPadding = 128;

// The sections of BackwardParams::workspace, as offsets in floats.
//   lse_log2, delta, dq_row_sum: (batch, heads_q, padded seqlen_q)
//   key_mean:                    (batch, heads_kv, padded head_dim)
//   dq_accum:                    (batch, heads_q, padded seqlen_q, padded head_dim), and only where
//                                dQ is accumulated by several thread blocks
//   dk_parts, dv_parts:          (batch, heads_kv, parts, seqlen_k, padded head_dim), of what is
//                                asked for, and only where a group has several parts
struct BackwardWorkspace {
  int64_t padded_seqlen_q = 0;
  int64_t lse_log2 = 0;
  int64_t delta = 0;
  int64_t dq_row_sum = 0;
  int64_t key_mean = 0;
  int64_t dq_accum = 0;
  int64_t dk_parts = 0;
  int64_t dv_parts = 0;
  int64_t num_floats = 0;

  // dQ alone, or dQ to the bit, comes from a kernel of its own that needs no accumulator in memory.
  static bool accumulates_dq(const BackwardParams& params) {
    return params.dq.data != nullptr && !params.deterministic &&
           (params.dk.data != nullptr || params.dv.data != nullptr);
  }

  BackwardWorkspace(const BackwardParams& params, int64_t num_parts) {
    const AttentionShape& s = params.shape;
    padded_seqlen_q =
        (s.seqlen_q + kBackwardRowPadding - 1) / kBackwardRowPadding * kBackwardRowPadding;
    const int64_t rows = s.batch * s.heads_q * padded_seqlen_q;
    delta = lse_log2 + rows;
    dq_row_sum = delta + rows;
    key_mean = dq_row_sum + rows;
    dq_accum = key_mean + s.batch * s.heads_kv * s.padded_head_dim();
    dk_parts = dq_accum + (accumulates_dq(params) ? rows * s.padded_head_dim() : 0);
    const int64_t part_floats =
        num_parts > 1 ? s.batch * s.heads_kv * num_parts * s.seqlen_k * s.padded_head_dim() : 0;
    dv_parts = dk_parts + (params.dk.data != nullptr ? part_floats : 0);
    num_floats = dv_parts + (params.dv.data != nullptr ? part_floats : 0);
  }
};

inline int64_t backward_workspace_floats(const BackwardParams& params,
                                         int64_t num_multiprocessors) {
  return BackwardWorkspace(params, num_group_parts(params.shape, num_multiprocessors)).num_floats;
}

}  // namespace flash_ext
