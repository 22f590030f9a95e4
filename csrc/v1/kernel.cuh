// v1 forward: Algorithm 1 of FlashAttention (Dao et al. 2022, arXiv 2205.14135) as published, on
// mma.sync. One thread block per (batch, head). Line numbers are the paper's:
//    2. O = 0, l = 0, m = -inf in HBM
//    5. for every K/V block j:
//    6.   load K_j, V_j
//    7.   for every Q block i:
//    8.     load Q_i, O_i, l_i, m_i
//    9.     S = Q_i K_j^T
//   10.     m~ = rowmax(S), P~ = exp(S - m~), l~ = rowsum(P~)
//   11.     m_new = max(m_i, m~), l_new = e^(m_i - m_new) l_i + e^(m~ - m_new) l~
//   12.     O_i = diag(l_new)^-1 (diag(l_i) e^(m_i - m_new) O_i + e^(m~ - m_new) P~ V_j)
//   13.     l_i = l_new, m_i = m_new
//
// Each warp computes a slice of S's columns, so line 10 needs the other warps' maxima and line 12
// the sum of their products: both go through shared memory. That, the round trip of O through HBM,
// and the single thread block per head are what v2 does away with.
#pragma once

#include <algorithm>

#include "common/block_range.h"
#include "common/online_softmax.cuh"
#include "params.h"
#include "sm80/copy_tile.cuh"
#include "sm80/warp_gemm.cuh"
#include "v1/config.cuh"

namespace flash_ext::v1 {

struct KernelParams {
  TensorView q, k, v, out;
  float* lse;
  Mask mask;
  SoftmaxScale scale;
  int head_dim;
  int heads_q;
  int group_size;
  // The state in HBM, see v1_workspace_floats().
  float* o;
  float* l;
  float* m;
};

// O, l and m of one head.
struct State {
  float* o;
  float* l;
  float* m;
};

// Line 2.
template <typename Config>
__device__ __forceinline__ void initialize(const State& state, int seqlen_q, int thread_idx) {
  float4* o = reinterpret_cast<float4*>(state.o);
  for (int64_t i = thread_idx; i < static_cast<int64_t>(seqlen_q) * (Config::kHeadDim / 4);
       i += Config::kNumThreads) {
    o[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  }
  for (int row = thread_idx; row < seqlen_q; row += Config::kNumThreads) {
    state.l[row] = 0.f;
    state.m[row] = -INFINITY;
  }
}

// Line 10, this warp's rows and columns: S becomes P~ relative to the row maximum of all slices;
// the slice's maxima and its share of l~ stay in shared memory. `row0`: the thread's first row of
// the tile.
template <typename Config, int kM, int kN>
__device__ __forceinline__ void softmax_block(typename Config::SharedStorage& smem,
                                              float (&acc_s)[kM][kN][4], float scale_log2,
                                              int slice, int row0, int lane_idx) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float row_max = -INFINITY;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        row_max = fmaxf(row_max, fmaxf(acc_s[m][n][2 * half], acc_s[m][n][2 * half + 1]));
      }
      row_max = quad_max(row_max);
      if (lane_idx % 4 == 0) smem.partial_max[slice][row0 + 16 * m + 8 * half] = row_max;
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 16 * m + 8 * half;
      float row_max = smem.partial_max[0][row];
#pragma unroll
      for (int w = 1; w < Config::kKeyWarps; ++w)
        row_max = fmaxf(row_max, smem.partial_max[w][row]);
      const ExponentBase base(row_max, scale_log2);
      float row_sum = 0.f;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& s = acc_s[m][n][2 * half + i];
          s = ptx::exp2_approx(__fmaf_rn(s - base.shift, scale_log2, -base.max_log2));
          row_sum += s;
        }
      }
      row_sum = quad_sum(row_sum);
      if (lane_idx % 4 == 0) smem.partial_sum[slice][row] = row_sum;
    }
  }
}

// Line 8 for l and m: one thread a row, early, so that the trip to memory is over when lines 11 to
// 13 need them.
template <typename Config>
struct RowState {
  static_assert(Config::kBlockM <= Config::kNumThreads, "one thread a row");
  int row;  // of the tile; kBlockM for threads without one
  float old_max;
  float old_sum;

  __device__ __forceinline__ RowState(const State& state, int m0, int seqlen_q, int thread_idx)
      : row(thread_idx < Config::kBlockM && m0 + thread_idx < seqlen_q ? thread_idx
                                                                       : Config::kBlockM) {
    if (row == Config::kBlockM) return;
    old_max = state.m[m0 + row];
    old_sum = state.l[m0 + row];
  }

  // Lines 11 and 13, and the two factors of line 12, which take the place of the first slice's
  // maximum and sum.
  __device__ __forceinline__ void update(typename Config::SharedStorage& smem, const State& state,
                                         int m0, float scale_log2) const {
    if (row == Config::kBlockM) return;
    float block_max = smem.partial_max[0][row];
    float block_sum = smem.partial_sum[0][row];
#pragma unroll
    for (int w = 1; w < Config::kKeyWarps; ++w) {
      block_max = fmaxf(block_max, smem.partial_max[w][row]);
      block_sum += smem.partial_sum[w][row];
    }
    const float new_max = fmaxf(old_max, block_max);
    const ExponentBase base(new_max, scale_log2);
    const float rescaled_sum = base.rescale(old_max, scale_log2) * old_sum;
    const float block_factor = base.rescale(block_max, scale_log2);
    const float new_sum = rescaled_sum + block_factor * block_sum;
    const float inverse = inverse_sum(new_sum);
    smem.partial_max[0][row] = rescaled_sum * inverse;
    smem.partial_sum[0][row] = block_factor * inverse;
    state.l[m0 + row] = new_sum;
    state.m[m0 + row] = new_max;
  }
};

// The rows of O_i that are joined together, 16 of each row warp, as float4s spread over the thread
// block. A thread holds few of them at a time: the warp's product of the same rows takes up to half
// of its registers.
template <typename Config>
struct OutputRows {
  static constexpr int kRowVectors = Config::kHeadDim / 4;
  static constexpr int kVectors = Config::kJoinRows * kRowVectors / Config::kNumThreads;
  static constexpr int kHeld = kVectors < 4 ? kVectors : 4;

  const State& state;
  int m0, slab, seqlen_q, thread_idx;
  float4 old[kHeld];

  __device__ __forceinline__ int join_row(int i) const {
    return (thread_idx + i * Config::kNumThreads) / kRowVectors;
  }
  __device__ __forceinline__ int row(int i) const {  // of the tile
    return join_row(i) / 16 * Config::kWarpRows + slab * 16 + join_row(i) % 16;
  }
  __device__ __forceinline__ int col(int i) const {
    return (thread_idx + i * (Config::kNumThreads % kRowVectors)) % kRowVectors * 4;
  }
  __device__ __forceinline__ float4* address(int i) const {
    return reinterpret_cast<float4*>(state.o +
                                     static_cast<int64_t>(m0 + row(i)) * Config::kHeadDim + col(i));
  }

  // Line 8 for O: starts reading the vectors from `first` on.
  __device__ __forceinline__ void load(int first) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (m0 + row(first + i) < seqlen_q) old[i] = *address(first + i);
    }
  }

  // Line 12: joins the warps' products and writes O back. The first vectors are already here.
  __device__ __forceinline__ void update(const typename Config::SharedStorage& smem) {
// Where one warp joins all of a wide O, ptxas would spill up to 212 bytes.
#pragma unroll(kVectors >= 16 ? 1 : kVectors)
    for (int first = 0; first < kVectors; first += kHeld) {
      if (first > 0) load(first);
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int r = row(first + i);
        if (m0 + r >= seqlen_q) continue;
        float4 pv = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < Config::kKeyWarps; ++w) {
          const float4 x = *reinterpret_cast<const float4*>(
              &smem.partial_o[w][join_row(first + i)][col(first + i)]);
          pv = make_float4(pv.x + x.x, pv.y + x.y, pv.z + x.z, pv.w + x.w);
        }
        const float a = smem.partial_max[0][r];
        const float b = smem.partial_sum[0][r];
        *address(first + i) = make_float4(a * old[i].x + b * pv.x, a * old[i].y + b * pv.y,
                                          a * old[i].z + b * pv.z, a * old[i].w + b * pv.w);
      }
    }
  }
};

// Leaves O in the tensor's type and L = m + log l.
template <typename Config>
__device__ __forceinline__ void finish(const State& state,
                                       const sm80::GmemRows<typename Config::Element>& out,
                                       float* lse, int seqlen_q, float scale_natural,
                                       int thread_idx) {
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kRowThreads = std::min(kHeadDim / 4, Config::kNumThreads);
  const int first_col = thread_idx % kRowThreads * 4;
#pragma unroll 8
  for (int row = thread_idx / kRowThreads; row < seqlen_q;
       row += Config::kNumThreads / kRowThreads) {
#pragma unroll
    for (int col = first_col; col < kHeadDim; col += kRowThreads * 4) {
      const float4 o =
          *reinterpret_cast<const float4*>(state.o + static_cast<int64_t>(row) * kHeadDim + col);
      const float values[4] = {o.x, o.y, o.z, o.w};
      auto* to = out.data + row * out.row_stride + col;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (col + i < out.num_cols) to[i] = from_float<typename Config::Element>(values[i]);
      }
    }
  }
  for (int row = thread_idx; row < seqlen_q; row += Config::kNumThreads) {
    lse[row] = log_sum_exp(state.m[row] * scale_natural, state.l[row]);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kNumThreads, Config::kMinBlocks)
    forward_kernel(const __grid_constant__ KernelParams p) {
  using Element = typename Config::Element;
  constexpr int kBlockM = Config::kBlockM;
  constexpr int kBlockN = Config::kBlockN;
  constexpr int kHeadDim = Config::kHeadDim;
  constexpr int kNumThreads = Config::kNumThreads;
  constexpr int kStepsD = kHeadDim / sm80::kMmaK;
  using VOperand = sm80::MNMajorB<typename Config::KVTile, sm80::KOrder::kPaired>;
  extern __shared__ __align__(128) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(smem_bytes);

  const int thread_idx = threadIdx.x;
  const int lane_idx = thread_idx % 32;
  const int slice = thread_idx / 32 % Config::kKeyWarps;
  const int row_warp = thread_idx / 32 / Config::kKeyWarps;
  const int warp_col0 = slice * Config::kWarpCols;
  const int warp_row0 = row_warp * Config::kWarpRows;
  const int batch_idx = blockIdx.x / p.heads_q;
  const int head_idx = blockIdx.x % p.heads_q;
  const int kv_head_idx = head_idx / p.group_size;
  const int seqlen_q = p.mask.seqlen_q;
  const int seqlen_k = p.mask.seqlen_k;
  const auto q_gmem = sm80::gmem_rows<Element>(p.q, batch_idx, head_idx, p.head_dim);
  const auto k_gmem = sm80::gmem_rows<Element>(p.k, batch_idx, kv_head_idx, p.head_dim);
  const auto v_gmem = sm80::gmem_rows<Element>(p.v, batch_idx, kv_head_idx, p.head_dim);
  const int64_t row_base = static_cast<int64_t>(blockIdx.x) * seqlen_q;
  const State state{p.o + row_base * kHeadDim, p.l + row_base, p.m + row_base};

  initialize<Config>(state, seqlen_q, thread_idx);
  for (int n0 = 0; n0 < seqlen_k; n0 += kBlockN) {
    const BlockRange blocks = query_blocks(p.mask, n0, kBlockM);
    auto load_q = [&](int m_block) {
      sm80::load_tile<kNumThreads>(smem.q[m_block % 2], q_gmem, m_block * kBlockM, seqlen_q,
                                   thread_idx);
      ptx::cp_async_commit_group();
    };
    __syncthreads();  // the previous K, V and O are done with
    sm80::load_tile<kNumThreads>(smem.k, k_gmem, n0, seqlen_k, thread_idx);
    sm80::load_tile<kNumThreads>(smem.v, v_gmem, n0, seqlen_k, thread_idx);
    if (blocks.begin < blocks.end) load_q(blocks.begin);

    for (int m_block = blocks.begin; m_block < blocks.end; ++m_block) {
      const int m0 = m_block * kBlockM;
      ptx::cp_async_wait_group<0>();
      __syncthreads();  // Q_i has arrived; the previous step's shared memory is done with
      if (m_block + 1 < blocks.end) load_q(m_block + 1);
      const RowState<Config> rows(state, m0, seqlen_q, thread_idx);

      float acc_s[Config::kWarpRows / 16][Config::kWarpCols / 8][4];
      sm80::clear(acc_s);
      sm80::warp_gemm<kStepsD>(acc_s, sm80::KMajorA(smem.q[m_block % 2], warp_row0, lane_idx),
                               sm80::KMajorB(smem.k, warp_col0, lane_idx));
      p.scale.apply_sign(acc_s);
      if (!block_is_full(p.mask, m0, n0, kBlockN)) {
        apply_mask(acc_s, p.mask, m0 + warp_row0 + lane_idx / 4, n0 + warp_col0 + lane_idx % 4 * 2);
      }
      softmax_block<Config>(smem, acc_s, p.scale.log2, slice, warp_row0 + lane_idx / 4, lane_idx);
#pragma unroll
      for (int slab = 0; slab < Config::kWarpRows / 16; ++slab) {
        OutputRows<Config> output{state, m0, slab, seqlen_q, thread_idx};
        output.load(0);
        float acc_o[1][kHeadDim / 8][4];
        sm80::clear(acc_o);
        sm80::warp_gemm<Config::kWarpCols / sm80::kMmaK>(
            acc_o,
            sm80::accumulator_a<Element>(
                reinterpret_cast<const float (&)[1][Config::kWarpCols / 8][4]>(acc_s[slab])),
            VOperand(smem.v, 0, lane_idx, warp_col0));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* row = smem.partial_o[slice][row_warp * 16 + 8 * half + lane_idx / 4];
#pragma unroll
          for (int n = 0; n < kHeadDim / 8; ++n) {
            store_pair(row + 8 * n + lane_idx % 4 * 2, acc_o[0][n][2 * half],
                       acc_o[0][n][2 * half + 1]);
          }
        }
        __syncthreads();  // the warps' products, maxima and sums are complete
        if (slab == 0) {
          rows.update(smem, state, m0, p.scale.log2);
          __syncthreads();
        }
        output.update(smem);
        if (slab + 1 < Config::kWarpRows / 16) __syncthreads();  // partial_o is read
      }
    }
  }
  __syncthreads();
  finish<Config>(state, sm80::gmem_rows<Element>(p.out, batch_idx, head_idx, p.head_dim),
                 p.lse + row_base, seqlen_q, p.scale.natural, thread_idx);
}

}  // namespace flash_ext::v1
