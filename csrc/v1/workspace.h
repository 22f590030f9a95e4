// Scratch memory of the v1 forward: the O, l and m that Algorithm 1 keeps in HBM between K/V
// blocks.
#pragma once

#include "params.h"

namespace flash_ext {

// O: (batch, heads_q, seqlen_q, padded head_dim); l and m: (batch, heads_q, seqlen_q). All fp32: O
// is rescaled once a block, and rounding it to 16 bits each time would cost accuracy that v2 does
// not.
inline int64_t v1_workspace_floats(const AttentionShape& s) {
  return s.batch * s.heads_q * s.seqlen_q * (s.padded_head_dim() + 2);
}

}  // namespace flash_ext
