// Gradients of what is added to the scores: of a float mask, of ALiBi's slopes and of sinks. Each
// element of such a gradient is summed by one thread in a fixed order, over all dimensions that the
// tensor is broadcast along, so none of the sums is ever larger than the gradient itself.
#pragma once

#include "cpu/backward_steps.h"

namespace flash_ext::cpu {

// All of a dimension that is summed over (stride 0), or the one entry that an item stands for.
inline BlockRange entries(int64_t stride, int64_t item, int64_t size) {
  return stride == 0 ? BlockRange{0, static_cast<int>(size)}
                     : BlockRange{static_cast<int>(item), static_cast<int>(item) + 1};
}

inline int64_t num_items(int64_t stride, int64_t size) { return stride == 0 ? 1 : size; }

template <typename Scalar>
void compute_dmask(const BackwardSteps<Scalar>& s) {
  using T = Accum<Scalar>;
  const ScoreTensor& dmask = s.params.general_gradients.dmask;
  const int m_blocks = ceil_div(static_cast<int>(s.shape.seqlen_q), s.block_m);
  const int n_blocks = ceil_div(static_cast<int>(s.shape.seqlen_k), s.block_n);
  const int64_t heads = num_items(dmask.head_stride, s.shape.heads_q);
  const int64_t rows_of_tiles = num_items(dmask.row_stride, m_blocks);
  const int64_t columns_of_tiles = num_items(dmask.key_stride, n_blocks);
  const int64_t items =
      num_items(dmask.batch_stride, s.shape.batch) * heads * rows_of_tiles * columns_of_tiles;
  const int64_t work = int64_t{s.block_m} * s.block_n * s.head_dim;
  at::parallel_for(0, items, parallel_grain(work), [&](int64_t begin, int64_t end) {
    ScoreRule<T> rule(s.params.general, s.shape.heads_q);
    typename BackwardSteps<Scalar>::KeyPass pass(s.block_m, s.block_n, s.head_dim,
                                                 s.params.general);
    Tile<T> sum(s.block_m, s.block_n);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t column = item % columns_of_tiles;
      const int64_t row = item / columns_of_tiles % rows_of_tiles;
      const int64_t pair = item / columns_of_tiles / rows_of_tiles;
      const BlockRange batches = entries(dmask.batch_stride, pair / heads, s.shape.batch);
      const BlockRange members = entries(dmask.head_stride, pair % heads, s.shape.heads_q);
      T* out = static_cast<T*>(dmask.data) + dmask.offset(pair / heads, pair % heads, 0, 0);
      // A tile of keys at a time where the keys are summed over, since its sum is added to `out`.
      sum.fill(T{0});
      for (int batch_idx = batches.begin; batch_idx < batches.end; ++batch_idx) {
        for (int head_idx = members.begin; head_idx < members.end; ++head_idx) {
          s.visit_score_gradients(rule, pass, batch_idx, head_idx,
                                  entries(dmask.row_stride, row, m_blocks),
                                  entries(dmask.key_stride, column, n_blocks),
                                  [&](const ScoreTile& tile, const Tile<T>& ds) {
                                    for (int i = 0; i < tile.rows; ++i) {
                                      for (int j = 0; j < tile.keys; ++j) {
                                        sum.row(i)[j] += ds.row(i)[j];
                                      }
                                    }
                                  });
        }
      }
      const int64_t row0 = dmask.row_stride == 0 ? 0 : row * s.block_m;
      const int64_t key0 = dmask.key_stride == 0 ? 0 : column * s.block_n;
      for (int64_t i = 0; i < s.block_m && row0 + i < s.shape.seqlen_q; ++i) {
        for (int64_t j = 0; j < s.block_n && key0 + j < s.shape.seqlen_k; ++j) {
          out[dmask.offset(0, 0, row0 + i, key0 + j)] += sum.row(i)[j];
        }
      }
    }
  });
}

template <typename Scalar>
void compute_dslopes(const BackwardSteps<Scalar>& s) {
  using T = Accum<Scalar>;
  const HeadTensor& dslopes = s.params.general_gradients.dslopes;
  const int64_t heads = num_items(dslopes.head_stride, s.shape.heads_q);
  const int64_t items = num_items(dslopes.batch_stride, s.shape.batch) * heads;
  at::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    ScoreRule<T> rule(s.params.general, s.shape.heads_q);
    typename BackwardSteps<Scalar>::KeyPass pass(s.block_m, s.block_n, s.head_dim,
                                                 s.params.general);
    const BlockRange m_blocks{0, ceil_div(static_cast<int>(s.shape.seqlen_q), s.block_m)};
    const BlockRange n_blocks{0, ceil_div(static_cast<int>(s.shape.seqlen_k), s.block_n)};
    for (int64_t item = begin; item < end; ++item) {
      const BlockRange batches = entries(dslopes.batch_stride, item / heads, s.shape.batch);
      const BlockRange members = entries(dslopes.head_stride, item % heads, s.shape.heads_q);
      double sum = 0.0;
      for (int batch_idx = batches.begin; batch_idx < batches.end; ++batch_idx) {
        for (int head_idx = members.begin; head_idx < members.end; ++head_idx) {
          s.visit_score_gradients(rule, pass, batch_idx, head_idx, m_blocks, n_blocks,
                                  [&](const ScoreTile& tile, const Tile<T>& ds) {
                                    for (int i = 0; i < tile.rows; ++i) {
                                      for (int j = 0; j < tile.keys; ++j) {
                                        const T distance =
                                            rule.distance(tile.row0 + i, tile.key0 + j);
                                        sum -= static_cast<double>(ds.row(i)[j]) * distance;
                                      }
                                    }
                                  });
        }
      }
      *dslopes.at<T>(item / heads, item % heads) += static_cast<T>(sum);
    }
  });
}

template <typename Scalar>
void compute_dsinks(const BackwardSteps<Scalar>& s) {
  using T = Accum<Scalar>;
  const HeadTensor& dsinks = s.params.general_gradients.dsinks;
  for (int64_t head_idx = 0; head_idx < s.shape.heads_q; ++head_idx) {
    const T sink = *s.params.general.sinks.template at<T>(0, head_idx);
    double sum = 0.0;
    for (int64_t batch_idx = 0; batch_idx < s.shape.batch; ++batch_idx) {
      const Sequence sequence = s.params.general.sequences[batch_idx];
      const int64_t row_idx = s.row_index(sequence, batch_idx, head_idx, 0);
      for (int i = 0; i < sequence.seqlen_q; ++i) {
        sum -= static_cast<double>(std::exp(sink - s.lse[row_idx + i])) * s.delta[row_idx + i];
      }
    }
    *dsinks.at<T>(0, head_idx) += static_cast<T>(sum);
  }
}

template <typename Scalar>
void compute_bias_gradients(const BackwardSteps<Scalar>& s) {
  const GeneralGradients& wanted = s.params.general_gradients;
  if (wanted.dmask.data != nullptr) compute_dmask(s);
  if (wanted.dslopes.data != nullptr) compute_dslopes(s);
  if (wanted.dsinks.data != nullptr) compute_dsinks(s);
}

}  // namespace flash_ext::cpu
