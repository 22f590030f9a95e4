// Batch entries of lengths that only the GPU knows: each gets tensor maps of its own, which end
// where it ends. TMA then reads zeros behind it and clips what is stored there, so that kernels
// take an entry as they take any tensor, and neither neighbours nor padding can leak.
//
// The host encodes one map of each tensor; a small kernel (prepare_sequences.cuh) writes those of
// the entries to global memory: address and rows replaced, all else alike. Their coordinates are
// (column, row, head, 0).
#pragma once

#include "common/sequences.h"
#include "ptx/tensor_map.cuh"
#include "sm90/tensor_map.h"

namespace flash_ext::v3 {

// Of one tensor: what the maps of its batch entries are made from.
struct MapTemplate {
  CUtensorMap map;
  char* data;
  int64_t batch_bytes;  // 0: packed
  int64_t row_bytes;
  bool is_of_keys;  // rows are keys, not queries
};

// `rows`: of the whole tensor (packed) or of a batch entry.
template <typename Element>
MapTemplate make_map_template(const TensorView& view, int64_t heads, int64_t rows, int64_t head_dim,
                              int box_rows, bool is_of_keys) {
  constexpr int64_t kBytes = sizeof(Element);
  return {sm90::make_tensor_map<Element>(view, /*batch=*/1, heads, rows, head_dim, box_rows),
          static_cast<char*>(view.data), view.batch_stride * kBytes, view.row_stride * kBytes,
          is_of_keys};
}

// By a whole warp. `staged` lies in shared memory, and no other map does there later on. A map of
// no rows, which TMA does not know, has the first one of the tensor: nothing may be copied by it
// but what lies before row 0, which is zero.
__device__ __forceinline__ void write_entry_map(CUtensorMap& staged, const MapTemplate& from,
                                                const Sequence& sequence, int64_t batch_idx,
                                                CUtensorMap* to) {
  static_assert(sizeof(CUtensorMap) == 32 * sizeof(uint32_t));
  const int lane_idx = threadIdx.x % 32;
  reinterpret_cast<uint32_t*>(&staged)[lane_idx] =
      reinterpret_cast<const uint32_t*>(&from.map)[lane_idx];
  __syncwarp();
  if (lane_idx == 0) {
    const int rows = from.is_of_keys ? sequence.seqlen_k : sequence.seqlen_q;
    const int64_t begin = from.is_of_keys ? sequence.k_begin : sequence.q_begin;
    const int64_t offset = batch_idx * from.batch_bytes + begin * from.row_bytes;
    ptx::tensor_map_replace_address(staged, from.data + (rows > 0 ? offset : 0));
    ptx::tensor_map_replace_size<1>(staged, rows > 0 ? rows : 1);
  }
  __syncwarp();
  ptx::tensor_map_publish(to, staged);
}

}  // namespace flash_ext::v3
