// dmask where elements of it are sums: over rows or keys, or over batch entries or heads where it
// has to be the same to the bit in every run. A thread block owns a tile of dmask and walks over
// all tiles of scores that share it, in one order; S and dP are computed once more for it.
#pragma once

#include "backward/config.cuh"
#include "backward/general/params.cuh"

namespace flash_ext::backward {

// What is summed, or all there is: indices [first, last).
struct Span {
  int first, last;

  static __device__ __forceinline__ Span of(int64_t stride, int index, int count) {
    return stride == 0 ? Span{0, count} : Span{index, index + 1};
  }
};

// How many thread blocks a dimension of `count` takes.
inline int64_t num_spans(int64_t stride, int64_t count) { return stride == 0 ? 1 : count; }

template <typename Config>
union DmaskStorage {
  typename Config::SharedStorage tiles;
  float sum[Config::kBlockM][Config::kBlockN];  // at the end
};

template <typename Config>
__global__ void __launch_bounds__(Config::kNumThreads, 1)
    dmask_kernel(const __grid_constant__ GeneralKernelParams p) {
  using Element = typename Config::Element;
  constexpr int kBlockM = Config::kBlockM;
  constexpr int kBlockN = Config::kBlockN;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kNumThreads = Config::kNumThreads;
  constexpr int kTilesN = kBlockN / 8;
  extern __shared__ __align__(128) char smem_bytes[];
  auto& storage = *reinterpret_cast<DmaskStorage<Config>*>(smem_bytes);
  auto& smem = storage.tiles;

  const int thread_idx = threadIdx.x;
  const int lane_idx = thread_idx % 32;
  const int warp_row0 = thread_idx / 32 * 16;
  const int row = warp_row0 + lane_idx / 4;
  const int col = lane_idx % 4 * 2;
  const ScoreTensor& to = p.gradients.dmask;
  const int seqlen_q = p.general.sequences.max_seqlen_q;
  const int seqlen_k = p.general.sequences.max_seqlen_k;
  const int m_blocks = ceil_div(seqlen_q, kBlockM);
  const int n_blocks = ceil_div(seqlen_k, kBlockN);

  // Innermost the keys, outermost the batch, of what is not summed.
  int index = static_cast<int>(blockIdx.x);
  const auto take = [&](int64_t stride, int count) {
    const Span span = Span::of(stride, stride == 0 ? 0 : index % count, count);
    if (stride != 0) index /= count;
    return span;
  };
  const Span n_span = take(to.key_stride, n_blocks);
  const Span m_span = take(to.row_stride, m_blocks);
  const Span heads = take(to.head_stride, p.heads_q);
  const Span entries = take(to.batch_stride, p.batch);

  float acc_sum[1][kTilesN][4];
  sm80::clear(acc_sum);
  for (int batch_idx = entries.first; batch_idx < entries.last; ++batch_idx) {
    const Sequence sequence = p.general.sequences[batch_idx];
    for (int head_idx = heads.first; head_idx < heads.last; ++head_idx) {
      const GeneralHead<Element> head(p, sequence, batch_idx, head_idx);
      for (int m_block = m_span.first; m_block < m_span.last; ++m_block) {
        const int m0 = m_block * kBlockM;
        if (m0 >= sequence.seqlen_q) break;
        const BlockRange visible = key_blocks(head.rule.band(), m0, kBlockM, kBlockN);
        const BlockRange blocks{max(visible.begin, n_span.first), min(visible.end, n_span.last)};
        for (int n_block = blocks.begin; n_block < blocks.end; ++n_block) {
          const int n0 = n_block * kBlockN;
          if (!tile_is_on(p.general.block_mask, batch_idx, head_idx, m0, n0)) continue;
          const auto load = [&](auto& tile, const TensorView& view, int view_head, int64_t begin,
                                int first, int past_last) {
            sm80::load_tile<kNumThreads>(
                tile, rows_of_sequence<Element>(view, batch_idx, view_head, begin, p.head_dim),
                first, past_last, thread_idx);
          };
          const int kv_head_idx = head_idx / p.group_size;
          __syncthreads();  // nobody reads the last tiles any more
          load(smem.q, p.q, head_idx, sequence.q_begin, m0, sequence.seqlen_q);
          load(smem.dout, p.dout, head_idx, sequence.q_begin, m0, sequence.seqlen_q);
          load(smem.k, p.k, kv_head_idx, sequence.k_begin, n0, sequence.seqlen_k);
          load(smem.v, p.v, kv_head_idx, sequence.k_begin, n0, sequence.seqlen_k);
          ptx::cp_async_commit_group();
          ptx::cp_async_wait_group<0>();
          __syncthreads();

          float acc_p[1][kTilesN][4];
          float acc_slope[1][kTilesN][4];  // nobody needs it
          float acc_ds[1][kTilesN][4];
          sm80::clear(acc_p);
          sm80::clear(acc_ds);
          sm80::warp_gemm<kHeadDim / sm80::kMmaK>(acc_p, sm80::KMajorA(smem.q, warp_row0, lane_idx),
                                                  sm80::KMajorB(smem.k, 0, lane_idx));
          sm80::warp_gemm<kHeadDim / sm80::kMmaK>(acc_ds,
                                                  sm80::KMajorA(smem.dout, warp_row0, lane_idx),
                                                  sm80::KMajorB(smem.v, 0, lane_idx));
          recompute_p(acc_p, acc_slope, head, p.lse_log2 + head.stats + m0, m0, n0, row, col,
                      head.is_full(m0, kBlockM, n0, kBlockN));
          if (head.rule.has_dropout()) {
            head.rule.template kept<1, kTilesN>(m0 + row, n0 + col)
                .drop(acc_ds, p.general.dropout.keep_scale);
          }
          compute_ds(acc_ds, acc_p, p.delta + head.stats + m0, row);
          for_each_element<1, kTilesN>(
              [&](int m, int n, int i) { acc_sum[m][n][i] += acc_ds[m][n][i]; });
        }
      }
    }
  }

  __syncthreads();
  for_each_element<1, kTilesN>([&](int m, int n, int i) {
    storage.sum[row + 8 * (i / 2)][col + 8 * n + i % 2] = acc_sum[m][n][i];
  });
  __syncthreads();
  // One thread sums up what falls together.
  const int num_rows = to.row_stride == 0 ? 1 : kBlockM;
  const int num_cols = to.key_stride == 0 ? 1 : kBlockN;
  const int m0 = m_span.first * kBlockM;
  const int n0 = n_span.first * kBlockN;
  float* const data = static_cast<float*>(to.data) + to.offset(entries.first, heads.first, 0, 0);
  for (int t = thread_idx; t < num_rows * num_cols; t += kNumThreads) {
    const int r = t / num_cols;
    const int c = t % num_cols;
    if (m0 + r >= seqlen_q || n0 + c >= seqlen_k) continue;
    float sum = 0.f;
    for (int i = r; i < (num_rows == 1 ? kBlockM : r + 1); ++i) {
      for (int j = c; j < (num_cols == 1 ? kBlockN : c + 1); ++j) sum += storage.sum[i][j];
    }
    data[(m0 + r) * to.row_stride + (n0 + c) * to.key_stride] = sum;
  }
}

}  // namespace flash_ext::backward
