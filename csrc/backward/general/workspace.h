// Scratch memory of the general CUDA backward: linear in the sequence lengths.
#pragma once

#include "backward/workspace.h"
#include "common/sequences.h"
#include "params.h"

namespace flash_ext {

// Where the number of a query row lies in the sections: sequences begin at multiples of
// kBackwardRowPadding, so that tiles of row statistics need no edge handling. Packed sequences lie
// behind each other, however long the longest is.
struct StatsRows {
  int64_t rows_per_head = 0;   // of the whole batch where it is packed
  int64_t rows_per_entry = 0;  // of one batch entry and head; 0 where they are packed

  StatsRows() = default;
  StatsRows(const AttentionShape& s, const Sequences& sequences) {
    const auto padded = [](int64_t rows) {
      return (rows + kBackwardRowPadding - 1) / kBackwardRowPadding * kBackwardRowPadding;
    };
    if (sequences.is_packed()) {
      rows_per_head = (sequences.total_q / kBackwardRowPadding + s.batch) * kBackwardRowPadding;
    } else {
      rows_per_entry = padded(s.seqlen_q);
      rows_per_head = rows_per_entry * s.batch;
    }
  }

  // Of a sequence's first row. A sequence of n rows from q_begin on ends before the next one's,
  // floor((q_begin + n) / 128) + 1 being at least floor(q_begin / 128) + ceil(n / 128).
  FLASH_HOST_DEVICE int64_t begin(const Sequence& sequence, int64_t batch_idx, int64_t head_idx,
                                  int64_t heads_q) const {
    if (rows_per_entry > 0) return (batch_idx * heads_q + head_idx) * rows_per_entry;
    return head_idx * rows_per_head +
           (sequence.q_begin / kBackwardRowPadding + batch_idx) * kBackwardRowPadding;
  }
};

// The sections of BackwardParams::workspace, as offsets in floats.
//   lse_log2, delta, row_sum:  as StatsRows says, for each head
//   dslope_rows, dsink_rows:   likewise; each row's part of a gradient that is asked for
//   key_mean:                  (batch, heads_kv, padded head_dim)
struct GeneralWorkspace {
  StatsRows rows;
  int64_t lse_log2 = 0;
  int64_t delta = 0;
  int64_t row_sum = 0;
  int64_t dslope_rows = 0;
  int64_t dsink_rows = 0;
  int64_t key_mean = 0;
  int64_t num_floats = 0;

  explicit GeneralWorkspace(const BackwardParams& params)
      : rows(params.shape, params.general.sequences) {
    const AttentionShape& s = params.shape;
    const int64_t num_rows = s.heads_q * rows.rows_per_head;
    delta = lse_log2 + num_rows;
    row_sum = delta + num_rows;
    dslope_rows = row_sum + num_rows;
    dsink_rows = dslope_rows + (params.general_gradients.dslopes.data != nullptr ? num_rows : 0);
    key_mean = dsink_rows + (params.general_gradients.dsinks.data != nullptr ? num_rows : 0);
    num_floats = key_mean + s.batch * s.heads_kv * s.padded_head_dim();
  }
};

inline int64_t general_backward_workspace_floats(const BackwardParams& params) {
  return GeneralWorkspace(params).num_floats;
}

}  // namespace flash_ext
