// The tiles of general calls: where they lie, the lengths of their batch entry, and by which tensor
// maps that entry is copied. What the two threads of the producer ask, once a tile.
#pragma once

#include "ptx/tensor_map.cuh"
#include "v3/forward/config.cuh"
#include "v3/forward/kernel_params.cuh"

namespace flash_ext::v3::forward {

// The thread block's tile of this round. Where lengths are read on the GPU the list that
// prepare_sequences.cuh has written is walked once for each head, else as in plain calls. Where
// tiles are taken from a counter `round` is the tile's number, and tiles begin at row 0, as the
// mask's blocks do.
template <typename Config>
__device__ __forceinline__ typename Config::Tile take_tile(const typename Config::Params& p,
                                                           int round) {
  if constexpr (Config::kIsGeneral) {
    if (p.entries.maps != nullptr) {
      TileOrder order = p.schedule.order;
      order.tiles_per_head = *p.entries.num_tiles;
      const unsigned index =
          tile_index(round, static_cast<int>(blockIdx.x), p.schedule.num_thread_blocks);
      const auto num_tiles = static_cast<unsigned>(order.tiles_per_head * order.num_heads);
      if (index >= num_tiles) return {0, 0, 0, 0, 0, 0};
      const auto [rank, head] = order.place(static_cast<int>(index));
      const SequenceTile tile = p.entries.tiles[rank];
      return {first_row(tile.seqlen_q, tile.rank, Config::kBlockM),
              head,
              tile.batch_idx,
              tile.seqlen_q,
              tile.seqlen_k,
              1};
    }
    const unsigned index = Config::kIsUniform ? static_cast<unsigned>(round)
                                              : tile_index(round, static_cast<int>(blockIdx.x),
                                                           p.schedule.num_thread_blocks);
    if (index >= static_cast<unsigned>(p.schedule.num_tiles)) return {0, 0, 0, 0, 0, 0};
    const auto [rank, head] =
        p.schedule.order.place_long_first(static_cast<int>(index), p.long_ranks);
    const int batch_idx = head / p.schedule.heads_q;
    return {Config::kIsUniform ? (p.schedule.order.tiles_per_head - 1 - rank) * Config::kBlockM
                               : first_row(p.band.seqlen_q, rank, Config::kBlockM),
            head - batch_idx * p.schedule.heads_q,
            batch_idx,
            p.band.seqlen_q,
            p.band.seqlen_k,
            1};
  } else {
    return p.schedule.template tile<Config::kSplitsKeys>(round);
  }
}

template <typename Config>
__device__ __forceinline__ int first_row_of(const typename Config::Params& p,
                                            const typename Config::Tile& tile) {
  if constexpr (Config::kIsGeneral) {
    return tile.row0;
  } else {
    return p.schedule.first_row(tile, p.mask.seqlen_q, Config::kBlockM);
  }
}

__device__ __forceinline__ BandMask band_of(const GeneralKernelParams& p, const PlacedTile& tile) {
  BandMask band = p.band;
  band.seqlen_q = tile.seqlen_q;
  band.seqlen_k = tile.seqlen_k;
  band.diagonal = p.is_top_left ? 0 : tile.seqlen_k - tile.seqlen_q;
  return band;
}

// A tensor map, K's with V's behind it, and the batch coordinate in it.
struct EntryMap {
  const CUtensorMap* map;
  int batch_idx;
};

// The copies of K and V.
template <typename Config>
__device__ __forceinline__ EntryMap kv_maps(const typename Config::Params& p, int batch_idx) {
  if constexpr (Config::kIsGeneral) {
    if (p.entries.maps != nullptr) {
      return {p.entries.maps + int64_t{batch_idx} * p.entries.maps_per_entry, 0};
    }
  }
  return {p.kv_maps, batch_idx};
}

// Q and O have as many rows in every batch entry unless they are packed.
template <typename Config>
__device__ __forceinline__ EntryMap q_map(const typename Config::Params& p, int batch_idx) {
  if constexpr (Config::kIsGeneral) {
    if (p.entries.maps_per_entry == kPackedMaps) {
      return {p.entries.maps + int64_t{batch_idx} * kPackedMaps + 2, 0};
    }
  }
  return {&p.q_map, batch_idx};
}

template <typename Config>
__device__ __forceinline__ EntryMap out_map(const typename Config::Params& p, int batch_idx) {
  if constexpr (Config::kIsGeneral) {
    if (p.entries.maps_per_entry == kPackedMaps) {
      return {p.entries.maps + int64_t{batch_idx} * kPackedMaps + 3, 0};
    }
  }
  return {&p.out_map, batch_idx};
}

// The same as take_tile(), by the thread that copies K and V, or Q and O: it acquires their maps.
template <typename Config>
__device__ __forceinline__ typename Config::Tile take_kv_tile(const typename Config::Params& p,
                                                              int round) {
  const typename Config::Tile tile = take_tile<Config>(p, round);
  if constexpr (Config::kIsGeneral) {
    if (p.entries.maps != nullptr && tile.is_valid) {
      const CUtensorMap* const maps = kv_maps<Config>(p, tile.batch_idx).map;
      ptx::tensor_map_acquire(maps);
      ptx::tensor_map_acquire(maps + 1);
    }
  }
  return tile;
}

template <typename Config>
__device__ __forceinline__ typename Config::Tile take_q_tile(const typename Config::Params& p,
                                                             int round) {
  const typename Config::Tile tile = take_tile<Config>(p, round);
  if constexpr (Config::kIsGeneral) {
    if (p.entries.maps_per_entry == kPackedMaps && tile.is_valid) {
      ptx::tensor_map_acquire(q_map<Config>(p, tile.batch_idx).map);
      ptx::tensor_map_acquire(out_map<Config>(p, tile.batch_idx).map);
    }
  }
  return tile;
}

}  // namespace flash_ext::v3::forward
