// The order in which a persistent grid takes its tiles: of queries in the forward, of keys in the
// backward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace flash_ext::v3 {

// Thread block (or cluster) c of n takes the tiles c, 2n-1-c, 2n+c, 4n-1-c, ... of an order in
// which tiles get shorter, so that what one round gives a block too much the next takes back.
// Unsigned: the round after the last may lie up to n past 2^31.
__device__ __forceinline__ unsigned tile_index(int round, int c, int n) {
  return static_cast<unsigned>(round) * n + (round % 2 == 0 ? c : n - 1 - c);
}

// That order: heads are cut into sections, whose operands should fit in L2 together. A section's
// tiles come by their rank in the head, the longest first; the heads of a rank side by side.
struct TileOrder {
  int tiles_per_head;
  int num_heads;
  int heads_per_section;

  struct Place {
    int rank;
    int head;
  };

  __device__ __forceinline__ Place place(int index) const {
    const int section_tiles = heads_per_section * tiles_per_head;
    const int section = index / section_tiles;
    const int in_section = index - section * section_tiles;
    const int first_head = section * heads_per_section;
    const int heads = min(heads_per_section, num_heads - first_head);
    const int rank = in_section / heads;
    return {rank, first_head + in_section - rank * heads};
  }

  // The same where a head's tiles of the ranks from `long_ranks` on are shorter: those of all heads
  // come last, rank by rank. Under a window the grid's last round then consists of them.
  __device__ __forceinline__ Place place_long_first(int index, int long_ranks) const {
    const int num_long = long_ranks * num_heads;
    if (index < num_long) return TileOrder{long_ranks, num_heads, heads_per_section}.place(index);
    const int rank = (index - num_long) / num_heads;
    return {long_ranks + rank, index - num_long - rank * num_heads};
  }
};

// How many of a head's tiles, by rank, are as long as those in its middle; length(rank). Under a
// causal window the first rows see fewer keys than those behind them, and the last keys are seen by
// fewer rows.
template <typename Length>
int num_long_ranks(int tiles_per_head, const Length& length) {
  int ranks = tiles_per_head;
  const auto longest = length(ranks / 2);
  while (ranks > 1 && length(ranks - 1) < longest) --ranks;
  return ranks;
}

// What a section may take of L2 (50 MB), beside what else passes through.
inline constexpr int64_t kSectionBytes = 32 << 20;

// How many heads of `head_bytes` make a section where tiles differ in length. A section ends where
// two rounds of the grid end, or the next one's long tiles would fall to some thread blocks alone.
inline int64_t heads_per_section(int64_t tiles_per_head, int64_t num_heads, int64_t head_bytes,
                                 int64_t num_walkers) {
  const int64_t unit = 2 * num_walkers / std::gcd(2 * num_walkers, tiles_per_head);
  const int64_t units = std::max<int64_t>(1, kSectionBytes / (unit * head_bytes + 1));
  return std::min(units * unit, num_heads);
}

}  // namespace flash_ext::v3
