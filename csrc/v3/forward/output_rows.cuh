// What a warp writes of a tile's rows: L, and O where it does not leave through shared memory.
#pragma once

#include "sm90/store_rows.cuh"
#include "v3/forward/config.cuh"

namespace flash_ext::v3::forward {

template <typename Config>
struct OutputRows {
  using Element = typename Config::Element;
  using WarpgroupTile = typename Config::WarpgroupTile;
  static constexpr int kTilesO = Config::kHeadDim / 8;

  const typename Config::Params& p;
  int warp_idx;  // in its warpgroup
  int lane_idx;

  // 1 / l, and L = m + log l or, where the keys are split, m and l.
  __device__ __forceinline__ void finish(float (&inverse_sums)[2], const WarpgroupTile& tile,
                                         const typename Config::Softmax& softmax,
                                         const typename Config::Dropout& dropout) const {
    float* const lse = p.lse + head_row(tile);
    float2* const stats = p.shares.stats + head_row(tile);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = quad_sum(softmax.row_sum[half]) * dropout.sum_factor();
      float max = softmax.row_max[half] * p.scale.natural;
      float own_factor = 1.f;
      if constexpr (Config::kIsGeneral) own_factor = join_sink(tile.sink, max, sum);
      own_factor *= dropout.out_factor();
      inverse_sums[half] = sum > 0.f ? own_factor * ptx::rcp_approx(sum) : 0.f;
      const int row = tile.row0 + 16 * warp_idx + lane_idx / 4 + 8 * half;
      if (lane_idx % 4 == 0 && row < num_rows(tile)) {
        if (Config::kSplitsKeys) {
          stats[row] = make_float2(softmax.row_max[half], sum);
        } else {
          lse[row] = log_sum_exp(max, sum);
        }
      }
    }
  }

  __device__ __forceinline__ void store(const WarpgroupTile& tile, float (&acc_o)[kTilesO][4],
                                        const float (&inverse_sums)[2]) const {
#pragma unroll
    for (int n = 0; n < kTilesO; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc_o[n][i] *= inverse_sums[i / 2];
    }
    const int row0 = tile.row0 + 16 * warp_idx;
    auto* const out = static_cast<Element*>(p.out.data) + tile.batch_idx * p.out.batch_stride +
                      tile.head_idx * p.out.head_stride + row0 * p.out.row_stride;
    sm90::store_rows(out, p.out.row_stride, p.mask.seqlen_q - row0, p.head_dim, acc_o, 1.f,
                     lane_idx);
  }

  // In fp32, to be merged with the other shares.
  __device__ __forceinline__ void store_share(const WarpgroupTile& tile,
                                              const float (&acc_o)[kTilesO][4],
                                              const float (&inverse_sums)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.row0 + 16 * warp_idx + lane_idx / 4 + 8 * half;
      if (row >= p.mask.seqlen_q) continue;
      float* const out = p.shares.out + (head_row(tile) + row) * Config::kHeadDim;
#pragma unroll
      for (int n = 0; n < kTilesO; ++n) {
        *reinterpret_cast<float2*>(out + 8 * n + lane_idx % 4 * 2) = make_float2(
            acc_o[n][2 * half] * inverse_sums[half], acc_o[n][2 * half + 1] * inverse_sums[half]);
      }
    }
  }

  // The warpgroup's rows see none of the tile's share of the keys.
  __device__ __forceinline__ void note_empty_share(const WarpgroupTile& tile) const {
    const int thread_idx = threadIdx.x % 128;
    const int row = tile.row0 + thread_idx;
    if (thread_idx < kRowsPerWarpgroup && row >= 0 && row < p.mask.seqlen_q) {
      p.shares.stats[head_row(tile) + row] = make_float2(-INFINITY, 0.f);
    }
  }

 private:
  // Where the tile's rows begin among the rows of all heads, of one share of the keys after
  // another.
  __device__ __forceinline__ int64_t head_row(const WarpgroupTile& tile) const {
    if constexpr (Config::kIsGeneral) {
      return p.sequences.lse_index({tile.q_begin}, tile.batch_idx, tile.head_idx,
                                   p.schedule.heads_q, 0);
    }
    const int64_t batch_head = int64_t{tile.batch_idx} * p.schedule.heads_q + tile.head_idx;
    const int64_t before =
        Config::kSplitsKeys ? int64_t{tile.split} * p.schedule.order.num_heads : 0;
    return (before + batch_head) * p.mask.seqlen_q;
  }

  // Of the tile's sequence.
  __device__ __forceinline__ int num_rows(const WarpgroupTile& tile) const {
    if constexpr (Config::kIsGeneral) return tile.seqlen_q;
    return p.mask.seqlen_q;
  }
};

}  // namespace flash_ext::v3::forward
