// The tiles of batch entries of lengths that only the GPU knows, the longest first: a list that a
// persistent grid walks once for every head.
#pragma once

#include "common/block_range.h"
#include "common/sequences.h"

namespace flash_ext::v3 {

// One of them, with the lengths of its batch entry.
struct alignas(16) SequenceTile {
  int batch_idx;
  int rank;  // among the entry's own
  int seqlen_q;
  int seqlen_k;
};

inline constexpr int kPrepareThreads = 1024;

// The sum of `x` of the threads before this one, and of all. By a whole thread block of
// kPrepareThreads; `warp_sums`: in shared memory, one for each warp.
__device__ __forceinline__ int sum_before(int x, int* warp_sums, int* total) {
  const int lane_idx = threadIdx.x % 32;
  const int warp_idx = threadIdx.x / 32;
  const auto scan = [lane_idx](int sum) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane_idx >= offset) sum += other;
    }
    return sum;
  };
  const int sum = scan(x);
  if (lane_idx == 31) warp_sums[warp_idx] = sum;
  __syncthreads();
  if (warp_idx == 0) warp_sums[lane_idx] = scan(warp_sums[lane_idx]);
  __syncthreads();
  *total = warp_sums[31];
  return sum - x + (warp_idx > 0 ? warp_sums[warp_idx - 1] : 0);
}

// Calls f(tile) for the tiles of all entries. By a whole thread block: a warp has some entries, and
// takes the tiles of each side by side.
template <typename TileRule, typename Function>
__device__ __forceinline__ void for_each_tile(const Sequences& sequences, int batch,
                                              const TileRule& rule, const Function& f) {
  constexpr int kWarps = kPrepareThreads / 32;
  const int lane_idx = threadIdx.x % 32;
  const int per_warp = min(32, ceil_div(batch, kWarps));
  for (int first = threadIdx.x / 32 * per_warp; first < batch; first += kWarps * per_warp) {
    const int count = min(per_warp, batch - first);
    Sequence own;
    if (lane_idx < count) own = sequences[first + lane_idx];
    for (int i = 0; i < count; ++i) {
      Sequence sequence;
      sequence.seqlen_q = __shfl_sync(0xffffffffu, own.seqlen_q, i);
      sequence.seqlen_k = __shfl_sync(0xffffffffu, own.seqlen_k, i);
      const int num_tiles = rule.num_tiles(sequence);
      for (int rank = lane_idx; rank < num_tiles; rank += 32) {
        f(SequenceTile{first + i, rank, sequence.seqlen_q, sequence.seqlen_k});
      }
    }
  }
}

struct TileSort {
  int counts[kPrepareThreads];  // of tiles of a length; then where those of that length go
  int warp_sums[kPrepareThreads / 32];
};

// Writes the list and its length, by one thread block. TileRule has
//   int num_tiles(const Sequence&) const           of a batch entry and a head
//   int blocks(const SequenceTile&) const          that a tile visits
// Lengths that differ by less than 2^shift blocks count as one. Of more tiles than `max_tiles`,
// which malformed lengths alone have, the shortest are left out.
template <typename TileRule>
__device__ __forceinline__ void list_tiles(TileSort& smem, const Sequences& sequences, int batch,
                                           const TileRule& rule, int shift, SequenceTile* tiles,
                                           int max_tiles, int* num_tiles) {
  const auto bucket = [&](const SequenceTile& tile) {  // the longest tiles' is 0
    return kPrepareThreads - 1 - min(rule.blocks(tile) >> shift, kPrepareThreads - 1);
  };
  smem.counts[threadIdx.x] = 0;
  __syncthreads();
  for_each_tile(sequences, batch, rule,
                [&](const SequenceTile& tile) { atomicAdd(&smem.counts[bucket(tile)], 1); });
  __syncthreads();
  int total;
  const int before = sum_before(smem.counts[threadIdx.x], smem.warp_sums, &total);
  smem.counts[threadIdx.x] = before;
  __syncthreads();
  for_each_tile(sequences, batch, rule, [&](const SequenceTile& tile) {
    const auto at = static_cast<unsigned>(atomicAdd(&smem.counts[bucket(tile)], 1));
    if (at < static_cast<unsigned>(max_tiles)) tiles[at] = tile;
  });
  if (threadIdx.x == 0) {
    *num_tiles = static_cast<int>(min(static_cast<unsigned>(total), unsigned(max_tiles)));
  }
}

}  // namespace flash_ext::v3
