// Scratch memory of the v3 forward for general calls: none, unless lengths are read on the GPU.
#pragma once

#include "params.h"
#include "v3/forward/splits.h"
#include "v3/sequence_workspace.h"

namespace flash_ext::v3 {

// Tensor maps of a batch entry: of K and V; packed, of Q and O behind them.
inline constexpr int kPaddedMaps = 2;
inline constexpr int kPackedMaps = 4;

// Query rows of the smallest tile.
inline constexpr int kLeastBlockM = 128;

inline SequenceWorkspace general_workspace(const ForwardParams& params) {
  const AttentionShape& s = params.shape;
  const Sequences& sequences = params.general.sequences;
  return SequenceWorkspace(sequences, s.batch, sequences.total_q, s.seqlen_q, kLeastBlockM,
                           sequences.is_packed() ? kPackedMaps : kPaddedMaps);
}

}  // namespace flash_ext::v3
