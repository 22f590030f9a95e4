// Host side of the v3 backward where batch entries have lengths that only the GPU knows: the kernel
// that prepares what the others read of them, and the order of the tiles that it lists.
#pragma once

#include "v3/backward/general_workspace.h"
#include "v3/backward/launch.cuh"
#include "v3/prepare_sequences.cuh"

namespace flash_ext::v3::backward {

// The tiles of a batch entry. Keys behind those it uses have gradients, too, unless it is packed.
struct BackwardTiles {
  GeneralParams general;
  int block_m;

  __device__ __forceinline__ int num_tiles(const Sequence& sequence) const {
    const Sequences& sequences = general.sequences;
    return ceil_div(sequences.is_packed() ? sequence.seqlen_k : sequences.max_seqlen_k,
                    kBackwardBlockN);
  }
  __device__ __forceinline__ int blocks(const SequenceTile& tile) const {
    const int key0 = tile.rank * kBackwardBlockN;
    if (key0 >= tile.seqlen_k) return 0;
    Sequence sequence;
    sequence.seqlen_q = tile.seqlen_q;
    sequence.seqlen_k = tile.seqlen_k;
    const int last_key = min(key0 + kBackwardBlockN, tile.seqlen_k) - 1;
    const BlockRange range = query_blocks(general.band(sequence), key0, last_key, block_m);
    return max(range.end - range.begin, 0);
  }
};

// How many key heads' tiles of such entries are taken together. Their number is not known; sections
// that are not many rounds of the grid would leave thread blocks idle at their ends.
template <typename Config>
Schedule make_listed_schedule(const BackwardParams& params, int64_t max_tiles) {
  constexpr int64_t kMinRounds = 32;
  constexpr int64_t kElementBytes = 2 * sizeof(typename Config::Element) + sizeof(float);
  const AttentionShape& s = params.shape;
  const Sequences& sequences = params.general.sequences;
  const int64_t rows = sequences.is_packed() ? sequences.total_q : s.batch * s.seqlen_q;
  const int64_t head_bytes = kElementBytes * s.head_dim * s.group_size() * rows;
  const int64_t fitting = kSectionBytes / std::max<int64_t>(1, head_bytes);
  const int64_t enough = kMinRounds * multiprocessor_count(s) / std::max<int64_t>(1, max_tiles) + 1;
  const int64_t num_sections = std::max<int64_t>(1, s.heads_kv / std::max(fitting, enough));
  const int64_t section = (s.heads_kv + num_sections - 1) / num_sections;
  const int64_t num_tiles = grid_size(max_tiles * s.heads_kv, s);
  const TileOrder order{static_cast<int>(max_tiles), static_cast<int>(s.heads_kv),
                        static_cast<int>(section)};
  return {order, static_cast<int>(num_tiles), static_cast<int>(s.heads_kv),
          static_cast<int>(std::min<int64_t>(num_tiles, multiprocessor_count(s)))};
}

// Launches the kernel that fills the tables, and says in `own` where they are.
template <typename Config>
void prepare_entries(const BackwardParams& params, GeneralKernelParams* own, cudaStream_t stream) {
  using Element = typename Config::Element;
  constexpr int64_t kBytes = sizeof(Element);
  const AttentionShape& s = params.shape;
  const Sequences& sequences = params.general.sequences;
  const GeneralBackwardWorkspace sections(params);
  const bool is_packed = sequences.is_packed();
  const auto make = [&](const TensorView& view, bool is_of_keys, int box_rows) {
    if (view.data == nullptr) return MapTemplate{};
    const int64_t heads = is_of_keys ? s.heads_kv : s.heads_q;
    const int64_t packed_rows = is_of_keys ? sequences.total_k : sequences.total_q;
    const int64_t rows = is_packed ? packed_rows : (is_of_keys ? s.seqlen_k : s.seqlen_q);
    return make_map_template<Element>(view, heads, rows, s.head_dim, box_rows, is_of_keys);
  };
  const auto unowned = [&](const TensorView& view, bool is_of_keys) {
    return UnownedRows{static_cast<char*>(view.data),
                       view.head_stride * kBytes,
                       view.row_stride * kBytes,
                       static_cast<int>(s.head_dim * kBytes),
                       nullptr,
                       static_cast<int>(is_of_keys ? s.heads_kv : s.heads_q),
                       is_of_keys};
  };
  PrepareParams<BackwardTiles> p{};
  p.sequences = sequences;
  p.batch = static_cast<int>(s.batch);
  p.rule = {params.general, Config::kBlockM};
  p.num_templates = is_packed ? kPackedBackwardMaps : kPaddedBackwardMaps;
  p.templates[0] = make(params.k, true, Config::kBlockN);
  p.templates[1] = make(params.v, true, Config::kBlockN);
  if (is_packed) {
    p.templates[2] = make(params.q, false, Config::kBlockM);
    p.templates[3] = make(params.dout, false, Config::kBlockM);
    p.templates[4] = make(params.dk, true, 64);
    p.templates[5] = make(params.dv, true, 64);
    p.unowned[0] = unowned(params.dq, false);
    p.unowned[1] = unowned(params.dk, true);
    p.unowned[2] = unowned(params.dv, true);
    p.rows = {reinterpret_cast<int*>(params.workspace + sections.row_entries), Config::kBlockM,
              static_cast<int>(sections.rows.num_m_blocks)};
  }
  launch_prepare_sequences(p, sections.entries, params.workspace + sections.sequences,
                           (s.seqlen_q + Config::kBlockM - 1) / Config::kBlockM, s, stream);
  own->entries = {p.maps, p.num_templates, p.tiles, p.num_tiles, p.rows.entries};
}

}  // namespace flash_ext::v3::backward
