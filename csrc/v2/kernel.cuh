// v2 forward: Algorithm 1 of FlashAttention-2 (Dao 2023, arXiv 2307.08691) on mma.sync.
//
// One thread block owns a tile of query rows and walks over the K/V blocks; each warp owns whole rows,
// so no warp ever needs another's maximum or sum.
//   1. load Q, start K_0
//   2. for every visible K/V block j:
//   3.   S = Q K_j^T             meanwhile V_j arrives
//   4.   mask S if the block lies on an edge
//   5.   m, l, P = online softmax; O rescaled, never normalised
//   6.   O += P V_j              meanwhile K_j+1 arrives
//   7. O / l, L = m + log l; O leaves through shared memory in 16-byte stores
#pragma once

#include "common/block_range.h"
#include "common/online_softmax.cuh"
#include "params.h"
#include "sm80/copy_tile.cuh"
#include "sm80/warp_gemm.cuh"
#include "v2/config.cuh"

namespace flash_ext::v2 {

struct KernelParams {
  TensorView q, k, v, out;
  float* lse;
  Mask mask;
  SoftmaxScale scale;
  int head_dim;
  int heads_q;
  int group_size;
  int num_m_blocks;
};

// Every warp's state while it walks over K/V.
template <typename Config>
struct ForwardTile {
  using Element = typename Config::Element;
  static constexpr int kM = Config::kWarpRows / 16;
  static constexpr int kNS = Config::kBlockN / 8;
  static constexpr int kNO = Config::kHeadDim / 8;
  static constexpr int kStepsD = Config::kHeadDim / sm80::Mma<Element>::kK;

  float acc_o[kM][kNO][4];
  OnlineSoftmax<kM> softmax;

  // Steps 3 to 6 for the block at key n0.
  template <typename LoadV, typename LoadK>
  __device__ __forceinline__ void step(typename Config::SharedStorage& smem, const KernelParams& p,
                                       int warp_row0, int tile_row0, int n0, int lane_idx,
                                       LoadV load_v, LoadK load_next_k) {
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // K has arrived; nobody reads the previous V any more
    load_v();
    float acc_s[kM][kNS][4];
    sm80::clear(acc_s);
    sm80::warp_gemm<kStepsD>(acc_s, sm80::KMajorA(smem.q, warp_row0, lane_idx),
                             sm80::KMajorB(smem.k, 0, lane_idx));
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // V has arrived; nobody reads K any more
    load_next_k();
    p.scale.apply_sign(acc_s);
    if (!block_is_full(p.mask, tile_row0, n0, Config::kBlockN)) {
      apply_mask(acc_s, p.mask, tile_row0 + warp_row0 + lane_idx / 4, n0 + lane_idx % 4 * 2);
    }
    softmax.update(acc_s, acc_o, p.scale.log2);
    sm80::warp_gemm_acc<Element>(
        acc_o, acc_s,
        sm80::MNMajorB<typename Config::KVTile, sm80::KOrder::kAccumulator>(smem.v, 0, lane_idx));
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kNumThreads)
    forward_kernel(const __grid_constant__ KernelParams p) {
  using Element = typename Config::Element;
  using Tile = ForwardTile<Config>;
  constexpr int kBlockM = Config::kBlockM;
  constexpr int kBlockN = Config::kBlockN;
  constexpr int kNumThreads = Config::kNumThreads;
  extern __shared__ __align__(128) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(smem_bytes);

  const int thread_idx = threadIdx.x;
  const int lane_idx = thread_idx % 32;
  const int warp_row0 = thread_idx / 32 * Config::kWarpRows;
  // Causal tiles grow with the row: the longest start first, so that no long one starts last.
  const int m_block = p.num_m_blocks - 1 - static_cast<int>(blockIdx.x % p.num_m_blocks);
  const int batch_head = blockIdx.x / p.num_m_blocks;
  const int batch_idx = batch_head / p.heads_q;
  const int head_idx = batch_head % p.heads_q;
  const int kv_head_idx = head_idx / p.group_size;
  const int m0 = m_block * kBlockM;
  const int seqlen_q = p.mask.seqlen_q;
  const int seqlen_k = p.mask.seqlen_k;

  const auto q_gmem = sm80::gmem_rows<Element>(p.q, batch_idx, head_idx, p.head_dim);
  const auto k_gmem = sm80::gmem_rows<Element>(p.k, batch_idx, kv_head_idx, p.head_dim);
  const auto v_gmem = sm80::gmem_rows<Element>(p.v, batch_idx, kv_head_idx, p.head_dim);

  const BlockRange blocks = key_blocks(p.mask, m0, kBlockM, kBlockN);
  auto load_k = [&](int n_block) {
    sm80::load_tile<kNumThreads>(smem.k, k_gmem, n_block * kBlockN, seqlen_k, thread_idx);
    ptx::cp_async_commit_group();
  };
  auto load_v = [&](int n_block) {
    sm80::load_tile<kNumThreads>(smem.v, v_gmem, n_block * kBlockN, seqlen_k, thread_idx);
    ptx::cp_async_commit_group();
  };

  Tile tile;
  sm80::clear(tile.acc_o);
  if (blocks.begin < blocks.end) {
    sm80::load_tile<kNumThreads>(smem.q, q_gmem, m0, seqlen_q, thread_idx);
    load_k(blocks.begin);
    for (int n_block = blocks.begin; n_block < blocks.end; ++n_block) {
      tile.step(
          smem, p, warp_row0, m0, n_block * kBlockN, lane_idx, [&] { load_v(n_block); },
          [&] {
            if (n_block + 1 < blocks.end) load_k(n_block + 1);
          });
    }
  }
  tile.softmax.finalize(tile.acc_o, p.scale.log2);

  // L, written by the first thread of each quad.
  float* lse = p.lse + static_cast<int64_t>(batch_head) * seqlen_q;
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m0 + warp_row0 + 16 * m + 8 * half + lane_idx / 4;
      if (lane_idx % 4 == 0 && row < seqlen_q) lse[row] = tile.softmax.row_max[m][half];
    }
  }

  // O reuses Q's rows; each warp overwrites only its own.
  __syncwarp();
  sm80::store_accumulator(smem.q, tile.acc_o, warp_row0, 0, lane_idx);
  __syncthreads();
  sm80::store_tile<kNumThreads>(sm80::gmem_rows<Element>(p.out, batch_idx, head_idx, p.head_dim),
                                smem.q, m0, seqlen_q, thread_idx);
}

}  // namespace flash_ext::v2
