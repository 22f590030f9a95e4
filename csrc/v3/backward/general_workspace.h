// Scratch memory of the v3 backward for general calls.
#pragma once

#include "v3/backward/workspace.h"
#include "v3/sequence_workspace.h"

namespace flash_ext::v3 {

// Tensor maps of a batch entry: of K and V; packed, of Q, dO, dK and dV behind them.
inline constexpr int kPaddedBackwardMaps = 2;
inline constexpr int kPackedBackwardMaps = 6;

// The sections, as offsets in floats:
//   rows:        as in plain calls; packed, of one batch entry that has the blocks of all
//   sequences:   see SequenceWorkspace; tiles are of keys
//   key_mean:    packed, in place of that of `rows`: (batch, heads_kv, padded head_dim)
//   row_entries: packed, integers, one for each block of query rows: whose it is, -1: nobody's
struct GeneralBackwardWorkspace {
  BackwardWorkspace rows;
  SequenceWorkspace entries;
  int64_t sequences = 0;
  int64_t key_mean = 0;
  int64_t row_entries = 0;
  int64_t num_floats = 0;

  explicit GeneralBackwardWorkspace(const BackwardParams& params)
      : rows(with_rows_of_all(params)), entries(make_entries(params)) {
    const AttentionShape& s = params.shape;
    const bool is_packed = params.general.sequences.is_packed();
    sequences = (rows.num_floats + 31) / 32 * 32;
    const int64_t own_means = sequences + (entries.num_floats + 31) / 32 * 32;
    key_mean = is_packed ? own_means : rows.key_mean;
    row_entries = own_means + (is_packed ? s.batch * s.heads_kv * s.padded_head_dim() : 0);
    num_floats = row_entries + (is_packed ? rows.num_m_blocks : 0);
  }

 private:
  static BackwardParams with_rows_of_all(BackwardParams params) {
    AttentionShape& s = params.shape;
    const Sequences& sequences = params.general.sequences;
    if (!sequences.is_packed()) return params;
    const int64_t block_m = backward_block_m(s.padded_head_dim());
    s.seqlen_q = (sequences.total_q / block_m + s.batch) * block_m;
    s.batch = 1;
    return params;
  }

  static SequenceWorkspace make_entries(const BackwardParams& params) {
    const AttentionShape& s = params.shape;
    const Sequences& sequences = params.general.sequences;
    return SequenceWorkspace(sequences, s.batch, sequences.total_k, s.seqlen_k, kBackwardBlockN,
                             sequences.is_packed() ? kPackedBackwardMaps : kPaddedBackwardMaps);
  }
};

inline int64_t general_backward_workspace_floats(const BackwardParams& params) {
  return GeneralBackwardWorkspace(params).num_floats;
}

}  // namespace flash_ext::v3
