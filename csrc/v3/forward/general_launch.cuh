// Host side of the v3 forward beyond plain attention.
#pragma once

#include "v3/forward/general_workspace.h"
#include "v3/forward/launch.cuh"
#include "v3/prepare_sequences.cuh"

namespace flash_ext {
namespace v3::forward {

// The tiles of a batch entry whose lengths the GPU reads.
struct ForwardTiles {
  GeneralParams general;
  int block_m;
  int block_n;

  __device__ __forceinline__ int num_tiles(const Sequence& sequence) const {
    return ceil_div(sequence.seqlen_q, block_m);
  }
  __device__ __forceinline__ int blocks(const SequenceTile& tile) const {
    Sequence sequence;
    sequence.seqlen_q = tile.seqlen_q;
    sequence.seqlen_k = tile.seqlen_k;
    const int row0 = first_row(tile.seqlen_q, tile.rank, block_m);
    const BlockRange range = band_blocks(general.band(sequence), row0, block_m, block_n);
    return range.end - range.begin;
  }
};

// How many heads' tiles of such entries are taken together. Their number is not known; sections
// that are not many rounds of the grid would leave thread blocks idle at their ends.
template <typename Config>
int64_t listed_section_heads(const ForwardParams& params, int64_t max_tiles) {
  constexpr int64_t kMinRounds = 16;
  const AttentionShape& s = params.shape;
  const Sequences& sequences = params.general.sequences;
  const int64_t keys = sequences.is_packed() ? sequences.total_k : s.batch * s.seqlen_k;
  const int64_t head_bytes =
      2 * keys * s.head_dim * int64_t{sizeof(typename Config::Element)} / s.group_size();
  const int64_t fitting = kSectionBytes / std::max<int64_t>(1, head_bytes);
  const int64_t enough = kMinRounds * multiprocessor_count(s) / std::max<int64_t>(1, max_tiles) + 1;
  const int64_t num_sections = std::max<int64_t>(1, s.heads_q / std::max(fitting, enough));
  return (s.heads_q + num_sections - 1) / num_sections;
}

// `order` counts the heads of one batch entry, for the list holds the entries.
template <typename Config>
Schedule make_listed_schedule(const ForwardParams& params, int64_t max_tiles) {
  const AttentionShape& s = params.shape;
  const int64_t num_tiles = grid_size(max_tiles * s.heads_q, s);
  const TileOrder order{static_cast<int>(max_tiles), static_cast<int>(s.heads_q),
                        static_cast<int>(listed_section_heads<Config>(params, max_tiles))};
  return {order, 1, static_cast<int>(num_tiles), static_cast<int>(s.heads_q),
          static_cast<int>(std::min<int64_t>(num_tiles, multiprocessor_count(s)))};
}

// Tiles get shorter towards the first row under a causal mask, unless a window makes them equal.
template <typename Config>
Schedule make_general_schedule(const ForwardParams& params) {
  const GeneralParams& general = params.general;
  if (has_own_lengths(general.sequences)) {
    return make_listed_schedule<Config>(params, general_workspace(params).max_tiles);
  }
  const bool ends_at_diagonal = general.causal != CausalMode::kNone || general.window_right >= 0;
  const bool has_left_edge =
      general.window_left >= 0 && general.window_left < params.shape.seqlen_k;
  Schedule schedule = make_schedule<Config>(params.shape, ends_at_diagonal && !has_left_edge);
  const ScoreTensor& mask = general.mask;
  if (mask.data != nullptr && mask.row_stride != 0 && mask.head_stride == 0) {
    // All heads of a batch entry side by side, which read the same mask.
    schedule.order.heads_per_section =
        std::max(schedule.order.heads_per_section, static_cast<int>(params.shape.heads_q));
  }
  return schedule;
}

inline bool adds_mask(const GeneralParams& general) {
  return general.mask.data != nullptr && general.mask_type != MaskType::kBool;
}

// Where S is accumulated on the mask, scale = of_q * of_scores, and the mask is divided by the
// latter, which is positive: neither may overflow, and of_q times Q is exact.
template <typename Element>
struct ScaleParts {
  double of_q = 1.0;
  double of_scores;

  explicit ScaleParts(const ForwardParams& params) : of_scores(std::fabs(params.softmax_scale)) {
    constexpr double kLeast = 0x1p-64;
    if (!(of_scores >= kLeast)) {  // such scores are nothing beside a mask
      of_q = 0.0;
      of_scores = 1.0;
    } else if (std::is_same_v<Element, __nv_bfloat16> && of_scores < 1.0) {
      of_q = std::exp2(std::floor(std::log2(of_scores)));
      of_scores /= of_q;
    }
    if (params.softmax_scale < 0) of_q = -of_q;
  }
};

// Scores as the exponent takes them: q . k times |scale|; what the softcap leaves, in units of
// log2; or what a float mask leaves, in natural units: masks may be as large as numbers get.
template <typename Config>
SoftmaxScale score_scale(const ForwardParams& params) {
  SoftmaxScale scale(params.softmax_scale);
  if constexpr (Config::AttnMask::kIsUnderScores) {
    scale.log2 =
        static_cast<float>(ScaleParts<typename Config::Element>(params).of_scores * kLog2e);
  } else if (adds_mask(params.general)) {
    scale.log2 = static_cast<float>(kLog2e);
  } else if (params.general.softcap > 0.0) {
    scale.log2 = 1.f;
  }
  // Not 0 where the scale is: ALiBi is then divided by scale.log2, too.
  scale.natural = static_cast<float>(scale.log2 / kLog2e);
  return scale;
}

// Of the mask's own shape: what it is broadcast over has stride 0, but for rows. There a warp reads
// the only one.
template <typename Config>
KernelMask make_kernel_mask(const ForwardParams& params) {
  const ScoreTensor& mask = params.general.mask;
  const AttentionShape& s = params.shape;
  KernelMask kernel_mask{};
  kernel_mask.has_rows = mask.row_stride != 0;
  kernel_mask.score_factor =
      params.general.softcap > 0.0 ? 1.f : static_cast<float>(std::fabs(params.softmax_scale));
  const ScaleParts<typename Config::Element> parts(params);
  kernel_mask.mask_factor = static_cast<float>(1.0 / parts.of_scores);
  kernel_mask.q_factor = static_cast<float>(parts.of_q);
  if constexpr (Config::kAddsMask || Config::kHidesByMask) {
    const TensorView view{mask.data, mask.batch_stride, mask.head_stride, mask.row_stride};
    using MaskElement = std::conditional_t<Config::kAddsMask, typename Config::Element, bool>;
    kernel_mask.map = sm90::make_tensor_map<MaskElement>(
        view, s.batch, s.heads_q, kernel_mask.has_rows ? s.seqlen_q : 1, s.seqlen_k,
        kernel_mask.has_rows ? kRowsPerWarp : 1);
  }
  return kernel_mask;
}

// See num_long_ranks(): by the blocks that a tile's rows see.
template <typename Config>
int long_ranks(const GeneralParams& general, const BandMask& band, const Schedule& schedule) {
  const int ranks = schedule.order.tiles_per_head;
  if (general.window_left < 0 || has_own_lengths(general.sequences)) return ranks;
  return num_long_ranks(ranks, [&](int rank) {
    const BlockRange blocks = band_blocks(band, first_row(band.seqlen_q, rank, Config::kBlockM),
                                          Config::kBlockM, Config::kBlockN);
    return blocks.end - blocks.begin;
  });
}

template <typename Config>
GeneralKernelParams make_general_kernel_params(const ForwardParams& params,
                                               const Schedule& schedule) {
  const AttentionShape& s = params.shape;
  const GeneralParams& general = params.general;
  const SoftmaxScale scale = score_scale<Config>(params);
  const BandMask band = BandMask::make(general.causal, general.window_left, general.window_right,
                                       static_cast<int>(s.seqlen_q), static_cast<int>(s.seqlen_k));
  const Mask lengths = Mask::make(CausalMode::kNone, s.seqlen_q, s.seqlen_k);
  return {make_kernel_params<Config>(params, lengths, scale, schedule),
          band,
          general.alibi_slopes,
          general.sinks,
          static_cast<float>(kLog2e / scale.log2),
          Softcap(general.softcap, std::fabs(params.softmax_scale),
                  adds_mask(general) ? 1.0 : kLog2e, general.alibi_slopes.data != nullptr),
          KernelDropout(general.dropout),
          make_kernel_mask<Config>(params),
          general.sequences,
          EntryTables{},
          general.block_mask,
          long_ranks<Config>(general, band, schedule),
          general.causal == CausalMode::kTopLeft};
}

// Launches the kernel that fills the tables, and returns them.
template <typename Config>
EntryTables prepare_entries(const ForwardParams& params, cudaStream_t stream) {
  using Element = typename Config::Element;
  const AttentionShape& s = params.shape;
  const Sequences& sequences = params.general.sequences;
  const bool is_packed = sequences.is_packed();
  const auto make = [&](const TensorView& view, int64_t heads, int box_rows, bool is_of_keys) {
    const int64_t packed_rows = is_of_keys ? sequences.total_k : sequences.total_q;
    const int64_t rows = is_packed ? packed_rows : (is_of_keys ? s.seqlen_k : s.seqlen_q);
    return make_map_template<Element>(view, heads, rows, s.head_dim, box_rows, is_of_keys);
  };
  PrepareParams<ForwardTiles> p{};
  p.sequences = sequences;
  p.batch = static_cast<int>(s.batch);
  p.rule = {params.general, Config::kBlockM, Config::kBlockN};
  p.num_templates = is_packed ? kPackedMaps : kPaddedMaps;
  p.templates[0] = make(params.k, s.heads_kv, Config::kBlockN, true);
  p.templates[1] = make(params.v, s.heads_kv, Config::kBlockN, true);
  if (is_packed) {
    constexpr int64_t kBytes = sizeof(Element);
    p.templates[2] = make(params.q, s.heads_q, kRowsPerWarpgroup, false);
    p.templates[3] = make(params.out, s.heads_q, kRowsPerWarpgroup, false);
    p.unowned[0] = {static_cast<char*>(params.out.data), params.out.head_stride * kBytes,
                    params.out.row_stride * kBytes,      static_cast<int>(s.head_dim * kBytes),
                    static_cast<float*>(params.lse),     static_cast<int>(s.heads_q)};
  }
  launch_prepare_sequences(p, general_workspace(params), params.workspace,
                           (s.seqlen_k + Config::kBlockN - 1) / Config::kBlockN, s, stream);
  return {p.maps, p.num_templates, p.tiles, p.num_tiles};
}

// Whether a query sees few blocks: those of a window of up to 4,096 keys. (H200: of the kernels'
// two shapes the narrow one is 1.07 times as fast at d=64 and 1,024 keys, 1.04 at 2,048, 1.01 at
// 4,096 and 1.00 at 8,192; at d=128 1.05, 1.02, 1.02 and 1.00.) Or, at d=64, where the narrow shape
// is the short one, those of a short sequence.
template <int kHeadDim>
bool is_narrow(const ForwardParams& params) {
  const GeneralParams& general = params.general;
  if (kHeadDim == 64 && !has_own_lengths(general.sequences) && is_short(params.shape)) return true;
  constexpr int64_t kNarrow = 4096;
  const bool is_causal = general.causal != CausalMode::kNone;
  if (general.window_left < 0 || (!is_causal && general.window_right < 0)) return false;
  return general.window_left + 1 + (is_causal ? 0 : general.window_right) <= kNarrow;
}

// Calls `f` with the configuration of the kernel that computes this.
template <typename Element, int kHeadDim, typename Function>
auto with_general_config(const ForwardParams& params, Function&& f) {
  const bool drops_out = params.general.dropout.rng_state != nullptr;
  if (adds_mask(params.general)) {
    if (drops_out) return f(Config<Element, kHeadDim, Variant::kFloatMaskDropout>());
    if (params.general.softcap > 0.0) {
      return f(Config<Element, kHeadDim, Variant::kCappedFloatMask>());
    }
    return f(Config<Element, kHeadDim, Variant::kFloatMask>());
  }
  if (params.general.mask.data != nullptr) {
    if (drops_out) return f(Config<Element, kHeadDim, Variant::kBoolMaskDropout>());
    return f(Config<Element, kHeadDim, Variant::kBoolMask>());
  }
  if (drops_out) return f(Config<Element, kHeadDim, Variant::kDropout>());
  const bool caps = params.general.softcap > 0.0;
  if (params.general.block_mask.data != nullptr) {
    if (v3::has_uniform_blocks(params)) {
      return f(Config<Element, kHeadDim, Variant::kUniformSparse>());
    }
    if (caps || params.general.alibi_slopes.data != nullptr) {
      return f(Config<Element, kHeadDim, Variant::kBiasedSparse>());
    }
    return f(Config<Element, kHeadDim, Variant::kSparse>());
  }
  if (caps) return f(Config<Element, kHeadDim, Variant::kSoftcap>());
  if (params.general.alibi_slopes.data != nullptr) {
    return f(Config<Element, kHeadDim, Variant::kAlibi>());
  }
  if (is_narrow<kHeadDim>(params)) return f(Config<Element, kHeadDim, Variant::kNarrow>());
  return f(Config<Element, kHeadDim, Variant::kGeneral>());
}

}  // namespace v3::forward

template <typename Element, int kHeadDim>
void launch_general_forward_v3(const ForwardParams& params, CudaStream stream) {
  using namespace v3::forward;
  with_general_config<Element, kHeadDim>(params, [&](auto config) {
    using Config = decltype(config);
    static_assert(Config::kBlockM >= v3::kLeastBlockM);
    const char* const name = "the v3 general forward kernel";
    const Schedule schedule = make_general_schedule<Config>(params);
    GeneralKernelParams p = make_general_kernel_params<Config>(params, schedule);
    Overlap overlap = Overlap::kNone;
    if (v3::has_own_lengths(params.general.sequences)) {
      p.entries = prepare_entries<Config>(params, stream);
      overlap = overlap_of(forward_kernel<Config>, name, params.shape);
    }
    if constexpr (Config::kIsUniform) {
      p.num_taken = reinterpret_cast<int*>(params.workspace);
      check_cuda(cudaMemsetAsync(p.num_taken, 0, sizeof(int), stream), name, params.shape);
    }
    launch_kernel(forward_kernel<Config>, schedule.num_thread_blocks, Config::kNumThreads,
                  sizeof(typename Config::SharedStorage), stream, name, p, params.shape, overlap);
  });
}

template <typename Element, int kHeadDim>
KernelPlan plan_general_forward_v3(const ForwardParams& params) {
  using namespace v3::forward;
  return with_general_config<Element, kHeadDim>(params, [&](auto config) {
    using Config = decltype(config);
    return KernelPlan{Config::kBlockM, Config::kBlockN, Config::kNumThreads / 32,
                      sizeof(typename Config::SharedStorage),
                      make_general_schedule<Config>(params).num_thread_blocks};
  });
}

}  // namespace flash_ext
