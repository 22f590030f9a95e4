// Host side of the v2 forward: picks a configuration, fills the kernel's parameters, launches.
#pragma once

#include "common/launch_kernel.cuh"
#include "launch.h"
#include "v2/kernel.cuh"

namespace flash_ext {
namespace v2 {

template <typename Config>
int num_m_blocks(const AttentionShape& shape) {
  return static_cast<int>((shape.seqlen_q + Config::kBlockM - 1) / Config::kBlockM);
}

inline bool rows_are_aligned(const ForwardParams& params, int element_bytes) {
  return params.q.aligned16 && params.k.aligned16 && params.v.aligned16 && params.out.aligned16 &&
         params.shape.head_dim * element_bytes % 16 == 0;
}

// Whether this GPU has shared memory for it: of a multiprocessor twice where thread blocks are
// many.
template <typename Config>
bool fits(const AttentionShape& shape, Grid grid) {
  constexpr int kReserved = 1024;  // by the system, for each thread block
  constexpr int kBytes = static_cast<int>(sizeof(typename Config::SharedStorage));
  if (grid == Grid::kSmall) return kBytes <= shared_memory_limit(shape);
  return 2 * (kBytes + kReserved) <=
         device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, shape);
}

template <typename Element, int kHeadDim, Grid kGrid, typename Visit>
auto with_rows(const ForwardParams& params, Visit visit) {
  if constexpr (sizeof(Element) == 2) {
    using Aligned = Config<Element, kHeadDim, kGrid, Rows::kAligned>;
    if (rows_are_aligned(params, sizeof(Element)) && fits<Aligned>(params.shape, kGrid)) {
      return visit(Aligned{});
    }
  }
  return visit(Config<Element, kHeadDim, kGrid>{});
}

template <typename Element, int kHeadDim, Grid kGrid, typename Visit>
auto with_keys(const ForwardParams& params, Visit visit) {
  const AttentionShape& s = params.shape;
  if (forward_splits(s, sizeof(Element), multiprocessor_count(s)) > 1) {
    return visit(Config<Element, kHeadDim, kGrid, Rows::kAny, Keys::kShare>{});
  }
  return with_rows<Element, kHeadDim, kGrid>(params, visit);
}

// Calls `visit` with the configuration for sequences of this length and number of heads.
template <typename Element, int kHeadDim, typename Visit>
auto with_config(const ForwardParams& params, Visit visit) {
  using Full = Config<Element, kHeadDim, Grid::kFull>;
  using Small = Config<Element, kHeadDim, Grid::kSmall>;
  if constexpr (Full::kNumWarps != Small::kNumWarps) {
    if (forward_grid(params.shape, sizeof(Element)) == Grid::kSmall) {
      return with_keys<Element, kHeadDim, Grid::kSmall>(params, visit);
    }
  }
  return with_keys<Element, kHeadDim, Grid::kFull>(params, visit);
}

}  // namespace v2

template <typename Element, int kHeadDim>
void launch_forward_v2(const ForwardParams& params, CudaStream stream) {
  v2::with_config<Element, kHeadDim>(params, [&](auto config) {
    using Config = decltype(config);
    const AttentionShape& s = params.shape;
    const int num_m_blocks = v2::num_m_blocks<Config>(s);
    const int64_t num_tiles = s.batch * s.heads_q * num_m_blocks;
    const int64_t splits =
        Config::kSplitsKeys ? v2::forward_splits(s, sizeof(Element), multiprocessor_count(s)) : 1;
    const int64_t kv_bytes = 2 * sizeof(Element) * s.seqlen_k * s.head_dim;
    const v2::KernelParams p{
        params.q,
        params.k,
        params.v,
        params.out,
        static_cast<float*>(params.lse),
        params.mask,
        SoftmaxScale(params.softmax_scale),
        static_cast<int>(s.head_dim),
        Divisor(s.heads_q),
        Divisor(s.group_size()),
        tile_order(s, params.mask.is_causal, num_m_blocks, s.batch * s.heads_q, kv_bytes),
        Config::kSplitsKeys ? place_shares<kHeadDim>(params, splits) : Shares{},
        static_cast<int>(splits),
        Divisor(num_tiles)};
    launch_kernel(v2::forward_kernel<Config>, splits * num_tiles, Config::kNumThreads,
                  sizeof(typename Config::SharedStorage), stream, "the v2 forward kernel", p, s);
    if constexpr (Config::kSplitsKeys) {
      launch_merge<Element, kHeadDim>(params, p.shares, splits, stream);
    }
  });
}

template <typename Element, int kHeadDim>
KernelPlan plan_forward_v2(const ForwardParams& params) {
  return v2::with_config<Element, kHeadDim>(params, [&](auto config) {
    using Config = decltype(config);
    const AttentionShape& s = params.shape;
    const int64_t splits =
        Config::kSplitsKeys ? v2::forward_splits(s, sizeof(Element), multiprocessor_count(s)) : 1;
    return KernelPlan{Config::kBlockM, Config::kBlockN, Config::kNumWarps,
                      sizeof(typename Config::SharedStorage),
                      splits * s.batch * s.heads_q * v2::num_m_blocks<Config>(s)};
  });
}

}  // namespace flash_ext
