// v2 forward for general attention: kernel.cuh's algorithm with the features of common/general.h.
// A thread block owns a tile of the query rows of one sequence and walks over the K/V blocks that
// its band and block_mask leave; others are neither loaded nor computed.
#pragma once

#include "common/score_rule.cuh"
#include "v2/general_config.cuh"
#include "v2/kernel.cuh"

namespace flash_ext::v2 {

struct GeneralKernelParams {
  TensorView q, k, v, out;
  float* lse;
  GeneralParams general;
  ScoreScale scale;
  int head_dim;
  Divisor heads_q;
  Divisor group_size;
  TileOrder order;
};

template <typename Config>
struct GeneralScores {
  using Rule = ScoreRule<typename Config::Element>;

  const Rule& rule;
  int m0;  // the query tile's first row
  int n0;  // the block's first key

  template <int kM, int kN>
  __device__ __forceinline__ void apply(float (&acc_s)[kM][kN][4], int row, int col,
                                        int lane_idx) const {
    const int last_row = min(m0 + Config::kBlockM, rule.band().seqlen_q) - 1;
    rule.apply(acc_s, m0 + row + lane_idx / 4, n0 + col + lane_idx % 4 * 2,
               block_is_full(rule.band(), m0, last_row, n0, Config::kBlockN));
  }
  __device__ __forceinline__ float scale_log2() const { return rule.exponent().log2; }
  template <int kM, int kN>
  __device__ __forceinline__ void drop(float (&acc_p)[kM][kN][4], int row, int col,
                                       int lane_idx) const {
    if (!rule.has_dropout()) return;
    rule.template kept<kM, kN>(m0 + row + lane_idx / 4, n0 + col + lane_idx % 4 * 2)
        .drop(acc_p, rule.dropout().weight_factor());
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kNumThreads)
    general_forward_kernel(const __grid_constant__ GeneralKernelParams p) {
  using Element = typename Config::Element;
  constexpr int kBlockM = Config::kBlockM;
  constexpr int kBlockN = Config::kBlockN;
  constexpr int kNumThreads = Config::kNumThreads;
  constexpr int kStages = Config::kStages;
  extern __shared__ __align__(128) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(smem_bytes);

  const int thread_idx = threadIdx.x;
  const TileOrder::Place place = p.order.place(static_cast<int>(blockIdx.x));
  const int m0 = (p.order.tiles_per_head() - 1 - place.rank) * kBlockM;
  const int batch_idx = place.head / p.heads_q;
  const int head_idx = place.head % p.heads_q;
  const Sequence sequence = p.general.sequences[batch_idx];
  if (m0 >= sequence.seqlen_q) return;  // packed, and shorter than the longest
  const ScoreRule<Element> rule(p.general, p.scale, p.general.band(sequence), batch_idx, head_idx,
                                p.heads_q);

  const auto q_gmem =
      sm80::gmem_rows<Element>(p.q, batch_idx, head_idx, p.head_dim).from(sequence.q_begin);
  const auto rows_of = [&](const TensorView& view) {
    return sm80::gmem_rows<Element>(view, batch_idx, head_idx / p.group_size, p.head_dim)
        .from(sequence.k_begin);
  };
  const bool copies_are_async = p.q.aligned16 && p.k.aligned16 && p.v.aligned16;
  // `it` counts the blocks that are visited.
  const auto load_k = [&](int it, int n_block) {
    sm80::load_tile<kNumThreads>(smem.k[it % kStages], rows_of(p.k), n_block * kBlockN,
                                 sequence.seqlen_k, thread_idx);
    sm80::arrive_when_copied(smem.k_full[it % kStages], copies_are_async);
  };
  const auto load_v = [&](int it, int n_block) {
    sm80::load_tile<kNumThreads>(smem.v[it % kStages], rows_of(p.v), n_block * kBlockN,
                                 sequence.seqlen_k, thread_idx);
    sm80::arrive_when_copied(smem.v_full[it % kStages], copies_are_async);
  };
  const BlockRange blocks = key_blocks(rule.band(), m0, kBlockM, kBlockN);
  const auto next_from = [&](int n_block) {
    return next_key_block(p.general.block_mask, batch_idx, head_idx, m0, n_block, kBlockN, blocks);
  };

  WarpTile<Config> warp(thread_idx);
  int n_block = next_from(blocks.begin);
  if (n_block < blocks.end) {
    if (thread_idx == 0) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        ptx::mbarrier_init(smem.k_full[stage], kNumThreads);
        ptx::mbarrier_init(smem.v_full[stage], kNumThreads);
      }
      ptx::mbarrier_init(smem.k_read, Config::kNumWarps);
      ptx::mbarrier_init(smem.v_read, Config::kNumWarps);
    }
    sm80::load_tile<kNumThreads>(smem.q, q_gmem, m0, sequence.seqlen_q, thread_idx);
    __syncthreads();  // the barriers are initialised
    load_k(0, n_block);
    load_v(0, n_block);
  }
  for (int it = 0; n_block < blocks.end; ++it) {
    const int next_block = next_from(n_block + 1);
    const auto load_next_k = [&] {
      if (next_block < blocks.end) load_k(it + 1, next_block);
    };
    if (it > 0) {
      ptx::mbarrier_wait(kStages > 1 ? smem.k_read : smem.v_read, (it - 1) & 1);
      load_v(it, n_block);
    }
    if (kStages > 1) load_next_k();
    warp.step(smem, GeneralScores<Config>{rule, m0, n_block * kBlockN}, it, load_next_k);
    n_block = next_block;
  }

  if constexpr (Config::kKeyGroups > 1) warp.join_key_groups(smem, rule.exponent().log2);
  if (warp.key_group == 0) {
    warp.softmax.finalize(warp.acc_o, rule.exponent().natural, rule.sink(),
                          p.general.dropout.product_factor());
    const int64_t lse = p.general.sequences.lse_index(sequence, batch_idx, head_idx, p.heads_q, 0);
    warp.store(smem, p.lse + lse, m0, sequence.seqlen_q);
  }
  __syncthreads();
  sm80::store_tile<kNumThreads>(
      sm80::gmem_rows<Element>(p.out, batch_idx, head_idx, p.head_dim).from(sequence.q_begin),
      smem.q, m0, sequence.seqlen_q, thread_idx);
}

}  // namespace flash_ext::v2
