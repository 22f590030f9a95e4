// Where the queries and keys of a batch entry lie, and how many they are. Lengths come from the
// caller's device memory and may be anything: every one is clamped here, so that no kernel reads or
// writes outside the tensors whatever they hold.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace flash_ext {

// Of one batch entry.
struct Sequence {
  int64_t q_begin = 0;  // its first row of q, out, dout and lse
  int64_t k_begin = 0;  // its first row of k and v
  int seqlen_q = 0;
  int seqlen_k = 0;
};

// Of the whole batch. All pointers nullptr: every entry has all the rows that the tensors have.
struct Sequences {
  const int* seqlens_k = nullptr;     // (batch): keys used, the first ones of each entry
  const int* cu_seqlens_q = nullptr;  // (batch + 1): packed, entry b is rows [cu[b], cu[b + 1])
  const int* cu_seqlens_k = nullptr;  // given if and only if cu_seqlens_q is
  int64_t total_q = 0;                // rows of the packed tensors
  int64_t total_k = 0;
  int max_seqlen_q = 0;  // of any entry: what grids and workspaces are sized by
  int max_seqlen_k = 0;

  FLASH_HOST_DEVICE bool is_packed() const { return cu_seqlens_q != nullptr; }

  FLASH_HOST_DEVICE Sequence operator[](int64_t batch_idx) const {
    Sequence sequence{0, 0, max_seqlen_q, max_seqlen_k};
    if (is_packed()) {
      sequence.seqlen_q = slice(cu_seqlens_q, batch_idx, total_q, max_seqlen_q, &sequence.q_begin);
      sequence.seqlen_k = slice(cu_seqlens_k, batch_idx, total_k, max_seqlen_k, &sequence.k_begin);
    }
    if (seqlens_k != nullptr) {
      sequence.seqlen_k = static_cast<int>(clamp(seqlens_k[batch_idx], 0, sequence.seqlen_k));
    }
    return sequence;
  }

  // Where lse (and what is laid out like it) has the number of a row.
  FLASH_HOST_DEVICE int64_t lse_index(const Sequence& sequence, int64_t batch_idx, int64_t head_idx,
                                      int64_t heads_q, int64_t row) const {
    return is_packed() ? head_idx * total_q + sequence.q_begin + row
                       : (batch_idx * heads_q + head_idx) * max_seqlen_q + row;
  }

 private:
  FLASH_HOST_DEVICE static int64_t clamp(int64_t x, int64_t lower, int64_t upper) {
    return x < lower ? lower : (x < upper ? x : upper);
  }

  FLASH_HOST_DEVICE static int slice(const int* cu_seqlens, int64_t batch_idx, int64_t total,
                                     int max_seqlen, int64_t* begin) {
    *begin = clamp(cu_seqlens[batch_idx], 0, total);
    const int64_t end = clamp(cu_seqlens[batch_idx + 1], *begin, total);
    return static_cast<int>(clamp(end - *begin, 0, max_seqlen));
  }
};

}  // namespace flash_ext
