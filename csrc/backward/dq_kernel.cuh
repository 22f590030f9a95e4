// dQ on its own, for deterministic gradients and for callers that want no other: a thread block
// owns a tile of query rows and walks over the K/V blocks as the forward does, so nothing is shared
// between thread blocks and nothing but the result is written. It costs two products more than the
// fused kernel (S and dP are computed twice when dK or dV are wanted too).
#pragma once

#include "backward/config.cuh"
#include "backward/params.cuh"
#include "common/block_range.h"
#include "ptx/griddepcontrol.cuh"
#include "sm80/copy_tile.cuh"

namespace flash_ext::backward {

template <typename Config>
__global__ void __launch_bounds__(Config::kNumThreads, 1)
    dq_kernel(const __grid_constant__ KernelParams p) {
  using Element = typename Config::Element;
  using M = sm80::Mma<Element>;
  constexpr int kBlockM = Config::kBlockM;
  constexpr int kBlockN = Config::kBlockN;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kNumThreads = Config::kNumThreads;
  extern __shared__ __align__(128) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(smem_bytes);

  ptx::griddepcontrol_wait();
  const int thread_idx = threadIdx.x;
  const int lane_idx = thread_idx % 32;
  const int warp_row0 = thread_idx / 32 * 16;
  const TileOrder::Place place = p.order.place(static_cast<int>(blockIdx.x));
  const int m_block = p.order.tiles_per_head() - 1 - place.rank;  // causal tiles grow with the row
  const int m0 = m_block * kBlockM;
  const int batch_head = place.head;
  const int batch_idx = batch_head / p.heads_q;
  const int head_idx = batch_head % p.heads_q;
  const int kv_head_idx = head_idx / p.group_size;
  const int seqlen_q = p.mask.seqlen_q;
  const int seqlen_k = p.mask.seqlen_k;

  const auto k_gmem = sm80::gmem_rows<Element>(p.k, batch_idx, kv_head_idx, p.head_dim);
  const auto v_gmem = sm80::gmem_rows<Element>(p.v, batch_idx, kv_head_idx, p.head_dim);
  const BlockRange blocks = key_blocks(p.mask, m0, kBlockM, kBlockN);

  float acc_dq[1][kHeadDim / 8][4];
  float acc_row_sum[4] = {0.f, 0.f, 0.f, 0.f};
  sm80::clear(acc_dq);
  const auto ones = M::ones_b();
  const int64_t stats = static_cast<int64_t>(batch_head) * p.padded_seqlen_q + m0 + warp_row0;
  const float* lse_log2 = p.lse_log2 + stats;
  const float* delta = p.delta + stats;
  const float* lse = p.lse + static_cast<int64_t>(batch_head) * seqlen_q + m0 + warp_row0;

  if (blocks.begin < blocks.end) {
    sm80::load_tile<kNumThreads>(smem.q,
                                 sm80::gmem_rows<Element>(p.q, batch_idx, head_idx, p.head_dim), m0,
                                 seqlen_q, thread_idx);
    sm80::load_tile<kNumThreads>(smem.dout,
                                 sm80::gmem_rows<Element>(p.dout, batch_idx, head_idx, p.head_dim),
                                 m0, seqlen_q, thread_idx);
    sm80::load_tile<kNumThreads>(smem.k, k_gmem, blocks.begin * kBlockN, seqlen_k, thread_idx);
    ptx::cp_async_commit_group();
  }
  for (int n_block = blocks.begin; n_block < blocks.end; ++n_block) {
    const int n0 = n_block * kBlockN;
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // K has arrived; nobody reads the previous V any more
    sm80::load_tile<kNumThreads>(smem.v, v_gmem, n0, seqlen_k, thread_idx);
    ptx::cp_async_commit_group();

    float acc_s[1][kBlockN / 8][4];
    sm80::clear(acc_s);
    sm80::warp_gemm<kHeadDim / sm80::kMmaK>(acc_s, sm80::KMajorA(smem.q, warp_row0, lane_idx),
                                            sm80::KMajorB(smem.k, 0, lane_idx));
    p.scale.apply_sign(acc_s);
    if (!block_is_full(p.mask, m0, n0, kBlockN)) {
      apply_mask(acc_s, p.mask, m0 + warp_row0 + lane_idx / 4, n0 + lane_idx % 4 * 2);
    }
    recompute_p(acc_s, lse_log2, lse, p.scale, lane_idx / 4);

    ptx::cp_async_wait_group<0>();
    __syncthreads();  // V has arrived
    float acc_dp[1][kBlockN / 8][4];
    sm80::clear(acc_dp);
    sm80::warp_gemm<kHeadDim / sm80::kMmaK>(acc_dp, sm80::KMajorA(smem.dout, warp_row0, lane_idx),
                                            sm80::KMajorB(smem.v, 0, lane_idx));
    compute_ds(acc_dp, acc_s, delta, lane_idx / 4);
    sm80::warp_gemm<kBlockN / sm80::kMmaK>(
        acc_dq, sm80::accumulator_a<Element>(acc_dp),
        sm80::MNMajorB<typename Config::KVTile, sm80::KOrder::kPaired>(smem.k, 0, lane_idx));
#pragma unroll
    for (int k = 0; k < kBlockN / sm80::kMmaK; ++k) {
      M::mma(acc_row_sum, M::from_accumulator(acc_dp[0], k), ones);
    }
    if (n_block + 1 < blocks.end) {
      __syncthreads();  // nobody reads K any more
      sm80::load_tile<kNumThreads>(smem.k, k_gmem, n0 + kBlockN, seqlen_k, thread_idx);
      ptx::cp_async_commit_group();
    }
  }

  const float* row_sum = p.dq_row_sum + stats + lane_idx / 4;  // -dL
  const float row_sum_error[1][2] = {{row_sum[0] + acc_row_sum[0], row_sum[8] + acc_row_sum[2]}};
  const float* key_mean =
      p.key_mean + (static_cast<int64_t>(batch_idx) * p.heads_kv + kv_head_idx) * kHeadDim;
  correct_and_scale_dq(acc_dq, row_sum_error, key_mean, p.softmax_scale, lane_idx % 4 * 2);
  __syncwarp();  // a warp overwrites its own rows of Q only
  sm80::store_accumulator(smem.q, acc_dq, warp_row0, 0, lane_idx);
  __syncthreads();
  sm80::store_tile<kNumThreads>(sm80::gmem_rows<Element>(p.dq, batch_idx, head_idx, p.head_dim),
                                smem.q, m0, seqlen_q, thread_idx);
}

}  // namespace flash_ext::backward
