// FlashAttention, Algorithm 1, as published. O, l and m of a whole (batch, head) pair lie in memory
// and O is normalised in every step:
//   for each batch and head (in parallel):
//     O = 0, l = 0, m = -inf
//     for each K/V block:
//       for each Q tile that sees a key of it:
//         load O, l, m
//         S = scale * Q K^T, masked; m' = max(m, rowmax S); P = exp(S - m')
//         l' = exp(m - m') l + rowsum P
//         O = (l exp(m - m') O + P V) / l'
//         store O, l = l', m = m'
//     out = O, LSE = m + log l
// The published form takes P against the block's own maximum and corrects it in the last line by
// exp(rowmax S - m'); taking it against m' is the same product.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cpu/forward_tile.h"

namespace flash_ext::cpu {

template <typename Scalar>
void forward_v1(const ForwardParams& params, TileShape tile) {
  using T = Accum<Scalar>;
  const AttentionShape& shape = params.shape;
  const int max_seqlen_q = static_cast<int>(shape.seqlen_q);
  const int block_m = clipped_block(tile.block_m, shape.seqlen_q);
  const int block_n = clipped_block(tile.block_n, shape.seqlen_k);
  const int head_dim = static_cast<int>(shape.head_dim);
  const TileList heads{shape.batch, shape.heads_q, max_seqlen_q, std::max(max_seqlen_q, 1)};
  const int64_t work = shape.seqlen_q * shape.seqlen_k * head_dim;

  at::parallel_for(0, heads.size(), parallel_grain(work), [&](int64_t begin, int64_t end) {
    ForwardTile<Scalar> step(params, block_m, block_n);
    Tile<T> o(max_seqlen_q, head_dim);
    Lanes<T> row_max(max_seqlen_q), row_sum(max_seqlen_q);
    Lanes<T> tile_max(block_m), factor(block_m);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch_idx = heads[i].batch_idx;
      const int64_t head_idx = heads[i].head_idx;
      const ScoreRule<T>& rule = step.select(batch_idx, head_idx);
      const Sequence& sequence = rule.sequence();
      const int seqlen_q = sequence.seqlen_q;
      o.fill(T{0});
      begin_rows(rule.sink(), &row_max, &row_sum);

      for (int key0 = 0; key0 < sequence.seqlen_k; key0 += block_n) {
        const int keys = std::min(block_n, sequence.seqlen_k - key0);
        step.load_keys_values(key0, keys);
        const BlockRange blocks = query_blocks(rule.band(), key0, key0 + keys - 1, block_m);
        for (int m_block = blocks.begin; m_block < blocks.end; ++m_block) {
          const int row0 = m_block * block_m;
          const int rows = std::min(block_m, seqlen_q - row0);
          if (rule.hides(row0, rows, key0, keys)) continue;
          step.load_queries(row0, rows);
          std::copy_n(&row_max[row0], rows, tile_max.data());
          step.update_probabilities(tile_max.data());
          std::copy_n(tile_max.data(), rows, &row_max[row0]);

          for (int r = 0; r < rows; ++r) {
            factor[r] = row_sum[row0 + r] * step.rescale()[r];
            row_sum[row0 + r] = factor[r] + step.block_sum()[r];
          }
          step.scale_output(factor.data(), o.row(row0), o.ld);
          step.add_weighted_values(o.row(row0), o.ld);
          for (int r = row0; r < row0 + rows; ++r) divide_row(o.row(r), head_dim, row_sum[r]);
        }
      }

      store_rows<Scalar>(params.out, batch_idx, head_idx, sequence.q_begin, seqlen_q, head_dim, o);
      store_lse(params, sequence, batch_idx, head_idx, 0, seqlen_q, row_max.data(), row_sum.data());
    }
  });
}

template void forward_v1<float>(const ForwardParams&, TileShape);
template void forward_v1<double>(const ForwardParams&, TileShape);
template void forward_v1<c10::Half>(const ForwardParams&, TileShape);
template void forward_v1<c10::BFloat16>(const ForwardParams&, TileShape);

}  // namespace flash_ext::cpu
