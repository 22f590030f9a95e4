// Scratch memory of the v3 forward for general calls: none, unless lengths are read on the GPU or
// tiles are taken from a counter.
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

// Whether all rows of a tile see the same blocks of a block_mask, and no window's left edge lies in
// one: Variant::kUniformSparse.
inline bool has_uniform_blocks(const ForwardParams& params) {
  const GeneralParams& general = params.general;
  return general.block_mask.data != nullptr && general.block_mask.block_size >= kLeastBlockM &&
         general.window_left < 0 && general.softcap == 0.0 && general.alibi_slopes.data == nullptr;
}

// Of lengths that the GPU reads, or the one number of tiles taken.
inline int64_t general_workspace_floats(const ForwardParams& params) {
  return has_uniform_blocks(params) ? 1 : general_workspace(params).num_floats;
}

}  // namespace flash_ext::v3
