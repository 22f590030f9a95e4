// Host side of the v3 backward: tensor maps, the order of the tiles, the launches.
#pragma once

#include <algorithm>

#include "common/launch_kernel.cuh"
#include "launch.h"
#include "sm90/tensor_map.h"
#include "v3/backward/kernel.cuh"
#include "v3/backward/pair_kernel.cuh"
#include "v3/backward/postprocess.cuh"
#include "v3/backward/preprocess.cuh"
#include "v3/backward/workspace.h"

namespace flash_ext {
namespace v3::backward {

// Query rows that see a key, where these are few; else 0.
inline int64_t window_rows(const BackwardParams& params) {
  const GeneralParams& general = params.general;
  const bool is_causal = general.causal != CausalMode::kNone;
  if (general.window_left < 0 || (!is_causal && general.window_right < 0)) return 0;
  const int64_t right = is_causal ? 0 : std::min(general.window_right, params.shape.seqlen_q);
  const int64_t rows = std::min(general.window_left, params.shape.seqlen_q) + right + 1;
  return 2 * rows <= params.shape.seqlen_q ? rows : 0;
}

// With a window a tile's first rows are some that others have had, or all tiles of a head would
// begin with rows that nobody has read yet, and wait for memory together. So the tiles computed at
// the same time reach no further than a window in each head; their rows should fit in L2.
inline int64_t window_section_heads(int64_t window, int64_t num_heads, int64_t row_bytes,
                                    int64_t num_walkers) {
  constexpr int64_t kBytes = kSectionBytes + (8 << 20);
  const int64_t tile_rows = num_walkers * kBackwardBlockN;
  const int64_t wanted = (tile_rows + window - 1) / window;
  const int64_t fitting = (kBytes / row_bytes - tile_rows) / window;
  const int64_t most = std::max<int64_t>(1, std::min(wanted, fitting));
  const int64_t sections = (num_heads + most - 1) / most;
  return (num_heads + sections - 1) / sections;
}

// How many key heads make a section, whose Q, dO and accumulators of dQ should stay in L2. Heads
// one after the other are the best for it: without a mask, where all tiles are equal, and where the
// grid's rounds consist of whole heads, for of two rounds one gives a walker the long tiles and the
// next the short ones. (H200, causal, 512: 2.7% at head_dim 128, 1% at 64.) Deterministic tiles of
// one head wait for each other: there other heads come between them.
template <typename Config>
int64_t section_heads(const BackwardParams& params, int64_t num_n_blocks, int64_t num_walkers) {
  const AttentionShape& s = params.shape;
  constexpr int64_t kElementBytes = 2 * sizeof(typename Config::Element) + sizeof(float);
  const int64_t row_bytes = kElementBytes * s.head_dim * s.group_size();
  const int64_t num_heads = s.batch * s.heads_kv;
  const int64_t window = window_rows(params);
  if (!params.deterministic && window > 0) {
    return window_section_heads(window, num_heads, row_bytes, num_walkers);
  }
  if (!params.mask.is_causal && params.general.window_left < 0) return 1;
  if (!params.deterministic && num_walkers % num_n_blocks == 0) return 1;
  return heads_per_section(num_n_blocks, num_heads, row_bytes * s.seqlen_q, num_walkers);
}

template <typename Config>
Schedule make_schedule(const BackwardParams& params) {
  const AttentionShape& s = params.shape;
  const int64_t num_n_blocks = (s.seqlen_k + Config::kBlockN - 1) / Config::kBlockN;
  const int64_t num_tiles = grid_size(num_n_blocks * s.batch * s.heads_kv, s);
  const int64_t num_walkers =
      params.deterministic
          ? num_tiles  // so that a tile waits only for earlier ones, which have been dispatched
          : std::min<int64_t>(num_tiles, multiprocessor_count(s) / Config::kClusterSize);
  const int64_t section = section_heads<Config>(params, num_n_blocks, num_walkers);
  const TileOrder order{static_cast<int>(num_n_blocks), static_cast<int>(s.batch * s.heads_kv),
                        static_cast<int>(section)};
  return {order, static_cast<int>(num_tiles), static_cast<int>(s.heads_kv),
          static_cast<int>(num_walkers)};
}

template <typename Config>
KernelParams make_kernel_params(const BackwardParams& params) {
  using Element = typename Config::Element;
  const AttentionShape& s = params.shape;
  const BackwardWorkspace sections(params);
  const auto map = [&](const TensorView& view, int64_t heads, int64_t seqlen, int box_rows) {
    return sm90::make_tensor_map<Element>(view, s.batch, heads, seqlen, s.head_dim, box_rows);
  };
  const auto gradient_map = [&](const TensorView& view) {
    return view.data != nullptr ? map(view, s.heads_kv, s.seqlen_k, 64) : CUtensorMap{};
  };
  return KernelParams{map(params.q, s.heads_q, s.seqlen_q, Config::kBlockM),
                      map(params.k, s.heads_kv, s.seqlen_k, Config::kThreadBlockN),
                      map(params.v, s.heads_kv, s.seqlen_k, Config::kThreadBlockN),
                      map(params.dout, s.heads_q, s.seqlen_q, Config::kBlockM),
                      gradient_map(params.dk),
                      gradient_map(params.dv),
                      params.k,
                      params.out,
                      params.dout,
                      params.dq,
                      params.dk,
                      params.dv,
                      static_cast<const float*>(params.lse),
                      static_cast<const float*>(params.dlse),
                      params.mask,
                      SoftmaxScale(params.softmax_scale),
                      static_cast<float>(params.softmax_scale),
                      static_cast<int>(s.head_dim),
                      static_cast<int>(s.heads_q),
                      static_cast<int>(s.heads_kv),
                      static_cast<int>(s.group_size()),
                      static_cast<int>(sections.num_m_blocks),
                      make_schedule<Config>(params),
                      params.workspace + sections.lse_log2,
                      params.workspace + sections.delta,
                      params.workspace + sections.key_mean,
                      params.dq.data != nullptr ? params.workspace + sections.dq_accum : nullptr,
                      params.dq.data != nullptr && !Config::kCentresKeys
                          ? params.workspace + sections.dq_row_sum
                          : nullptr,
                      params.dq.data != nullptr && params.deterministic
                          ? reinterpret_cast<int*>(params.workspace + sections.dq_turns)
                          : nullptr};
}

// `key_heads`, `row_blocks`: of all batch entries. `overlap`: of the first one, with what is
// before.
template <typename Config, typename Params>
void launch_kernels(const BackwardParams& params, const Params& p, void (*main_kernel)(Params),
                    cudaStream_t stream, int64_t key_heads, int64_t row_blocks, Overlap overlap) {
  using Element = typename Config::Element;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kBlockM = Config::kBlockM;
  static_assert(kBlockM == backward_block_m(kHeadDim));
  const AttentionShape& s = params.shape;
  launch_kernel(preprocess_kernel<Element, kHeadDim, kBlockM, Params>, key_heads + row_blocks,
                kPreprocessThreads, 0, stream, "the v3 backward's preprocess kernel", p, s,
                overlap);
  launch_kernel(main_kernel, int64_t{p.schedule.num_walkers} * Config::kClusterSize,
                Config::kNumThreads, sizeof(typename Config::SharedStorage), stream,
                "the v3 backward's main kernel", p, s, Overlap::kPrevious);
  if (params.dq.data == nullptr) return;
  launch_kernel(postprocess_kernel<Element, kHeadDim, kBlockM, Params>,
                row_blocks * (kBlockM / 64) * (kHeadDim / 64), kPostprocessThreads, 0, stream,
                "the v3 backward's postprocess kernel", p, s, Overlap::kPrevious);
}

template <typename Config>
void launch_plain_kernels(const BackwardParams& params, void (*main_kernel)(KernelParams),
                          cudaStream_t stream) {
  const AttentionShape& s = params.shape;
  const KernelParams p = make_kernel_params<Config>(params);
  launch_kernels<Config>(params, p, main_kernel, stream, s.batch * s.heads_kv,
                         s.batch * s.heads_q * p.num_m_blocks, Overlap::kNone);
}

}  // namespace v3::backward

// Nothing here is empty: where there are no queries or no keys, the gradients are zeros, and the
// caller's.
template <typename Element, int kHeadDim>
void launch_backward_v3(const BackwardParams& params, CudaStream stream) {
  using namespace v3::backward;
  if constexpr (kHeadDim == 256) {
    using Main = PairConfig<Element>;
    launch_plain_kernels<Main>(params, pair_kernel<Main>, stream);
  } else {
    if (params.deterministic && params.dq.data != nullptr) {
      using Main = Config<Element, kHeadDim, /*kIsDeterministic=*/true>;
      launch_plain_kernels<Main>(params, backward_kernel<Main>, stream);
    } else {
      using Main = Config<Element, kHeadDim, /*kIsDeterministic=*/false>;
      launch_plain_kernels<Main>(params, backward_kernel<Main>, stream);
    }
  }
}

}  // namespace flash_ext
