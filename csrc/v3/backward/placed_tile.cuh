// The tiles of general calls: the lengths of their batch entry, where its rows lie, and by which
// tensor maps it is copied. What the producer warpgroup asks, once a tile.
#pragma once

#include "ptx/tensor_map.cuh"
#include "v3/backward/config.cuh"
#include "v3/backward/general_workspace.h"

namespace flash_ext::v3::backward {

// The thread block's tile of this round. Where lengths are read on the GPU the list that
// prepare_sequences.cuh has written is walked once for each key head, else as in plain calls. It is
// read from L2: that kernel has ended before this one began, but not by what this one waits for.
template <typename Config>
__device__ __forceinline__ GeneralTileWork take_tile(const GeneralKernelParams& p, int round) {
  GeneralTileWork work{};
  if (p.entries.maps == nullptr) {
    const unsigned index = tile_index(round, static_cast<int>(blockIdx.x), p.schedule.num_walkers);
    if (index >= static_cast<unsigned>(p.schedule.num_tiles)) return work;
    const auto [rank, head] =
        p.schedule.order.place_long_first(static_cast<int>(index), p.long_ranks);
    work.n_block = rank;
    work.batch_idx = head / p.schedule.heads_kv;
    work.kv_head_idx = head - work.batch_idx * p.schedule.heads_kv;
    work.is_valid = 1;
    work.seqlen_q = p.band.seqlen_q;
    work.seqlen_k = p.band.seqlen_k;
    work.diagonal = p.band.diagonal;
    return work;
  }
  TileOrder order = p.schedule.order;
  order.tiles_per_head = __ldcg(p.entries.num_tiles);
  const unsigned index = tile_index(round, static_cast<int>(blockIdx.x), p.schedule.num_walkers);
  if (index >= static_cast<unsigned>(order.tiles_per_head * order.num_heads)) return work;
  const auto [rank, head] = order.place(static_cast<int>(index));
  static_assert(sizeof(SequenceTile) == sizeof(int4));
  const int4 listed = __ldcg(reinterpret_cast<const int4*>(p.entries.tiles) + rank);
  const SequenceTile tile{listed.x, listed.y, listed.z, listed.w};
  work.n_block = tile.rank;
  work.kv_head_idx = head;
  work.batch_idx = tile.batch_idx;
  work.is_valid = 1;
  work.seqlen_q = tile.seqlen_q;
  work.seqlen_k = tile.seqlen_k;
  work.diagonal = p.is_top_left ? 0 : tile.seqlen_k - tile.seqlen_q;
  if (p.sequences.is_packed()) {
    const Sequence sequence = p.sequences[tile.batch_idx];
    work.first_row_block = first_row_block(sequence, tile.batch_idx, Config::kBlockM);
    work.lse_begin = sequence.q_begin - int64_t{tile.batch_idx} * p.heads_q * p.sequences.total_q;
  }
  return work;
}

// See row_block().
__device__ __forceinline__ int64_t row_block_of(const KernelParams& p, const TileWork& tile,
                                                int head_idx, int m_block) {
  return row_block(p, tile.batch_idx, head_idx, m_block);
}
__device__ __forceinline__ int64_t row_block_of(const GeneralKernelParams& p,
                                                const GeneralTileWork& tile, int head_idx,
                                                int m_block) {
  return row_block(p, p.sequences.is_packed() ? 0 : tile.batch_idx, head_idx,
                   tile.first_row_block + m_block);
}

// Two tensor maps and the batch coordinate in them.
struct EntryMaps {
  const CUtensorMap& first;
  const CUtensorMap& second;
  int batch_idx;
};

// Of K and V, Q and dO, dK and dV.
__device__ __forceinline__ EntryMaps key_maps(const KernelParams& p, const TileWork& tile) {
  return {p.k_map, p.v_map, tile.batch_idx};
}
__device__ __forceinline__ EntryMaps query_maps(const KernelParams& p, const TileWork& tile) {
  return {p.q_map, p.dout_map, tile.batch_idx};
}
__device__ __forceinline__ EntryMaps gradient_maps(const KernelParams& p, const TileWork& tile) {
  return {p.dk_map, p.dv_map, tile.batch_idx};
}

__device__ __forceinline__ const CUtensorMap* own_maps(const GeneralKernelParams& p,
                                                       int batch_idx) {
  return p.entries.maps + int64_t{batch_idx} * p.entries.maps_per_entry;
}
__device__ __forceinline__ EntryMaps key_maps(const GeneralKernelParams& p,
                                              const GeneralTileWork& tile) {
  if (p.entries.maps == nullptr) return {p.k_map, p.v_map, tile.batch_idx};
  const CUtensorMap* const maps = own_maps(p, tile.batch_idx);
  return {maps[0], maps[1], 0};
}
// Q, dO and the gradients have as many rows in every batch entry unless they are packed: keys
// beyond an entry's own have gradients, too, zeros.
__device__ __forceinline__ EntryMaps query_maps(const GeneralKernelParams& p,
                                                const GeneralTileWork& tile) {
  if (!p.sequences.is_packed()) return {p.q_map, p.dout_map, tile.batch_idx};
  const CUtensorMap* const maps = own_maps(p, tile.batch_idx);
  return {maps[2], maps[3], 0};
}
__device__ __forceinline__ EntryMaps gradient_maps(const GeneralKernelParams& p,
                                                   const TileWork& tile) {
  if (!p.sequences.is_packed()) return {p.dk_map, p.dv_map, tile.batch_idx};
  const CUtensorMap* const maps = own_maps(p, tile.batch_idx);
  return {maps[4], maps[5], 0};
}

// By the thread that copies by them, before it first does.
__device__ __forceinline__ void acquire_inputs(const GeneralKernelParams& p, int batch_idx) {
  if (p.entries.maps == nullptr) return;
  const CUtensorMap* const maps = own_maps(p, batch_idx);
  ptx::tensor_map_acquire(maps);
  ptx::tensor_map_acquire(maps + 1);
  if (!p.sequences.is_packed()) return;
  ptx::tensor_map_acquire(maps + 2);
  ptx::tensor_map_acquire(maps + 3);
}
__device__ __forceinline__ void acquire_gradients(const KernelParams&, int) {}
__device__ __forceinline__ void acquire_gradients(const GeneralKernelParams& p, int batch_idx) {
  if (!p.sequences.is_packed()) return;
  const CUtensorMap* const maps = own_maps(p, batch_idx);
  if (p.dk.data != nullptr) ptx::tensor_map_acquire(maps + 4);
  if (p.dv.data != nullptr) ptx::tensor_map_acquire(maps + 5);
}

}  // namespace flash_ext::v3::backward
