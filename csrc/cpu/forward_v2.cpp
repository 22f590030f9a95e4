// FlashAttention-2, Algorithm 1, on tiles of Q:
//   for each batch, head and Q tile (in parallel):
//     O = 0, l = 0, m = -inf
//     for each K/V block with a key that the tile sees:
//       S = scale * Q K^T, biased and masked; m' = max(m, rowmax S); P = exp(S - m')
//       l = exp(m - m') l + rowsum P
//       O = exp(m - m') O + P V           unnormalised
//     out = O / l, LSE = m + log l
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cpu/forward_tile.h"

namespace flash_ext::cpu {

template <typename Scalar>
void forward_v2(const ForwardParams& params, TileShape tile) {
  using T = Accum<Scalar>;
  const AttentionShape& shape = params.shape;
  const int block_m = clipped_block(tile.block_m, shape.seqlen_q);
  const int block_n = clipped_block(tile.block_n, shape.seqlen_k);
  const int head_dim = static_cast<int>(shape.head_dim);
  const TileList query_tiles{shape.batch, shape.heads_q, static_cast<int>(shape.seqlen_q), block_m};
  const int64_t work = block_m * shape.seqlen_k * head_dim;

  at::parallel_for(0, query_tiles.size(), parallel_grain(work), [&](int64_t begin, int64_t end) {
    ForwardTile<Scalar> step(params, block_m, block_n);
    Tile<T> acc_o(block_m, head_dim);
    Lanes<T> row_max(block_m), row_sum(block_m);
    for (int64_t i = begin; i < end; ++i) {
      const auto [batch_idx, head_idx, row0, rows_of_longest] = query_tiles[i];
      const ScoreRule<T>& rule = step.select(batch_idx, head_idx);
      const Sequence& sequence = rule.sequence();
      const int rows = std::min(rows_of_longest, sequence.seqlen_q - row0);
      if (rows <= 0) continue;
      step.load_queries(row0, rows);
      acc_o.fill(T{0});
      begin_rows(rule.sink(), &row_max, &row_sum);

      const BlockRange blocks = key_blocks(rule.band(), row0, block_m, block_n);
      const int key_end = rule.band().key_end(row0 + rows - 1);
      for (int n_block = blocks.begin; n_block < blocks.end; ++n_block) {
        const int key0 = n_block * block_n;
        const int keys = std::min(block_n, key_end - key0);
        if (rule.hides(row0, rows, key0, keys)) continue;
        step.load_keys_values(key0, keys);
        step.update_probabilities(row_max.data());
        for (int r = 0; r < rows; ++r) {
          row_sum[r] = row_sum[r] * step.rescale()[r] + step.block_sum()[r];
        }
        step.scale_output(step.rescale().data(), acc_o.data(), acc_o.ld);
        step.add_weighted_values(acc_o.data(), acc_o.ld);
      }

      for (int r = 0; r < rows; ++r) divide_row(acc_o.row(r), head_dim, row_sum[r]);
      store_rows<Scalar>(params.out, batch_idx, head_idx, sequence.q_begin + row0, rows, head_dim,
                         acc_o);
      store_lse(params, sequence, batch_idx, head_idx, row0, rows, row_max.data(), row_sum.data());
    }
  });
}

template void forward_v2<float>(const ForwardParams&, TileShape);
template void forward_v2<double>(const ForwardParams&, TileShape);
template void forward_v2<c10::Half>(const ForwardParams&, TileShape);
template void forward_v2<c10::BFloat16>(const ForwardParams&, TileShape);

}  // namespace flash_ext::cpu
