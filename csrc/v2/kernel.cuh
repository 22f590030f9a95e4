// v2 forward: Algorithm 1 of FlashAttention-2 (Dao 2023, arXiv 2307.08691) on mma.sync.
//
// One thread block owns a tile of query rows and walks over the K/V blocks; each warp owns whole
// rows, so no warp needs another's maximum or sum on the way.
//   1. load Q, start K_0
//   2. for every visible K/V block j:
//   3.   S = Q K_j^T             meanwhile V_j arrives
//   4.   mask S if the block lies on an edge
//   5.   m, l, P = online softmax; O rescaled, never normalised
//   6.   O += P V_j              meanwhile, or with room for two of each from step 3 on, K_j+1
//   7. where the warps share the keys: join their O, m and l
//   8. O / l, L = m + log l; O leaves through shared memory in 16-byte stores. Where the keys are
//      split: O / l, m and l to the workspace, in fp32, to be merged
#pragma once

#include "common/block_range.h"
#include "common/merge_shares.cuh"
#include "common/online_softmax.cuh"
#include "common/tile_order.cuh"
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
  Divisor heads_q;
  Divisor group_size;
  TileOrder order;
  Shares shares;  // where the keys are split
  int num_splits;
  Divisor num_tiles;  // of one share
};

// What plain attention does to the scores of a K/V block; GeneralScores' counterpart.
template <typename Config>
struct PlainScores {
  const KernelParams& p;
  int m0;  // the query tile's first row
  int n0;  // the block's first key

  // `row`, `col`: the warp's first in the tile and the block.
  template <int kM, int kN>
  __device__ __forceinline__ void apply(float (&acc_s)[kM][kN][4], int row, int col,
                                        int lane_idx) const {
    p.scale.apply_sign(acc_s);
    if (!block_is_full(p.mask, m0, n0, Config::kBlockN)) {
      apply_mask(acc_s, p.mask, m0 + row + lane_idx / 4, n0 + col + lane_idx % 4 * 2);
    }
  }
  __device__ __forceinline__ float scale_log2() const { return p.scale.log2; }
  template <int kM, int kN>
  __device__ __forceinline__ void drop(float (&)[kM][kN][4], int, int, int) const {}
};

// A warp's place in the tile and its state on the walk over K/V.
template <typename Config>
struct WarpTile {
  using Element = typename Config::Element;
  using KVTile = typename Config::KVTile;
  using SharedStorage = typename Config::SharedStorage;
  static constexpr int kM = Config::kWarpRows / 16;
  static constexpr int kNS = Config::kWarpKeys / 8;
  static constexpr int kNO = Config::kHeadDim / 8;
  static constexpr int kStepsD = Config::kHeadDim / sm80::kMmaK;

  int lane_idx;
  int row0;       // this warp's first row of the tile
  int key_group;  // 0 unless the warps share the keys
  float acc_o[kM][kNO][4];
  OnlineSoftmax<kM> softmax;

  __device__ __forceinline__ explicit WarpTile(int thread_idx)
      : lane_idx(thread_idx % 32),
        row0(thread_idx / 32 % Config::kRowWarps * Config::kWarpRows),
        key_group(thread_idx / 32 / Config::kRowWarps) {
    sm80::clear(acc_o);
  }

  // Steps 3 to 6 for the thread block's `n_block`-th K/V block. `load_next_k` is called where this
  // block's K is read.
  template <typename Scores, typename Load>
  __device__ __forceinline__ void step(SharedStorage& smem, const Scores& scores, int n_block,
                                       Load load_next_k) {
    const int key0 = key_group * Config::kWarpKeys;
    const int stage = n_block % Config::kStages;
    const int parity = n_block / Config::kStages & 1;
    float acc_s[kM][kNS][4];
    sm80::clear(acc_s);
    ptx::mbarrier_wait(smem.k_full[stage], parity);
    sm80::warp_gemm<kStepsD>(acc_s, sm80::KMajorA(smem.q, row0, lane_idx),
                             sm80::KMajorB(smem.k[stage], key0, lane_idx));
    // Here, not between the exponentials and their product: ptxas then spills 80 bytes at d=64.
    ptx::mbarrier_wait(smem.v_full[stage], parity);
    sm80::warp_arrive(smem.k_read, lane_idx);
    scores.apply(acc_s, row0, key0, lane_idx);
    softmax.update(acc_s, acc_o, scores.scale_log2());
    scores.drop(acc_s, row0, key0, lane_idx);
    if constexpr (Config::kStages == 1) {
      ptx::mbarrier_wait(smem.k_read, parity);
      load_next_k();
    }
    sm80::warp_gemm<Config::kWarpKeys / sm80::kMmaK>(
        acc_o, sm80::accumulator_a<Element>(acc_s),
        sm80::MNMajorB<KVTile, sm80::KOrder::kPaired>(smem.v[stage], 0, lane_idx, key0));
    if constexpr (Config::kStages == 1) sm80::warp_arrive(smem.v_read, lane_idx);
  }

  // Step 7: group 0 takes over what the others have summed. They leave it in the order of their
  // threads, which is group 0's too.
  __device__ __forceinline__ void join_key_groups(typename Config::SharedStorage& smem,
                                                  float scale_log2) {
    constexpr int kGroupThreads = Config::kRowWarps * 32;
    constexpr int kVectors = kM * kNO + kM;  // O, then m and l
    auto* shared =
        reinterpret_cast<float4*>(smem.k[0].bytes()) + row0 / Config::kWarpRows * 32 + lane_idx;
    __syncthreads();  // nobody reads K and V any more
    if (key_group > 0) {
      float4* to = shared + (key_group - 1) * kVectors * kGroupThreads;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kNO; ++n) {
          const float (&o)[4] = acc_o[m][n];
          to[(m * kNO + n) * kGroupThreads] = make_float4(o[0], o[1], o[2], o[3]);
        }
        to[(kM * kNO + m) * kGroupThreads] =
            make_float4(softmax.row_max[m][0], softmax.row_max[m][1], softmax.row_sum[m][0],
                        softmax.row_sum[m][1]);
      }
    }
    __syncthreads();
    if (key_group > 0) return;
#pragma unroll 1
    for (int group = 1; group < Config::kKeyGroups; ++group) {
      const float4* from = shared + (group - 1) * kVectors * kGroupThreads;
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const float4 stats = from[(kM * kNO + m) * kGroupThreads];
        const float2 rescale0 = softmax.join_row(m, 0, stats.x, stats.z, scale_log2);
        const float2 rescale1 = softmax.join_row(m, 1, stats.y, stats.w, scale_log2);
#pragma unroll
        for (int n = 0; n < kNO; ++n) {
          const float4 o = from[(m * kNO + n) * kGroupThreads];
          float (&acc)[4] = acc_o[m][n];
          acc[0] = acc[0] * rescale0.x + o.x * rescale0.y;
          acc[1] = acc[1] * rescale0.x + o.y * rescale0.y;
          acc[2] = acc[2] * rescale1.x + o.z * rescale1.y;
          acc[3] = acc[3] * rescale1.x + o.w * rescale1.y;
        }
      }
    }
  }

  // Step 8, after the softmax is final: L to memory, O to shared memory in Q's place; each warp
  // overwrites only its own rows.
  __device__ __forceinline__ void store(typename Config::SharedStorage& smem, float* lse, int m0,
                                        int seqlen_q) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m0 + row0 + 16 * m + 8 * half + lane_idx / 4;
        if (lane_idx % 4 == 0 && row < seqlen_q) lse[row] = softmax.row_max[m][half];
      }
    }
    __syncwarp();
    sm80::store_accumulator(smem.q, acc_o, row0, 0, lane_idx);
  }

  // The same for a share of the keys. `head_row`: the tile's first row among the rows of all heads,
  // of one share after another; `rows`: how many there are of the tile's.
  __device__ __forceinline__ void store_share(const Shares& shares, int64_t head_row, int rows) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(softmax.row_sum[m][half]);
        const float inverse = inverse_sum(sum);
        const int row = row0 + 16 * m + 8 * half + lane_idx / 4;
        if (row >= rows) continue;
        if (lane_idx % 4 == 0) {
          shares.stats[head_row + row] = make_float2(softmax.row_max[m][half], sum);
        }
        float* const out = shares.out + (head_row + row) * Config::kHeadDim + lane_idx % 4 * 2;
#pragma unroll
        for (int n = 0; n < kNO; ++n) {
          const float* o = &acc_o[m][n][2 * half];
          *reinterpret_cast<float2*>(out + 8 * n) = make_float2(o[0] * inverse, o[1] * inverse);
        }
      }
    }
  }
};

// The queries of a thread block, and which share of their keys.
struct QueryTile {
  int split;
  int batch_head;  // batch_idx * heads_q + head_idx
  int batch_idx;
  int head_idx;
  int m0;  // the first row

  template <bool kSplitsKeys>
  static __device__ __forceinline__ QueryTile at(const KernelParams& p, int block_m,
                                                 int block_idx) {
    QueryTile tile;
    tile.split = kSplitsKeys ? block_idx / p.num_tiles : 0;
    const TileOrder::Place place = p.order.place(block_idx - tile.split * p.num_tiles);
    tile.batch_head = place.head;
    tile.batch_idx = tile.batch_head / p.heads_q;
    tile.head_idx = tile.batch_head % p.heads_q;
    // Causal tiles grow with the row.
    tile.m0 = (p.order.tiles_per_head() - 1 - place.rank) * block_m;
    return tile;
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kNumThreads, 1)
    forward_kernel(const __grid_constant__ KernelParams p) {
  using Element = typename Config::Element;
  constexpr int kBlockM = Config::kBlockM;
  constexpr int kBlockN = Config::kBlockN;
  constexpr int kNumThreads = Config::kNumThreads;
  extern __shared__ __align__(128) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(smem_bytes);

  const int thread_idx = threadIdx.x;
  const auto tile = QueryTile::at<Config::kSplitsKeys>(p, kBlockM, blockIdx.x);
  const int m0 = tile.m0;
  const int kv_head_idx = tile.head_idx / p.group_size;
  const int seqlen_q = p.mask.seqlen_q;
  const int seqlen_k = p.mask.seqlen_k;

  const bool copies_are_async =
      Config::kAligned || (p.q.aligned16 && p.k.aligned16 && p.v.aligned16);
  // Found anew for every copy: two pointers held across the loop would spill 28 bytes at d=128.
  const auto rows_of = [&](const TensorView& view) {
    return sm80::gmem_rows<Element>(view, tile.batch_idx, sm80::opaque(kv_head_idx), p.head_dim);
  };
  const BlockRange all_blocks = key_blocks(p.mask, m0, kBlockM, kBlockN);
  BlockRange blocks = all_blocks;
  if constexpr (Config::kSplitsKeys) {
    blocks = split_blocks(all_blocks.end, tile.split, p.num_splits);
    if (thread_idx == 0) smem.share = blocks;  // read anew where needed, for want of registers
  }
  const auto first_block = [&] { return Config::kSplitsKeys ? smem.share.begin : 0; };
  const auto past_last = [&] { return Config::kSplitsKeys ? smem.share.end : all_blocks.end; };
  const auto load_k = [&](int n_block) {
    const int stage = n_block % Config::kStages;
    sm80::load_tile<kNumThreads, Config::kAligned>(
        smem.k[stage], rows_of(p.k), (first_block() + n_block) * kBlockN, seqlen_k, thread_idx);
    sm80::arrive_when_copied(smem.k_full[stage], copies_are_async);
  };
  const auto load_v = [&](int n_block) {
    const int stage = n_block % Config::kStages;
    sm80::load_tile<kNumThreads, Config::kAligned>(
        smem.v[stage], rows_of(p.v), (first_block() + n_block) * kBlockN, seqlen_k, thread_idx);
    sm80::arrive_when_copied(smem.v_full[stage], copies_are_async);
  };

  WarpTile<Config> warp(thread_idx);
  if (blocks.begin < blocks.end) {
    if (thread_idx == 0) {
#pragma unroll
      for (int stage = 0; stage < Config::kStages; ++stage) {
        ptx::mbarrier_init(smem.k_full[stage], kNumThreads);
        ptx::mbarrier_init(smem.v_full[stage], kNumThreads);
      }
      ptx::mbarrier_init(smem.k_read, Config::kNumWarps);
      ptx::mbarrier_init(smem.v_read, Config::kNumWarps);
    }
    sm80::load_tile<kNumThreads, Config::kAligned>(
        smem.q, sm80::gmem_rows<Element>(p.q, tile.batch_idx, tile.head_idx, p.head_dim), m0,
        seqlen_q, thread_idx);
    __syncthreads();  // the barriers are initialised
    load_k(0);
    load_v(0);
    for (int n_block = 0; first_block() + n_block < past_last(); ++n_block) {
      const auto load_next_k = [&] {
        if (first_block() + n_block + 1 < past_last()) load_k(n_block + 1);
      };
      if (n_block > 0) {
        auto& read = Config::kStages > 1 ? smem.k_read : smem.v_read;
        ptx::mbarrier_wait(read, (n_block - 1) & 1);
        load_v(n_block);
      }
      if (Config::kStages > 1) load_next_k();
      const PlainScores<Config> scores{p, m0, (first_block() + n_block) * kBlockN};
      warp.step(smem, scores, n_block, load_next_k);
    }
  }
  if constexpr (Config::kKeyGroups > 1) warp.join_key_groups(smem, p.scale.log2);
  // The tile's place anew: what is not held across the loop leaves registers to the products.
  const auto done = QueryTile::at<Config::kSplitsKeys>(p, kBlockM, sm80::opaque(blockIdx.x));
  if constexpr (Config::kSplitsKeys) {
    if (warp.key_group > 0) return;
    const int64_t share_head = int64_t{done.split} * p.order.num_heads() + done.batch_head;
    warp.store_share(p.shares, share_head * seqlen_q + done.m0, seqlen_q - done.m0);
    return;
  }
  if (warp.key_group == 0) {
    warp.softmax.finalize(warp.acc_o, p.scale.natural);
    warp.store(smem, p.lse + static_cast<int64_t>(done.batch_head) * seqlen_q, done.m0, seqlen_q);
  }
  __syncthreads();
  sm80::store_tile<kNumThreads, Config::kAligned>(
      sm80::gmem_rows<Element>(p.out, done.batch_idx, done.head_idx, p.head_dim), smem.q, done.m0,
      seqlen_q, thread_idx);
}

}  // namespace flash_ext::v2
