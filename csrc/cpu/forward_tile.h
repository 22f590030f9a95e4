// The step that both forward algorithms repeat, for one Q tile against one K/V block:
//   S^T = scale * K Q^T, biased and masked;  m' = max(m, rowmax S);  P = exp(S - m')
// S is kept transposed, one row per key and one lane per query. So K and V are used as they lie in
// memory, only Q is transposed, and maxima and sums over keys run down the lanes: no vector is ever
// reduced across, and the sum of P is taken in the order in which P V adds up.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/softmax_math.h"
#include "cpu/attention.h"
#include "cpu/score_rule.h"
#include "cpu/tile.h"

namespace flash_ext::cpu {

template <typename Scalar>
class ForwardTile {
 public:
  using T = Accum<Scalar>;

  ForwardTile(const ForwardParams& params, int block_m, int block_n)
      : params_(params),
        rule_(params.general, params.shape.heads_q),
        head_dim_(static_cast<int>(params.shape.head_dim)),
        scale_(static_cast<T>(params.softmax_scale)),
        q_t_(head_dim_, block_m),
        k_(block_n, head_dim_),
        v_(block_n, head_dim_),
        p_t_(block_n, block_m),
        shift_(block_m),
        rescale_(block_m),
        block_sum_(block_m) {}

  // The head that everything is of from here on.
  const ScoreRule<T>& select(int64_t batch_idx, int64_t head_idx) {
    rule_.select(batch_idx, head_idx);
    batch_idx_ = batch_idx;
    head_idx_ = head_idx;
    return rule_;
  }

  void load_queries(int row0, int rows) {
    tile_.row0 = row0;
    tile_.rows = rows;
    loads_.load_transposed(
        rows, head_dim_,
        row_pointer<Scalar>(params_.q, batch_idx_, head_idx_, rule_.sequence().q_begin + row0),
        params_.q.row_stride, q_t_.data(), q_t_.ld);
  }

  void load_keys_values(int key0, int keys) {
    tile_.key0 = key0;
    tile_.keys = keys;
    const int64_t kv_head_idx = head_idx_ / params_.shape.group_size();
    const int64_t row = rule_.sequence().k_begin + key0;
    loads_.load(keys, head_dim_, row_pointer<Scalar>(params_.k, batch_idx_, kv_head_idx, row),
                params_.k.row_stride, k_.data(), k_.ld);
    loads_.load(keys, head_dim_, row_pointer<Scalar>(params_.v, batch_idx_, kv_head_idx, row),
                params_.v.row_stride, v_.data(), v_.ld);
  }

  // Computes P of the loaded tiles and raises row_max to the new maxima.
  void update_probabilities(T* row_max) {
    const int lanes = static_cast<int>(q_t_.ld);
    ops_.gemm_nn(tile_.keys, lanes, head_dim_, scale_, k_.data(), k_.ld, q_t_.data(), q_t_.ld,
                 false, p_t_.data(), p_t_.ld);
    rule_.apply(tile_, p_t_.data());
    std::copy_n(row_max, lanes, rescale_.data());
    ops_.update_lane_max(tile_.keys, lanes, p_t_.data(), p_t_.ld, row_max);
    for (int i = 0; i < lanes; ++i) {
      shift_[i] = guarded_max(row_max[i]);
      rescale_[i] -= shift_[i];
    }
    ops_.exp(lanes, rescale_.data());
    ops_.exp_and_sum(tile_.keys, lanes, p_t_.data(), p_t_.ld, shift_.data(), block_sum_.data());
    if (rule_.has_dropout()) rule_.drop(tile_, p_t_.data());
  }

  // exp(m - m') of each query, by which what was summed before this block shrinks.
  const Lanes<T>& rescale() const { return rescale_; }

  // Sum over this block's keys of each query's row of P.
  const Lanes<T>& block_sum() const { return block_sum_; }

  void scale_output(const T* factor, T* acc_o, int64_t ld) const {
    ops_.scale_rows(tile_.rows, static_cast<int>(ld), factor, acc_o, ld);
  }

  // acc_o += P V.
  void add_weighted_values(T* acc_o, int64_t ld) const {
    ops_.gemm_tn(tile_.rows, static_cast<int>(ld), tile_.keys, T{1}, p_t_.data(), p_t_.ld,
                 v_.data(), v_.ld, true, acc_o, ld);
  }

 private:
  const ForwardParams& params_;
  ScoreRule<T> rule_;
  const TileOps<T>& ops_ = tile_ops<T>();
  const TileLoads<Scalar>& loads_ = tile_loads<Scalar>();
  const int head_dim_;
  const T scale_;
  int64_t batch_idx_ = 0, head_idx_ = 0;
  Tile<T> q_t_, k_, v_, p_t_;
  ScoreTile tile_{0, 0, 0, 0, 1, p_t_.ld};  // the loaded queries and keys
  Lanes<T> shift_, rescale_, block_sum_;
};

// O / l. A division and not a product with 1 / l: it makes out exactly 1 where V is 1, l being the
// sum that P V then is. A row with no visible key has O = l = 0 and keeps its 0.
template <typename T>
void divide_row(T* o, int head_dim, T row_sum) {
  if (row_sum == T{0}) return;
  for (int c = 0; c < head_dim; ++c) o[c] /= row_sum;
}

// Rows [row0, row0 + rows) of a sequence in the log-sum-exp tensor.
template <typename T>
void store_lse(const ForwardParams& params, const Sequence& sequence, int64_t batch_idx,
               int64_t head_idx, int row0, int rows, const T* row_max, const T* row_sum) {
  T* lse =
      static_cast<T*>(params.lse) +
      params.general.sequences.lse_index(sequence, batch_idx, head_idx, params.shape.heads_q, row0);
  for (int i = 0; i < rows; ++i) lse[i] = log_sum_exp(row_max[i], row_sum[i]);
}

// m and l before the first key: of the sink alone, or of nothing.
template <typename T>
void begin_rows(T sink, Lanes<T>* row_max, Lanes<T>* row_sum) {
  row_max->fill(sink);
  row_sum->fill(sink == static_cast<T>(-INFINITY) ? T{0} : T{1});
}

}  // namespace flash_ext::cpu
