// Scratch memory of v3's kernels for batch entries of lengths that only the GPU knows: linear in
// the lengths.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/sequences.h"

namespace flash_ext::v3 {

// Whether lengths are read on the GPU at all.
inline bool has_own_lengths(const Sequences& sequences) {
  return sequences.is_packed() || sequences.seqlens_k != nullptr;
}

// Of packed sequences each one's blocks of query rows begin behind those of the sequences before
// it, whose last one need not be full. For lengths that overlap this may be another's place; it is
// never outside.
FLASH_HOST_DEVICE int first_row_block(const Sequence& sequence, int64_t batch_idx, int block_m) {
  return static_cast<int>(sequence.q_begin / block_m + batch_idx);
}

// The sections, as offsets in floats from an address that is a multiple of 128 bytes.
//   maps:       (batch, maps_per_entry) tensor maps of 128 bytes
//   tiles:      max_tiles times 16 bytes, see SequenceTile
//   num_tiles:  an integer
struct SequenceWorkspace {
  int64_t maps = 0;
  int64_t tiles = 0;
  int64_t num_tiles = 0;
  int64_t max_tiles = 0;
  int64_t num_floats = 0;

  SequenceWorkspace() = default;
  // Tiles of `block` queries or keys, of which the packed tensor has `total` and an entry at most
  // `max_seqlen`. A packed entry has at most one tile that is not full.
  SequenceWorkspace(const Sequences& sequences, int64_t batch, int64_t total, int64_t max_seqlen,
                    int64_t block, int64_t maps_per_entry) {
    if (!has_own_lengths(sequences)) return;
    max_tiles = batch * ((max_seqlen + block - 1) / block);
    if (sequences.is_packed()) max_tiles = std::min(max_tiles, total / block + batch);
    tiles = maps + batch * maps_per_entry * 32;
    num_tiles = tiles + max_tiles * 4;
    num_floats = num_tiles + 4;
  }
};

}  // namespace flash_ext::v3
