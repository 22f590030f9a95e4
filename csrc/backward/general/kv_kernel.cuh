// dK and dV of general attention. A thread block owns kBlockN keys of one key head and walks over
// the query blocks that see them, of every query head in the group, so that both stay in registers
// to the end and are the same to the bit in every run.
//   1. load K, V; start Q, dO of the first query block
//   2. for every query block that the band and the block_mask leave:
//   3.   P = exp(rule(Q K^T) - L),  dP = dO V^T with what dropout leaves,  dS = P * (dP - D)
//   4.   what dropout leaves of P, and dS times the softcap's derivative, through shared memory
//   5.   dV += P^T dO,  dK += dS^T Q
//   6. dK * scale, dV leave through shared memory
#pragma once

#include "backward/general/config.cuh"
#include "backward/general/params.cuh"

namespace flash_ext::backward {

// A step of the walk over the query blocks of one head after another.
struct GeneralQueryWalk {
  const BlockMask& block_mask;
  int batch_idx, n0, block_m;
  BlockRange blocks;
  int past_last_head;

  int head_idx, m_block;  // where it stands

  __device__ __forceinline__ bool is_over() const { return head_idx >= past_last_head; }

  __device__ __forceinline__ void skip_what_is_off() {
    while (!is_over()) {
      if (m_block >= blocks.end) {
        ++head_idx;
        m_block = blocks.begin;
        if (blocks.begin >= blocks.end) head_idx = past_last_head;
      } else if (tile_is_on(block_mask, batch_idx, head_idx, m_block * block_m, n0)) {
        return;
      } else {
        ++m_block;
      }
    }
  }

  __device__ __forceinline__ void advance() {
    ++m_block;
    skip_what_is_off();
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kNumThreads, 1)
    general_kv_kernel(const __grid_constant__ GeneralKernelParams p) {
  using Element = typename Config::Element;
  using Score = typename Config::ScoreWarps;
  using KVGrid = typename Config::KVWarps;
  constexpr int kBlockM = Config::kBlockM;
  constexpr int kBlockN = Config::kBlockN;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kNumThreads = Config::kNumThreads;
  constexpr int kStages = Config::kStages;
  constexpr int kK = sm80::kMmaK;
  constexpr int kScoreM = kBlockM / Score::kRows / 16;
  constexpr int kScoreN = kBlockN / Score::kCols / 8;
  constexpr int kKVM = kBlockN / KVGrid::kRows / 16;
  constexpr int kKVN = kHeadDim / KVGrid::kCols / 8;
  extern __shared__ __align__(128) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(smem_bytes);

  const int thread_idx = threadIdx.x;
  const int lane_idx = thread_idx % 32;
  const int warp_idx = __shfl_sync(0xffffffffu, thread_idx / 32, 0);
  const TileOrder::Place place = p.order.place(static_cast<int>(blockIdx.x));
  const int n0 = place.rank * kBlockN;
  const int batch_idx = place.head / p.heads_kv;
  const int kv_head_idx = place.head % p.heads_kv;
  const Sequence sequence = p.general.sequences[batch_idx];
  // Of padding the gradients are 0, and written where the operator has not done so.
  const int past_last_key =
      p.general.sequences.is_packed() ? sequence.seqlen_k : p.general.sequences.max_seqlen_k;
  if (n0 >= past_last_key) return;
  const bool wants_dk = p.dk.data != nullptr;
  const bool wants_dv = p.dv.data != nullptr;

  BlockRange blocks{0, 0};
  if (n0 < sequence.seqlen_k) {
    const int last_key = min(n0 + kBlockN, sequence.seqlen_k) - 1;
    blocks = query_blocks(p.general.band(sequence), n0, last_key, kBlockM);
  }
  const int first_head = kv_head_idx * p.group_size;
  GeneralQueryWalk at{p.general.block_mask,      batch_idx,  n0,          kBlockM, blocks,
                      first_head + p.group_size, first_head, blocks.begin};
  at.skip_what_is_off();

  // Starts the copy of a query block's Q, dO and row statistics.
  const auto load_queries = [&](int head_idx, int m0, int stage) {
    const auto rows = [&](const TensorView& view) {
      return rows_of_sequence<Element>(view, batch_idx, head_idx, sequence.q_begin, p.head_dim);
    };
    sm80::load_tile<kNumThreads>(smem.q[stage], rows(p.q), m0, sequence.seqlen_q, thread_idx);
    sm80::load_tile<kNumThreads>(smem.dout[stage], rows(p.dout), m0, sequence.seqlen_q, thread_idx);
    if (thread_idx < kBlockM / 4) {
      const int i = thread_idx * 4;
      const int64_t row = p.rows.begin(sequence, batch_idx, head_idx, p.heads_q) + m0 + i;
      ptx::cp_async_16B_zfill(ptx::smem_addr(&smem.lse_log2[stage][i]), p.lse_log2 + row, 16);
      ptx::cp_async_16B_zfill(ptx::smem_addr(&smem.delta[stage][i]), p.delta + row, 16);
    }
    ptx::cp_async_commit_group();
  };

  float acc_dk[kKVM][kKVN][4];
  float acc_dv[kKVM][kKVN][4];
  sm80::clear(acc_dk);
  sm80::clear(acc_dv);
  const int score_row0 = warp_idx / Score::kCols * kScoreM * 16;
  const int score_col0 = warp_idx % Score::kCols * kScoreN * 8;
  const int kv_row0 = warp_idx / KVGrid::kCols * kKVM * 16;
  const int kv_col0 = warp_idx % KVGrid::kCols * kKVN * 8;
  const int row = score_row0 + lane_idx / 4;
  const int col = score_col0 + lane_idx % 4 * 2;

  if (!at.is_over()) {
    const auto rows = [&](const TensorView& view) {
      return rows_of_sequence<Element>(view, batch_idx, kv_head_idx, sequence.k_begin, p.head_dim);
    };
    sm80::load_tile<kNumThreads>(smem.k, rows(p.k), n0, sequence.seqlen_k, thread_idx);
    sm80::load_tile<kNumThreads>(smem.v, rows(p.v), n0, sequence.seqlen_k, thread_idx);
    load_queries(at.head_idx, at.m_block * kBlockM, 0);
  }
  int stage = 0;
  while (!at.is_over()) {
    const GeneralHead<Element> head(p, sequence, batch_idx, at.head_idx);
    const int m0 = at.m_block * kBlockM;
    const int next_stage = (stage + 1) % kStages;
    at.advance();
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // Q and dO have arrived; nobody reads the last ones, P and dS any more
    if (kStages > 1 && !at.is_over()) {
      load_queries(at.head_idx, at.m_block * kBlockM, next_stage);
    }

    // Steps 3 and 4.
    if (warp_idx < Score::kRows * Score::kCols) {
      float acc_p[kScoreM][kScoreN][4];
      float acc_slope[kScoreM][kScoreN][4];
      sm80::clear(acc_p);
      sm80::warp_gemm<kHeadDim / kK>(acc_p, sm80::KMajorA(smem.q[stage], score_row0, lane_idx),
                                     sm80::KMajorB(smem.k, score_col0, lane_idx));
      recompute_p(acc_p, acc_slope, head, smem.lse_log2[stage], m0, n0, row, col,
                  head.is_full(m0, kBlockM, n0, kBlockN));
      KeptElements<kScoreM, kScoreN> kept{0xffffffffu};
      if (head.rule.has_dropout()) {
        kept = head.rule.template kept<kScoreM, kScoreN>(m0 + row, n0 + col);
      }
      if (wants_dk) {
        float acc_ds[kScoreM][kScoreN][4];
        sm80::clear(acc_ds);
        sm80::warp_gemm<kHeadDim / kK>(acc_ds,
                                       sm80::KMajorA(smem.dout[stage], score_row0, lane_idx),
                                       sm80::KMajorB(smem.v, score_col0, lane_idx));
        if (head.rule.has_dropout()) kept.drop(acc_ds, p.general.dropout.keep_scale);
        compute_ds(acc_ds, acc_p, smem.delta[stage], row);
        if (head.rule.has_softcap()) multiply(acc_ds, acc_slope);
        sm80::store_accumulator(smem.ds, acc_ds, score_row0, score_col0, lane_idx);
      }
      if (wants_dv) {
        if (head.rule.has_dropout()) kept.drop(acc_p, p.general.dropout.weight_factor());
        sm80::store_accumulator(smem.p, acc_p, score_row0, score_col0, lane_idx);
      }
    }
    __syncthreads();

    // Step 5.
    using ScoreA = sm80::MNMajorA<typename Config::ScoreTile, sm80::KOrder::kPaired>;
    using QueryB = sm80::MNMajorB<typename Config::QTile, sm80::KOrder::kPaired>;
    if (wants_dv) {
      sm80::warp_gemm<kBlockM / kK>(acc_dv, ScoreA(smem.p, kv_row0, lane_idx),
                                    QueryB(smem.dout[stage], kv_col0, lane_idx));
    }
    if (wants_dk) {
      sm80::warp_gemm<kBlockM / kK>(acc_dk, ScoreA(smem.ds, kv_row0, lane_idx),
                                    QueryB(smem.q[stage], kv_col0, lane_idx));
    }
    if (kStages == 1 && !at.is_over()) {
      __syncthreads();  // nobody reads Q and dO any more
      load_queries(at.head_idx, at.m_block * kBlockM, 0);
    }
    stage = next_stage;
  }

  // Step 6.
  __syncthreads();
  multiply(acc_dk, p.scale.softmax_scale);
  multiply(acc_dv, p.general.dropout.product_factor());
  sm80::store_accumulator(smem.k, acc_dk, kv_row0, kv_col0, lane_idx);
  sm80::store_accumulator(smem.v, acc_dv, kv_row0, kv_col0, lane_idx);
  __syncthreads();
  const auto store = [&](const TensorView& view, typename Config::KVTile& tile) {
    if (view.data == nullptr) return;
    sm80::store_tile<kNumThreads>(
        rows_of_sequence<Element>(view, batch_idx, kv_head_idx, sequence.k_begin, p.head_dim), tile,
        n0, past_last_key, thread_idx);
  };
  store(p.dk, smem.k);
  store(p.dv, smem.v);
}

}  // namespace flash_ext::backward
