// The kernel that runs before v3's own where batch entries have lengths that only the GPU knows. It
// writes what the next one reads: tensor maps of the entries, the list of tiles, and whose the
// blocks of packed query rows are; and zeros where no packed sequence has rows. Thread blocks share
// these tasks, the longest first.
#pragma once

#include "common/launch_kernel.cuh"
#include "ptx/griddepcontrol.cuh"
#include "v3/sequence_maps.cuh"
#include "v3/sequence_tiles.cuh"
#include "v3/sequence_workspace.h"

namespace flash_ext::v3 {

inline constexpr int kMaxEntryMaps = 8;
inline constexpr int kMaxUnowned = 3;

// Rows of packed results that belong to no sequence are given the value that a query without keys
// has, or a key without queries. data == nullptr: none are.
struct UnownedRows {
  static constexpr int kHeadsPerBlock = 4;

  char* data = nullptr;
  int64_t head_bytes;
  int64_t row_bytes;
  int bytes;             // of a row's elements, a multiple of 16
  float* lse = nullptr;  // (heads, total_q), where there is one
  int heads = 0;
  bool is_of_keys = false;

  FLASH_HOST_DEVICE int64_t rows(const Sequences& sequences) const {
    return is_of_keys ? sequences.total_k : sequences.total_q;
  }
  FLASH_HOST_DEVICE int head_blocks() const {
    return (heads + kHeadsPerBlock - 1) / kHeadsPerBlock;
  }
  FLASH_HOST_DEVICE int num_blocks(const Sequences& sequences) const {
    const int64_t chunks = (rows(sequences) + kPrepareThreads - 1) / kPrepareThreads;
    return data != nullptr ? static_cast<int>(chunks * head_blocks()) : 0;
  }
};

// Whose the blocks of packed query rows are, see first_row_block(). A block of nobody has -1;
// entries == nullptr: not asked for.
struct RowEntries {
  int* entries = nullptr;
  int block_m;
  int count;
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
  UnownedRows unowned[kMaxUnowned];
  RowEntries rows;
  int num_map_blocks;
};

struct Interval {
  int64_t begin;
  int64_t end;
};

struct PrepareStorage {
  alignas(128) CUtensorMap maps[kPrepareThreads / 32];  // a warp each
  TileSort sort;
};

// By one thread block.
template <typename TileRule>
__device__ __forceinline__ void write_row_entries(const PrepareParams<TileRule>& p) {
  for (int i = threadIdx.x; i < p.rows.count; i += kPrepareThreads) p.rows.entries[i] = -1;
  __syncthreads();
  const int lane_idx = threadIdx.x % 32;
  for (int b = threadIdx.x / 32; b < p.batch; b += kPrepareThreads / 32) {
    const Sequence sequence = p.sequences[b];
    const int first = first_row_block(sequence, b, p.rows.block_m);
    const int past = first + ceil_div(sequence.seqlen_q, p.rows.block_m);
    for (int i = first + lane_idx; i < past; i += 32) p.rows.entries[i] = b;
  }
}

// kPrepareThreads rows of some heads. Where sequences are not one behind the other, as only
// malformed lengths are not, tiles may be left out (see list_tiles()) and blocks of rows be
// another's: then every row is written here, for the kernels that follow overwrite what they have.
template <typename TileRule>
__device__ __forceinline__ void clear_unowned_rows(PrepareStorage& smem,
                                                   const PrepareParams<TileRule>& p,
                                                   const UnownedRows& unowned, int index) {
  const int64_t chunk = index / unowned.head_blocks();
  const int first_head = index % unowned.head_blocks() * UnownedRows::kHeadsPerBlock;
  const int past_last_head = min(first_head + UnownedRows::kHeadsPerBlock, unowned.heads);
  const int64_t row0 = chunk * kPrepareThreads;
  // +1 where a sequence begins and -1 behind its end: a row's sum is how many it belongs to.
  int* const steps = smem.sort.counts;
  steps[threadIdx.x] = 0;
  __syncthreads();
  bool overlaps = false;
  for (int b = threadIdx.x; b < p.batch; b += kPrepareThreads) {
    const auto rows_of = [&](int batch_idx) {
      const Sequence sequence = p.sequences[batch_idx];
      const int64_t first = unowned.is_of_keys ? sequence.k_begin : sequence.q_begin;
      const int rows = unowned.is_of_keys ? sequence.seqlen_k : sequence.seqlen_q;
      return Interval{first, first + rows};
    };
    const Interval own = rows_of(b);
    overlaps |= b + 1 < p.batch && rows_of(b + 1).begin < own.end;
    const int64_t begin = max(own.begin - row0, int64_t{0});
    const int64_t end = max(own.end - row0, int64_t{0});
    if (begin >= end) continue;
    if (begin < kPrepareThreads) atomicAdd(&steps[begin], 1);
    if (end < kPrepareThreads) atomicAdd(&steps[end], -1);
  }
  overlaps = __syncthreads_or(overlaps);
  const int step = steps[threadIdx.x];
  int ignored;
  const int owners = sum_before(step, smem.sort.warp_sums, &ignored) + step;
  const int64_t row = row0 + threadIdx.x;
  const bool clears = row < unowned.rows(p.sequences) && (owners <= 0 || overlaps);
  if (!__syncthreads_or(clears)) return;
  steps[threadIdx.x] = clears;
  __syncthreads();
  const int chunks_per_row = unowned.bytes / 16;
  for (int head_idx = first_head; head_idx < past_last_head; ++head_idx) {
    if (clears && unowned.lse != nullptr) {
      unowned.lse[head_idx * p.sequences.total_q + row] = -INFINITY;
    }
    for (int i = threadIdx.x; i < kPrepareThreads * chunks_per_row; i += kPrepareThreads) {
      const int r = i / chunks_per_row;
      if (!steps[r]) continue;
      char* const to = unowned.data + head_idx * unowned.head_bytes +
                       (row0 + r) * unowned.row_bytes + i % chunks_per_row * 16;
      *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    }
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
    const MapTemplate& from = p.templates[map_idx - batch_idx * p.num_templates];
    if (from.data == nullptr) return;
    write_entry_map(smem.maps[warp_idx], from, p.sequences[batch_idx], batch_idx, p.maps + map_idx);
    return;
  }
  index -= p.num_map_blocks;
  if (p.rows.entries != nullptr && index-- == 0) {
    write_row_entries(p);
    return;
  }
#pragma unroll
  for (int i = 0; i < kMaxUnowned; ++i) {
    const int num_blocks = p.unowned[i].num_blocks(p.sequences);
    if (index >= 0 && index < num_blocks) clear_unowned_rows(smem, p, p.unowned[i], index);
    index -= num_blocks;
  }
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
  int64_t num_blocks = 1 + p.num_map_blocks + (p.rows.entries != nullptr);
  for (const UnownedRows& unowned : p.unowned) num_blocks += unowned.num_blocks(p.sequences);
  launch_kernel(prepare_sequences_kernel<TileRule>, num_blocks, kPrepareThreads, 0, stream,
                "the kernel that prepares sequences", p, shape);
}

}  // namespace flash_ext::v3
