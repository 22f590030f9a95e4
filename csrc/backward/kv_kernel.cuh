// dK and dV, and on the way dQ: FlashAttention-2's backward (Dao 2023, arXiv 2307.08691,
// Algorithm 2) on mma.sync.
//
// One thread block owns kBlockN keys of one key head and walks over every query block that sees
// them, of every query head in the group or in its part of it (backward/parts.h), so that dK and dV
// stay in registers to the end and are the same to the bit in every run.
//   1. load K, V; start Q, dO of the first query block; K' = K - mean(K)
//   2. for every query block i (of every query head of the part):
//   3.   S = Q K^T, P = exp2(S - L)         dP = dO V^T, dS = P * (dP - delta)
//   4.   P and dS through shared memory: the products below need them transposed
//   5.   dV += P^T dO,  dK += dS^T Q
//   6.   dQ_i += dS K', added to an fp32 buffer in memory, for other thread blocks add to its rows
//   7. dK * scale, dV leave through shared memory; of one part among several, as they are, in fp32
//
// Every warp needs what others write, in every iteration. They meet at mbarriers, at which a warp
// arrives as soon as it can and waits as late as it can, with a product of its own in between:
// against __syncthreads() at 4x16x4096, d=128, 1.10 times as fast (causal 1.14), at d=64 1.03.
#pragma once

#include "backward/config.cuh"
#include "backward/params.cuh"
#include "backward/parts.cuh"
#include "common/block_range.h"
#include "common/centred_keys.cuh"
#include "ptx/griddepcontrol.cuh"
#include "ptx/reduction.cuh"
#include "sm80/copy_tile.cuh"

namespace flash_ext::backward {

// dQ's fp32 buffer holds accumulators as the threads hold them: four floats a thread, neighbouring
// threads adjacent, so that a warp adds 512 contiguous bytes at a time.
template <typename Config>
struct DqTile {
  using Warps = typename Config::QWarps;
  static constexpr int kM = Config::kBlockM / Warps::kRows / 16;
  static constexpr int kN = Config::kHeadDim / Warps::kCols / 8;

  int row0, col0;  // of this warp
  int first;       // this thread's first float

  __device__ __forceinline__ DqTile(int warp_idx, int lane_idx)
      : row0(warp_idx / Warps::kCols * kM * 16),
        col0(warp_idx % Warps::kCols * kN * 8),
        first((warp_idx * kM * kN * 32 + lane_idx) * 4) {}

  __device__ __forceinline__ int offset(int m, int n) const { return first + (m * kN + n) * 128; }
};

// Each row's sum of dS as the dQ product sees it, rounded: a product with a column of ones.
template <int kKSteps, int kM, typename A>
__device__ __forceinline__ void row_sums(float (&row_sum)[kM][2], const A& ds_operand) {
  using M = typename A::M;
  const auto ones = M::ones_b();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    float acc[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int k = 0; k < kKSteps; ++k) M::mma(acc, ds_operand.load(m, k), ones);
    row_sum[m][0] = acc[0];
    row_sum[m][1] = acc[2];
  }
}

// K minus its mean, or half of that, for dQ.
template <typename Config>
__device__ __forceinline__ void centre_keys(typename Config::SharedStorage& smem,
                                            const float* key_mean, int thread_idx) {
  using Element = typename Config::Element;
  using KVTile = typename Config::KVTile;
  using Thread = sm80::TileThread<KVTile, Config::kNumThreads>;
  const Thread thread(thread_idx);
#pragma unroll
  for (int piece = 0; piece < Thread::kPieces; ++piece) {
    float mean[KVTile::kChunk];
#pragma unroll
    for (int i = 0; i < KVTile::kChunk; ++i) {
      mean[i] = key_mean[thread.col + piece * Thread::kPieceCols + i];
    }
#pragma unroll
    for (int pass = 0; pass < Thread::kPasses; ++pass) {
      const int offset = thread.offset(pass, piece);
      uint4 bits = *reinterpret_cast<const uint4*>(smem.k.bytes() + offset);
      auto* x = reinterpret_cast<Element*>(&bits);
#pragma unroll
      for (int i = 0; i < KVTile::kChunk; ++i) {
        x[i] = from_float<Element>(kCentredKeyScale<Element> * (to_float(x[i]) - mean[i]));
      }
      *reinterpret_cast<uint4*>(smem.k_centred.bytes() + offset) = bits;
    }
  }
}

template <typename Config>
__device__ __forceinline__ typename Config::KVTile& keys_for_dq(
    typename Config::SharedStorage& smem) {
  if constexpr (Config::kCentresKeys) {
    return smem.k_centred;
  } else {
    return smem.k;
  }
}

// A step of the walk over the query blocks that see a tile, of one head of the part after another.
struct QueryBlock {
  int head_idx;
  int m_block;

  __device__ __forceinline__ QueryBlock next(const BlockRange& blocks) const {
    return m_block + 1 < blocks.end ? QueryBlock{head_idx, m_block + 1}
                                    : QueryBlock{head_idx + 1, blocks.begin};
  }
};

template <typename Config, bool kWithDq>
__global__ void __launch_bounds__(Config::kNumThreads, Config::kMinBlocks)
    kv_kernel(const __grid_constant__ KernelParams p) {
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
  // Through a shuffle, so that the compiler knows it to be the same for the whole warp.
  const int warp_idx = __shfl_sync(0xffffffffu, thread_idx / 32, 0);
  // Among the tiles of all parts: what the order calls a head is a part of a group.
  const TileOrder::Place place = p.order.place(static_cast<int>(blockIdx.x));
  const int n0 = place.rank * kBlockN;  // causal tiles shrink with the key
  const int batch_idx = place.head / p.parts_per_sequence;
  const int part_idx = place.head % p.parts_per_sequence;  // of the sequence
  const int kv_head_idx = part_idx / p.num_parts;
  const int seqlen_q = p.mask.seqlen_q;
  const int seqlen_k = p.mask.seqlen_k;
  const bool wants_dk = p.dk.data != nullptr;
  const bool wants_dv = p.dv.data != nullptr;
  const bool wants_ds = wants_dk || kWithDq;

  const BlockRange blocks = query_blocks(p.mask, n0, kBlockM);
  const int num_iterations = max(blocks.end - blocks.begin, 0) * p.heads_per_part;

  QueryBlock at{part_idx * p.heads_per_part, blocks.begin};

  const bool copies_are_async = p.q.aligned16 && p.dout.aligned16;
  // Starts the copy of a query block's Q, dO and row statistics.
  auto load_queries = [&](const QueryBlock& block, int stage) {
    const int head_idx = block.head_idx;
    const int m0 = block.m_block * kBlockM;
    sm80::load_tile<kNumThreads>(smem.q[stage],
                                 sm80::gmem_rows<Element>(p.q, batch_idx, head_idx, p.head_dim), m0,
                                 seqlen_q, thread_idx);
    sm80::load_tile<kNumThreads>(smem.dout[stage],
                                 sm80::gmem_rows<Element>(p.dout, batch_idx, head_idx, p.head_dim),
                                 m0, seqlen_q, thread_idx);
    const int64_t row =
        (static_cast<int64_t>(batch_idx) * p.heads_q + head_idx) * p.padded_seqlen_q + m0;
    if (thread_idx < kBlockM / 4) {
      const int i = thread_idx * 4;
      ptx::cp_async_16B_zfill(ptx::smem_addr(&smem.lse_log2[stage][i]), p.lse_log2 + row + i, 16);
      ptx::cp_async_16B_zfill(ptx::smem_addr(&smem.delta[stage][i]), p.delta + row + i, 16);
    }
    sm80::arrive_when_copied(smem.full[stage], copies_are_async);
  };

  float acc_dk[kKVM][kKVN][4];
  float acc_dv[kKVM][kKVN][4];
  sm80::clear(acc_dk);
  sm80::clear(acc_dv);
  constexpr int kScoreWarps = Score::kRows * Score::kCols;
  const bool computes_p = warp_idx < kScoreWarps;
  const int score_row0 = warp_idx % kScoreWarps / Score::kCols * kScoreM * 16;
  const int score_col0 = warp_idx % Score::kCols * kScoreN * 8;
  const int kv_row0 = warp_idx / KVGrid::kCols * kKVM * 16;
  const int kv_col0 = warp_idx % KVGrid::kCols * kKVN * 8;
  const int row = score_row0 + lane_idx / 4;

  if (num_iterations > 0) {
    if (thread_idx == 0) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        ptx::mbarrier_init(smem.full[stage], kNumThreads);
      }
      ptx::mbarrier_init(smem.p_ready, Config::kNumWarps);
      ptx::mbarrier_init(smem.ds_ready, Config::kNumWarps);
      ptx::mbarrier_init(smem.read, Config::kNumWarps);
    }
    sm80::load_tile<kNumThreads>(smem.k,
                                 sm80::gmem_rows<Element>(p.k, batch_idx, kv_head_idx, p.head_dim),
                                 n0, seqlen_k, thread_idx);
    sm80::load_tile<kNumThreads>(smem.v,
                                 sm80::gmem_rows<Element>(p.v, batch_idx, kv_head_idx, p.head_dim),
                                 n0, seqlen_k, thread_idx);
    ptx::cp_async_commit_group();
    __syncthreads();  // the barriers are initialised; where K and V are not aligned, they are there
  }
  ptx::griddepcontrol_wait();
  if (num_iterations > 0) {
    load_queries(at, 0);
    if constexpr (kWithDq && Config::kCentresKeys) {
      ptx::cp_async_wait_group<0>();
      __syncthreads();
      const int64_t kv_head = static_cast<int64_t>(batch_idx) * p.heads_kv + kv_head_idx;
      centre_keys<Config>(smem, p.key_mean + kv_head * kHeadDim, thread_idx);
    }
  }

  int stage = 0;
  for (int it = 0; it < num_iterations; ++it) {
    const int head_idx = at.head_idx;
    const int m0 = at.m_block * kBlockM;
    const int next_stage = (stage + 1) % kStages;
    at = at.next(blocks);
    // What the last iteration left in shared memory gives way to the next Q and dO, and to P and
    // dS: after the first product, when the slowest warp has long read it.
    const auto wait_until_read = [&] {
      ptx::mbarrier_wait(smem.read, (it + 1) & 1);
      if (kStages > 1 && it + 1 < num_iterations) load_queries(at, next_stage);
    };
    ptx::mbarrier_wait(smem.full[stage], it / kStages & 1);

    // Step 3.
    const int64_t head_row = static_cast<int64_t>(batch_idx) * p.heads_q + head_idx;
    const float* lse = p.lse + head_row * seqlen_q + m0;
    const auto k_operand = sm80::KMajorB(smem.k, score_col0, lane_idx);
    const auto v_operand = sm80::KMajorB(smem.v, score_col0, lane_idx);
    const auto compute_p = [&](float (&acc_s)[kScoreM][kScoreN][4]) {
      sm80::clear(acc_s);
      sm80::warp_gemm<kHeadDim / kK>(acc_s, sm80::KMajorA(smem.q[stage], score_row0, lane_idx),
                                     k_operand);
      p.scale.apply_sign(acc_s);
      if (!block_is_full(p.mask, m0, n0, kBlockN)) {
        apply_mask(acc_s, p.mask, m0 + row, n0 + score_col0 + lane_idx % 4 * 2);
      }
      recompute_p(acc_s, smem.lse_log2[stage], lse, p.scale, row);
    };
    const auto compute_dp = [&](float (&acc_dp)[kScoreM][kScoreN][4]) {
      sm80::clear(acc_dp);
      sm80::warp_gemm<kHeadDim / kK>(acc_dp, sm80::KMajorA(smem.dout[stage], score_row0, lane_idx),
                                     v_operand);
    };
    float acc_p[kScoreM][kScoreN][4];
    if constexpr (!Config::kSplitScores) {
      compute_p(acc_p);
      wait_until_read();
      if (wants_dv) sm80::store_accumulator(smem.p, acc_p, score_row0, score_col0, lane_idx);
      sm80::warp_arrive(smem.p_ready, lane_idx);
      if (wants_ds) {
        float acc_dp[kScoreM][kScoreN][4];
        compute_dp(acc_dp);
        compute_ds(acc_dp, acc_p, smem.delta[stage], row);
        sm80::store_accumulator(smem.ds, acc_dp, score_row0, score_col0, lane_idx);
      }
    } else {
      // Half of the warps compute P, the other half dP and, with P from shared memory, dS.
      float acc_dp[kScoreM][kScoreN][4];
      if (computes_p) {
        compute_p(acc_p);
      } else if (wants_ds) {
        compute_dp(acc_dp);
      }
      wait_until_read();
      if (computes_p) sm80::store_accumulator(smem.p, acc_p, score_row0, score_col0, lane_idx);
      sm80::warp_arrive(smem.p_ready, lane_idx);
      if (!computes_p && wants_ds) {
        ptx::mbarrier_wait(smem.p_ready, it & 1);
        sm80::load_accumulator(acc_p, smem.p, score_row0, score_col0, lane_idx);
        compute_ds(acc_dp, acc_p, smem.delta[stage], row);
        sm80::store_accumulator(smem.ds, acc_dp, score_row0, score_col0, lane_idx);
      }
    }
    sm80::warp_arrive(smem.ds_ready, lane_idx);

    // Step 5.
    using sm80::KOrder;
    ptx::mbarrier_wait(smem.p_ready, it & 1);
    if (wants_dv) {
      sm80::warp_gemm<kBlockM / kK>(
          acc_dv,
          sm80::MNMajorA<typename Config::ScoreTile, KOrder::kPaired>(smem.p, kv_row0, lane_idx),
          sm80::MNMajorB<typename Config::QTile, KOrder::kPaired>(smem.dout[stage], kv_col0,
                                                                  lane_idx));
    }
    ptx::mbarrier_wait(smem.ds_ready, it & 1);
    if (wants_dk) {
      sm80::warp_gemm<kBlockM / kK>(
          acc_dk,
          sm80::MNMajorA<typename Config::ScoreTile, KOrder::kPaired>(smem.ds, kv_row0, lane_idx),
          sm80::MNMajorB<typename Config::QTile, KOrder::kPaired>(smem.q[stage], kv_col0,
                                                                  lane_idx));
    }
    if (kStages == 1) {
      __syncthreads();  // Q and dO are read; the next ones arrive behind the dQ product
      if (it + 1 < num_iterations) load_queries(at, next_stage);
    }

    // Step 6.
    if constexpr (kWithDq) {
      using Dq = DqTile<Config>;
      const Dq dq(warp_idx, lane_idx);
      float acc_dq[Dq::kM][Dq::kN][4];
      sm80::clear(acc_dq);
      const sm80::KMajorA ds_operand(smem.ds, dq.row0, lane_idx);
      sm80::warp_gemm<kBlockN / kK>(acc_dq, ds_operand,
                                    sm80::MNMajorB<typename Config::KVTile, KOrder::kNatural>(
                                        keys_for_dq<Config>(smem), dq.col0, lane_idx));
      const bool sums_rows = !Config::kCentresKeys && dq.col0 == 0;
      float row_sum[Dq::kM][2];
      if (sums_rows) row_sums<kBlockN / kK>(row_sum, ds_operand);
      sm80::warp_arrive(smem.read, lane_idx);
      const int64_t tile_row = head_row * p.padded_seqlen_q + m0;
      float* accum = p.dq_accum + tile_row * kHeadDim;
#pragma unroll
      for (int m = 0; m < Dq::kM; ++m) {
#pragma unroll
        for (int n = 0; n < Dq::kN; ++n) {
          const float (&acc)[4] = acc_dq[m][n];
          ptx::red_add_v4(accum + dq.offset(m, n), acc[0], acc[1], acc[2], acc[3]);
        }
      }
      if (sums_rows) {
#pragma unroll
        for (int m = 0; m < Dq::kM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = dq.row0 + 16 * m + 8 * half + lane_idx / 4;
            if (lane_idx % 4 == 0) ptx::red_add(p.dq_row_sum + tile_row + row, row_sum[m][half]);
          }
        }
      }
    } else {
      sm80::warp_arrive(smem.read, lane_idx);
    }
    stage = next_stage;
  }

  // Step 7.
  if (p.num_parts > 1) {
    // Everything is found again: held across the loop, it costs head_dim 128 12 bytes of spills.
    const TileOrder::Place tile = p.order.place(sm80::opaque(static_cast<int>(blockIdx.x)));
    const int thread = sm80::opaque(static_cast<int>(threadIdx.x));
    const int warp = thread / 32;
    const int row0 = tile.rank * kBlockN + warp / KVGrid::kCols * kKVM * 16;
    const int col0 = warp % KVGrid::kCols * kKVN * 8;
    const int64_t first = static_cast<int64_t>(tile.head) * seqlen_k * kHeadDim;
    if (wants_dk) store_part<kHeadDim>(p.dk_parts + first, acc_dk, row0, col0, seqlen_k, thread);
    if (wants_dv) store_part<kHeadDim>(p.dv_parts + first, acc_dv, row0, col0, seqlen_k, thread);
    return;
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kKVM; ++m)
#pragma unroll
    for (int n = 0; n < kKVN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc_dk[m][n][i] *= p.softmax_scale;
  sm80::store_accumulator(smem.k, acc_dk, kv_row0, kv_col0, lane_idx);
  sm80::store_accumulator(smem.v, acc_dv, kv_row0, kv_col0, lane_idx);
  __syncthreads();
  if (wants_dk) {
    sm80::store_tile<kNumThreads>(
        sm80::gmem_rows<Element>(p.dk, batch_idx, kv_head_idx, p.head_dim), smem.k, n0, seqlen_k,
        thread_idx);
  }
  if (wants_dv) {
    sm80::store_tile<kNumThreads>(
        sm80::gmem_rows<Element>(p.dv, batch_idx, kv_head_idx, p.head_dim), smem.v, n0, seqlen_k,
        thread_idx);
  }
}

}  // namespace flash_ext::backward
