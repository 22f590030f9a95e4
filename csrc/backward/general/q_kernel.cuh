// Per query row of general attention: dQ, what the row adds to dslopes, and dmask where that is not
// summed over rows or keys. A thread block owns a tile of query rows and walks over the K/V blocks
// as the forward does, so that nothing but an added dmask is shared between thread blocks.
//
// dS here is the gradient of the scores behind the softcap, the one that masks and slopes get; dQ
// takes it times the softcap's derivative t.
//
// Like correct_and_scale_dq, dQ is freed of the mean of K times what the rows of dS sum up to too
// much. D, which is rounded, is too large by e, so dS is too small by P e: e = R - sum(dS) with the
// R of row_stats. So the row that K is multiplied by should sum to sum(t dS) + e sum(t P), and
// rounded sums to something else. Without softcap and sink, where t and sum(P) are 1, that is R.
#pragma once

#include "backward/config.cuh"
#include "backward/general/params.cuh"
#include "ptx/reduction.cuh"

namespace flash_ext::backward {

// This thread's share of the sums over two rows of a warp, `half` 0 and 1.
struct RowSums {
  float ds[2] = {0.f, 0.f};
  float capped_ds[2] = {0.f, 0.f};  // t dS
  float capped_p[2] = {0.f, 0.f};   // t P
  float distance[2] = {0.f, 0.f};   // dS |i + diagonal - j|
};

template <typename Element, int kN>
__device__ __forceinline__ void put_mask_gradient(const float (&acc_ds)[1][kN][4],
                                                  const GeneralKernelParams& p,
                                                  const GeneralHead<Element>& head, int row0,
                                                  int col0) {
  const ScoreTensor& to = p.gradients.dmask;
  auto* const data = static_cast<float*>(to.data) + to.offset(head.batch_idx, head.head_idx, 0, 0);
  for_each_element<1, kN>([&](int m, int n, int i) {
    const int row = row0 + 8 * (i / 2);
    const int col = col0 + 8 * n + i % 2;
    if (row >= head.sequence.seqlen_q || col >= head.sequence.seqlen_k) return;
    float* const element = data + row * to.row_stride + col * to.key_stride;
    if (p.mask_gradient == MaskGradient::kAdded) {
      ptx::red_add(element, acc_ds[m][n][i]);
    } else {
      *element = acc_ds[m][n][i];
    }
  });
}

template <typename Config>
__global__ void __launch_bounds__(Config::kNumThreads, 1)
    general_q_kernel(const __grid_constant__ GeneralKernelParams p) {
  using Element = typename Config::Element;
  using M = sm80::Mma<Element>;
  constexpr int kBlockM = Config::kBlockM;
  constexpr int kBlockN = Config::kBlockN;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kNumThreads = Config::kNumThreads;
  constexpr int kTilesN = kBlockN / 8;
  static_assert(kBlockM <= kMaxGeneralTile && kBlockN <= kMaxGeneralTile);
  extern __shared__ __align__(128) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(smem_bytes);

  const int thread_idx = threadIdx.x;
  const int lane_idx = thread_idx % 32;
  const int warp_row0 = thread_idx / 32 * 16;
  const int row = warp_row0 + lane_idx / 4;
  const int col = lane_idx % 4 * 2;
  const TileOrder::Place place = p.order.place(static_cast<int>(blockIdx.x));
  const int m0 = (p.order.tiles_per_head() - 1 - place.rank) * kBlockM;
  const int batch_idx = place.head / p.heads_q;
  const int head_idx = place.head % p.heads_q;
  const int kv_head_idx = head_idx / p.group_size;
  const Sequence sequence = p.general.sequences[batch_idx];
  if (m0 >= sequence.seqlen_q) return;
  const GeneralHead<Element> head(p, sequence, batch_idx, head_idx);

  const auto queries = [&](const TensorView& view) {
    return rows_of_sequence<Element>(view, batch_idx, head_idx, sequence.q_begin, p.head_dim);
  };
  const auto keys = [&](const TensorView& view) {
    return rows_of_sequence<Element>(view, batch_idx, kv_head_idx, sequence.k_begin, p.head_dim);
  };
  const auto load_keys = [&](typename Config::KVTile& tile, const TensorView& view, int n_block) {
    sm80::load_tile<kNumThreads>(tile, keys(view), n_block * kBlockN, sequence.seqlen_k,
                                 thread_idx);
    ptx::cp_async_commit_group();
  };
  const BlockRange blocks = key_blocks(head.rule.band(), m0, kBlockM, kBlockN);
  const auto next_from = [&](int n_block) {
    return next_key_block(p.general.block_mask, batch_idx, head_idx, m0, n_block, kBlockN, blocks);
  };

  float acc_dq[1][kHeadDim / 8][4];
  float acc_row_sum[4] = {0.f, 0.f, 0.f, 0.f};
  sm80::clear(acc_dq);
  const auto ones = M::ones_b();
  RowSums sums;
  const bool needs_sums = head.rule.has_softcap() || head.rule.has_sink();
  const float* const lse_log2 = p.lse_log2 + head.stats + m0;
  const float* const delta = p.delta + head.stats + m0;

  int n_block = next_from(blocks.begin);
  if (n_block < blocks.end) {
    sm80::load_tile<kNumThreads>(smem.q, queries(p.q), m0, sequence.seqlen_q, thread_idx);
    sm80::load_tile<kNumThreads>(smem.dout, queries(p.dout), m0, sequence.seqlen_q, thread_idx);
    load_keys(smem.k, p.k, n_block);
  }
  while (n_block < blocks.end) {
    const int n0 = n_block * kBlockN;
    const int next_block = next_from(n_block + 1);
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // K has arrived; nobody reads the previous V any more
    load_keys(smem.v, p.v, n_block);

    float acc_p[1][kTilesN][4];
    float acc_slope[1][kTilesN][4];
    sm80::clear(acc_p);
    sm80::warp_gemm<kHeadDim / sm80::kMmaK>(acc_p, sm80::KMajorA(smem.q, warp_row0, lane_idx),
                                            sm80::KMajorB(smem.k, 0, lane_idx));
    recompute_p(acc_p, acc_slope, head, lse_log2, m0, n0, row, col,
                head.is_full(m0, kBlockM, n0, kBlockN));

    ptx::cp_async_wait_group<0>();
    __syncthreads();  // V has arrived
    float acc_ds[1][kTilesN][4];
    sm80::clear(acc_ds);
    sm80::warp_gemm<kHeadDim / sm80::kMmaK>(acc_ds, sm80::KMajorA(smem.dout, warp_row0, lane_idx),
                                            sm80::KMajorB(smem.v, 0, lane_idx));
    if (head.rule.has_dropout()) {
      head.rule.template kept<1, kTilesN>(m0 + row, n0 + col)
          .drop(acc_ds, p.general.dropout.keep_scale);
    }
    compute_ds(acc_ds, acc_p, delta, row);

    if (p.mask_gradient != MaskGradient::kNone) {
      put_mask_gradient(acc_ds, p, head, m0 + row, n0 + col);
    }
    if (p.dslope_rows != nullptr) {
      int element = 0;
      head.rule.for_each_distance(acc_ds, m0 + row, n0 + col, [&](float ds, float distance) {
        sums.distance[element++ / 2 % 2] += ds * distance;
      });
    }
    if (needs_sums) {
      for_each_element<1, kTilesN>([&](int m, int n, int i) {
        const float slope = head.rule.has_softcap() ? acc_slope[m][n][i] : 1.f;
        float& ds = acc_ds[m][n][i];
        sums.ds[i / 2] += ds;
        ds *= slope;
        sums.capped_ds[i / 2] += ds;
        sums.capped_p[i / 2] += acc_p[m][n][i] * slope;
      });
    }
    sm80::warp_gemm<kBlockN / sm80::kMmaK>(
        acc_dq, sm80::accumulator_a<Element>(acc_ds),
        sm80::MNMajorB<typename Config::KVTile, sm80::KOrder::kPaired>(smem.k, 0, lane_idx));
#pragma unroll
    for (int k = 0; k < kBlockN / sm80::kMmaK; ++k) {
      M::mma(acc_row_sum, M::from_accumulator(acc_ds[0], k), ones);
    }
    if (next_block < blocks.end) {
      __syncthreads();  // nobody reads K any more
      load_keys(smem.k, p.k, next_block);
    }
    n_block = next_block;
  }

  if (p.dslope_rows != nullptr) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(sums.distance[half]);
      if (lane_idx % 4 == 0) p.dslope_rows[head.stats + m0 + row + 8 * half] = -sum;
    }
  }
  if (p.dq.data == nullptr) return;
  float row_sum_error[1][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float expected = p.row_sum[head.stats + m0 + row + 8 * half];
    if (needs_sums) {
      const float too_small = expected - quad_sum(sums.ds[half]);
      expected = quad_sum(sums.capped_ds[half]) + too_small * quad_sum(sums.capped_p[half]);
    }
    row_sum_error[0][half] = acc_row_sum[2 * half] - expected;
  }
  const float* key_mean =
      p.key_mean + (static_cast<int64_t>(batch_idx) * p.heads_kv + kv_head_idx) * kHeadDim;
  correct_and_scale_dq(acc_dq, row_sum_error, key_mean, p.scale.softmax_scale, col);
  __syncthreads();  // a block whose walk was empty has read nothing, others Q for the last time
  sm80::store_accumulator(smem.q, acc_dq, warp_row0, 0, lane_idx);
  __syncthreads();
  sm80::store_tile<kNumThreads>(queries(p.dq), smem.q, m0, sequence.seqlen_q, thread_idx);
}

}  // namespace flash_ext::backward
