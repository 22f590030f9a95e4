// Host side of the v3 forward: tensor maps, the order of the tiles, the launch.
#pragma once

#include <algorithm>

#include "common/launch_kernel.cuh"
#include "common/merge_shares.cuh"
#include "launch.h"
#include "sm90/tensor_map.h"
#include "v3/forward/kernel.cuh"
#include "v3/forward/splits.h"

namespace flash_ext {
namespace v3::forward {

// How many heads make a section, whose K and V should stay in L2. Where no tile has more keys than
// others, without a mask or with a window, heads one after the other are the best for it.
template <typename Config>
int64_t section_heads(const AttentionShape& s, bool lengths_fall, int64_t num_m_blocks,
                      int64_t num_blocks) {
  if (!lengths_fall) return 1;
  // A head's tiles side by side read its K and V together, and an even number of them pairs off
  // over two rounds. H200, 512 keys: +3% at d=128, +6% at d=256.
  if (num_m_blocks % 2 == 0 && 2 * num_blocks % num_m_blocks == 0) return 1;
  const int64_t head_bytes =
      2 * s.seqlen_k * s.head_dim * int64_t{sizeof(typename Config::Element)} / s.group_size();
  return heads_per_section(num_m_blocks, s.batch * s.heads_q, head_bytes, num_blocks);
}

template <typename Config>
Schedule make_schedule(const AttentionShape& s, bool lengths_fall, int64_t splits = 1) {
  const int64_t num_m_blocks = (s.seqlen_q + Config::kBlockM - 1) / Config::kBlockM;
  const int64_t num_tiles = grid_size(splits * num_m_blocks * s.batch * s.heads_q, s);
  const int64_t num_blocks = std::min<int64_t>(num_tiles, multiprocessor_count(s));
  const int64_t section = section_heads<Config>(s, lengths_fall, num_m_blocks, num_blocks);
  const TileOrder order{static_cast<int>(num_m_blocks), static_cast<int>(s.batch * s.heads_q),
                        static_cast<int>(section)};
  return {order, static_cast<int>(splits), static_cast<int>(num_tiles), static_cast<int>(s.heads_q),
          static_cast<int>(num_blocks)};
}

template <typename Config>
Schedule make_schedule(const ForwardParams& params) {
  const AttentionShape& s = params.shape;
  return make_schedule<Config>(s, params.mask.is_causal,
                               forward_splits(s, multiprocessor_count(s)));
}

template <typename Config>
KernelParams make_kernel_params(const ForwardParams& params, const Mask& mask,
                                const SoftmaxScale& scale, const Schedule& schedule) {
  using Element = typename Config::Element;
  const AttentionShape& s = params.shape;
  const auto map = [&](const TensorView& view, int64_t heads, int64_t seqlen, int box_rows) {
    return sm90::make_tensor_map<Element>(view, s.batch, heads, seqlen, s.head_dim, box_rows);
  };
  return {
      map(params.q, s.heads_q, s.seqlen_q, kRowsPerWarpgroup),
      {map(params.k, s.heads_kv, s.seqlen_k, Config::kBlockN),
       map(params.v, s.heads_kv, s.seqlen_k, Config::kBlockN)},
      map(params.out, s.heads_q, s.seqlen_q, kRowsPerWarpgroup),
      params.out,
      static_cast<int>(s.head_dim),
      static_cast<float*>(params.lse),
      Config::kSplitsKeys ? place_shares<Config::kHeadDim>(params, schedule.num_splits) : Shares{},
      mask,
      scale,
      static_cast<int>(s.group_size()),
      schedule};
}

template <typename Config>
void launch_forward(const ForwardParams& params, cudaStream_t stream) {
  using Element = typename Config::Element;
  const AttentionShape& s = params.shape;
  const Schedule schedule = make_schedule<Config>(params);
  const KernelParams p =
      make_kernel_params<Config>(params, params.mask, SoftmaxScale(params.softmax_scale), schedule);
  launch_kernel(forward_kernel<Config>, schedule.num_thread_blocks, Config::kNumThreads,
                sizeof(typename Config::SharedStorage), stream, "the v3 forward kernel", p, s);
  if constexpr (Config::kSplitsKeys) {
    launch_merge<Element, Config::kHeadDim>(params, p.shares, schedule.num_splits, stream);
  }
}

// d=64: whether tiles of 256 rows leave fewer rows of a sequence empty than such of 192, and few
// keys make up for their smaller blocks. H200, 16k tokens: 1.30 times as fast for 256 tokens, 1.15
// for 512, 1.12 for 1k (causal 1.30, 1.09, 1.03); 0.85 for 384, 0.98 for 768, 0.95 for 8k. A few
// tiles, on a GPU that is idle otherwise, take 1.25 times as long.
inline bool is_short(const AttentionShape& s) {
  const auto tiles = [&](int64_t rows) { return (s.seqlen_q + rows - 1) / rows; };
  return s.seqlen_k <= 1024 && 256 * tiles(256) < 192 * tiles(192) && s.heads_q * tiles(256) >= 24;
}

// Calls `f` with the configuration of the kernel that computes this. One sequence decides, not the
// batch, on which no row's bits may depend.
template <typename Element, int kHeadDim, typename Function>
auto with_config(const ForwardParams& params, Function&& f) {
  const AttentionShape& s = params.shape;
  using Split = Config<Element, kHeadDim, Variant::kSplit>;
  static_assert(Split::kBlockM == forward_block_m(kHeadDim));
  if (forward_splits(s, multiprocessor_count(s)) > 1) return f(Split());
  if constexpr (kHeadDim == 64) {
    if (is_short(s)) {
      if (params.mask.is_causal) return f(Config<Element, kHeadDim, Variant::kShortCausal>());
      return f(Config<Element, kHeadDim, Variant::kShort>());
    }
    // H200: +4% at 1.25k keys, 0 at 2k and 4k, -4% at 16k; at d=128 -1% to 1k.
    if (params.mask.is_causal && s.seqlen_k <= 2048) {
      return f(Config<Element, kHeadDim, Variant::kHalves>());
    }
  }
  return f(Config<Element, kHeadDim, Variant::kPlain>());
}

}  // namespace v3::forward

template <typename Element, int kHeadDim>
void launch_forward_v3(const ForwardParams& params, CudaStream stream) {
  v3::forward::with_config<Element, kHeadDim>(
      params, [&](auto config) { v3::forward::launch_forward<decltype(config)>(params, stream); });
}

template <typename Element, int kHeadDim>
KernelPlan plan_forward_v3(const ForwardParams& params) {
  return v3::forward::with_config<Element, kHeadDim>(params, [&](auto config) {
    using Config = decltype(config);
    return KernelPlan{Config::kBlockM, Config::kBlockN, Config::kNumThreads / 32,
                      sizeof(typename Config::SharedStorage),
                      v3::forward::make_schedule<Config>(params).num_thread_blocks};
  });
}

}  // namespace flash_ext
