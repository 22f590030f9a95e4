// The kernel that runs before v3's own where batch entries have lengths that only the GPU knows. It
// writes what the next one reads: tensor maps of the entries and the list of tiles; and zeros where
// no packed sequence has rows. Thread blocks share these tasks, the longest first.
#pragma once

#include "common/launch_kernel.cuh"
#include "ptx/griddepcontrol.cuh"
#include "v3/sequence_maps.cuh"
#include "v3/sequence_tiles.cuh"
#include "v3/sequence_workspace.h"

namespace flash_ext::v3 {

inline constexpr int kMaxEntryMaps = 8;

// Rows of packed results that belong to no sequence are given the value that a query without keys
// has. data == nullptr: none are.
struct UnownedRows {
  char* data = nullptr;
  int64_t head_bytes;
  int64_t row_bytes;
  int bytes;             // of a row's elements, a multiple of 16
  float* lse = nullptr;  // (heads, total_q)
  int heads = 0;
};

template <typename TileRule>
struct PrepareParams {
  Sequences sequences;
  int batch;
  TileRule rule;
  MapTemplate templates[kMaxEntryMaps];
  int num_templates;
  CUtensorMap* maps;  // (batch, num_templates)
  SequenceTile* tiles;
  int max_tiles;
  int tile_shift;  // see list_tiles()
  int* num_tiles;
  UnownedRows unowned;
  int num_map_blocks;
};

struct PrepareStorage {
  alignas(128) CUtensorMap maps[kPrepareThreads / 32];  // a warp each
  TileSort sort;
};

// kPrepareThreads rows of one head. Malformed lengths may leave out tiles (see list_tiles()): then
// every row is written here, for the kernel that follows overwrites what it has tiles of.
template <typename TileRule>
__device__ __forceinline__ void clear_unowned_rows(PrepareStorage& smem,
                                                   const PrepareParams<TileRule>& p, int index) {
  const int64_t chunk = index / p.unowned.heads;
  const int head_idx = index % p.unowned.heads;
  const int64_t row0 = chunk * kPrepareThreads;
  // +1 where a sequence begins and -1 behind its end: a row's sum is how many it belongs to.
  int* const steps = smem.sort.counts;
  steps[threadIdx.x] = 0;
  __syncthreads();
  int num_tiles = 0;
  for (int b = threadIdx.x; b < p.batch; b += kPrepareThreads) {
    const Sequence sequence = p.sequences[b];
    num_tiles += p.rule.num_tiles(sequence);
    const int64_t begin = max(sequence.q_begin - row0, int64_t{0});
    const int64_t end = max(sequence.q_begin + sequence.seqlen_q - row0, int64_t{0});
    if (begin >= end) continue;
    if (begin < kPrepareThreads) atomicAdd(&steps[begin], 1);
    if (end < kPrepareThreads) atomicAdd(&steps[end], -1);
  }
  __syncthreads();
  int total;
  sum_before(num_tiles, smem.sort.warp_sums, &total);
  __syncthreads();
  const int step = steps[threadIdx.x];
  int ignored;
  const int owners = sum_before(step, smem.sort.warp_sums, &ignored) + step;
  const int64_t row = row0 + threadIdx.x;
  const bool clears = row < p.sequences.total_q && (owners <= 0 || total > p.max_tiles);
  if (!__syncthreads_or(clears)) return;
  steps[threadIdx.x] = clears;
  __syncthreads();
  if (clears) p.unowned.lse[head_idx * p.sequences.total_q + row] = -INFINITY;
  const int chunks_per_row = p.unowned.bytes / 16;
  for (int i = threadIdx.x; i < kPrepareThreads * chunks_per_row; i += kPrepareThreads) {
    const int r = i / chunks_per_row;
    if (!steps[r]) continue;
    char* const to = p.unowned.data + head_idx * p.unowned.head_bytes +
                     (row0 + r) * p.unowned.row_bytes + i % chunks_per_row * 16;
    *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
  }
}

template <typename TileRule>
__global__ void __launch_bounds__(kPrepareThreads, 1)
    prepare_sequences_kernel(const __grid_constant__ PrepareParams<TileRule> p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ PrepareStorage smem;
  ptx::griddepcontrol_launch_dependents();
  int index = static_cast<int>(blockIdx.x);
  if (index == 0) {
    list_tiles(smem.sort, p.sequences, p.batch, p.rule, p.tile_shift, p.tiles, p.max_tiles,
               p.num_tiles);
    return;
  }
  index -= 1;
  if (index < p.num_map_blocks) {
    const int warp_idx = threadIdx.x / 32;
    const int64_t map_idx = int64_t{index} * (kPrepareThreads / 32) + warp_idx;
    if (map_idx >= int64_t{p.batch} * p.num_templates) return;
    const int64_t batch_idx = map_idx / p.num_templates;
    write_entry_map(smem.maps[warp_idx], p.templates[map_idx - batch_idx * p.num_templates],
                    p.sequences[batch_idx], batch_idx, p.maps + map_idx);
    return;
  }
  clear_unowned_rows(smem, p, index - p.num_map_blocks);
#endif
}

// Launches it. `p` lacks what follows from the rest: places in the workspace and thread blocks. The
// kernel behind it may be launched with Overlap::kPrevious if all its threads that read what is
// written here wait for it (griddepcontrol_wait()).
template <typename TileRule>
void launch_prepare_sequences(PrepareParams<TileRule>& p, const SequenceWorkspace& layout,
                              float* workspace, int64_t max_blocks_of_a_tile,
                              const AttentionShape& shape, cudaStream_t stream) {
  constexpr int64_t kWarps = kPrepareThreads / 32;
  p.maps = reinterpret_cast<CUtensorMap*>(workspace + layout.maps);
  p.tiles = reinterpret_cast<SequenceTile*>(workspace + layout.tiles);
  p.num_tiles = reinterpret_cast<int*>(workspace + layout.num_tiles);
  p.max_tiles = static_cast<int>(layout.max_tiles);
  p.tile_shift = 0;
  while ((max_blocks_of_a_tile >> p.tile_shift) >= kPrepareThreads) ++p.tile_shift;
  p.num_map_blocks = static_cast<int>((int64_t{p.batch} * p.num_templates + kWarps - 1) / kWarps);
  const int64_t row_chunks = (p.sequences.total_q + kPrepareThreads - 1) / kPrepareThreads;
  const int64_t clearing = p.unowned.data != nullptr ? row_chunks * p.unowned.heads : 0;
  launch_kernel(prepare_sequences_kernel<TileRule>, 1 + p.num_map_blocks + clearing,
                kPrepareThreads, 0, stream, "the kernel that prepares sequences", p, shape);
}

}  // namespace flash_ext::v3
