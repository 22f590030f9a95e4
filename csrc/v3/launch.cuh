// Host side of the v3 forward: tensor maps, the order of the tiles, the launch.
#pragma once

#include <algorithm>
#include <numeric>

#include "common/launch_kernel.cuh"
#include "launch.h"
#include "sm90/tensor_map.h"
#include "v3/kernel.cuh"

namespace flash_ext {
namespace v3 {

// K and V of a section should stay in L2 (50 MB) beside what else passes through.
inline constexpr int64_t kSectionBytes = 32 << 20;

// How many heads make a section. Under a causal mask a section ends where two rounds of the grid
// end, or the next one's long tiles would fall to some thread blocks alone. Without a mask all
// tiles are equal, and heads one after the other are the best for L2.
template <typename Config>
int64_t section_heads(const ForwardParams& params, int64_t num_m_blocks, int64_t num_blocks) {
  const AttentionShape& s = params.shape;
  if (!params.mask.is_causal) return 1;
  // A head's tiles side by side read its K and V together, and an even number of them pairs off
  // over two rounds. H200, 512 keys: +3% at d=128, +6% at d=256.
  if (num_m_blocks % 2 == 0 && 2 * num_blocks % num_m_blocks == 0) return 1;
  const int64_t unit = 2 * num_blocks / std::gcd(2 * num_blocks, num_m_blocks);
  const int64_t head_bytes =
      2 * s.seqlen_k * s.head_dim * int64_t{sizeof(typename Config::Element)} / s.group_size();
  const int64_t units = std::max<int64_t>(1, kSectionBytes / (unit * head_bytes + 1));
  return std::min(units * unit, s.batch * s.heads_q);
}

template <typename Config>
Schedule make_schedule(const ForwardParams& params) {
  const AttentionShape& s = params.shape;
  const int64_t num_m_blocks = (s.seqlen_q + Config::kBlockM - 1) / Config::kBlockM;
  const int64_t num_tiles = grid_size(num_m_blocks * s.batch * s.heads_q, s);
  const int64_t num_blocks = std::min<int64_t>(num_tiles, multiprocessor_count(s));
  return {static_cast<int>(num_m_blocks), static_cast<int>(num_tiles), static_cast<int>(s.heads_q),
          static_cast<int>(section_heads<Config>(params, num_m_blocks, num_blocks)),
          static_cast<int>(num_blocks)};
}

}  // namespace v3

template <typename Element, int kHeadDim>
void launch_forward_v3(const ForwardParams& params, CudaStream stream) {
  using Config = v3::Config<Element, kHeadDim>;
  const AttentionShape& s = params.shape;
  const auto map = [&](const TensorView& view, int64_t heads, int64_t seqlen, int box_rows) {
    return sm90::make_tensor_map<Element>(view, s.batch, heads, seqlen, s.head_dim, box_rows);
  };
  const v3::KernelParams p{map(params.q, s.heads_q, s.seqlen_q, v3::kRowsPerWarpgroup),
                           map(params.k, s.heads_kv, s.seqlen_k, Config::kBlockN),
                           map(params.v, s.heads_kv, s.seqlen_k, Config::kBlockN),
                           map(params.out, s.heads_q, s.seqlen_q, 16),
                           static_cast<float*>(params.lse),
                           params.mask,
                           SoftmaxScale(params.softmax_scale),
                           static_cast<int>(s.group_size()),
                           v3::make_schedule<Config>(params)};
  launch_kernel(v3::forward_kernel<Config>, p.schedule.num_thread_blocks, Config::kNumThreads,
                sizeof(typename Config::SharedStorage), stream, "the v3 forward kernel", p, s);
}

template <typename Element, int kHeadDim>
KernelPlan plan_forward_v3(const ForwardParams& params) {
  using Config = v3::Config<Element, kHeadDim>;
  return KernelPlan{Config::kBlockM, Config::kBlockN, Config::kNumThreads / 32,
                    sizeof(typename Config::SharedStorage),
                    v3::make_schedule<Config>(params).num_thread_blocks};
}

}  // namespace flash_ext
