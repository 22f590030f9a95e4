// What the passes of the CPU backward share: the statistics of the rows, and P and dS recomputed
// for one tile of queries and one of keys.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "common/softmax_math.h"
#include "cpu/attention.h"
#include "cpu/score_rule.h"
#include "cpu/tile.h"

namespace flash_ext::cpu {

template <typename Scalar>
struct BackwardSteps {
  using T = Accum<Scalar>;

  BackwardSteps(const BackwardParams& backward_params, TileShape tile)
      : params(backward_params),
        shape(params.shape),
        head_dim(static_cast<int>(params.shape.head_dim)),
        block_m(clipped_block(tile.block_m, params.shape.seqlen_q)),
        block_n(clipped_block(tile.block_n, params.shape.seqlen_k)),
        scale(static_cast<T>(params.softmax_scale)),
        query_tiles{shape.batch, shape.heads_q, static_cast<int>(shape.seqlen_q), block_m},
        key_tiles{shape.batch, shape.heads_kv, static_cast<int>(shape.seqlen_k), block_n},
        lse(num_rows()),
        delta(num_rows()) {}

  // Of lse and delta, and the index of a query row in them.
  int64_t num_rows() const {
    const Sequences& sequences = params.general.sequences;
    return shape.heads_q *
           (sequences.is_packed() ? sequences.total_q : shape.batch * shape.seqlen_q);
  }
  int64_t row_index(const Sequence& sequence, int64_t batch_idx, int64_t head_idx, int row) const {
    return params.general.sequences.lse_index(sequence, batch_idx, head_idx, shape.heads_q, row);
  }

  T dlse(int64_t row_idx) const {
    return params.dlse == nullptr ? T{0} : static_cast<const T*>(params.dlse)[row_idx];
  }

  void load(const TensorView& view, int64_t batch_idx, int64_t head_idx, int64_t row0, int rows,
            Tile<T>& tile) const {
    loads.load(rows, head_dim, row_pointer<Scalar>(view, batch_idx, head_idx, row0),
               view.row_stride, tile.data(), tile.ld);
  }

  void load_transposed(const TensorView& view, int64_t batch_idx, int64_t head_idx, int64_t row0,
                       int rows, Tile<T>& tile) const {
    loads.load_transposed(rows, head_dim, row_pointer<Scalar>(view, batch_idx, head_idx, row0),
                          view.row_stride, tile.data(), tile.ld);
  }

  // Fills lse, and delta unless only dV is wanted.
  void compute_row_statistics() {
    const bool needs_delta =
        params.dq.data != nullptr || params.dk.data != nullptr || params.general_gradients.any();
    const int64_t work = int64_t{block_m} * head_dim;
    at::parallel_for(0, query_tiles.size(), parallel_grain(work), [&](int64_t begin, int64_t end) {
      Tile<T> out(block_m, head_dim), dout(block_m, head_dim);
      for (int64_t i = begin; i < end; ++i) {
        const auto [batch_idx, head_idx, row0, rows_of_longest] = query_tiles[i];
        const Sequence sequence = params.general.sequences[batch_idx];
        const int rows = std::min(rows_of_longest, sequence.seqlen_q - row0);
        const int64_t row_idx = row_index(sequence, batch_idx, head_idx, row0);
        const T* saved = static_cast<const T*>(params.lse) + row_idx;
        for (int r = 0; r < rows; ++r) lse[row_idx + r] = backward_lse(saved[r]);
        if (!needs_delta) continue;
        load(params.out, batch_idx, head_idx, sequence.q_begin + row0, rows, out);
        load(params.dout, batch_idx, head_idx, sequence.q_begin + row0, rows, dout);
        for (int r = 0; r < rows; ++r) {
          double dot = 0.0;
          for (int c = 0; c < head_dim; ++c) {
            dot += static_cast<double>(dout.row(r)[c]) * static_cast<double>(out.row(r)[c]);
          }
          delta[row_idx + r] = static_cast<T>(dot - static_cast<double>(dlse(row_idx + r)));
        }
      }
    });
  }

  // Tiles that P and dS are recomputed in, for one thread. A row per query in one pass, a row per
  // key in the other, as the ScoreTile says.
  struct Scores {
    Scores(int64_t rows, int64_t columns, const GeneralParams& general)
        : p(rows, columns),
          ds(rows, columns),
          dropped(general.dropout.rng_state != nullptr ? rows : 0, columns),
          cap(general.softcap > 0.0 ? rows : 0, columns) {}

    Tile<T> p, ds;
    Tile<T> dropped;  // P keep / (1 - dropout_p)
    Tile<T> cap;      // derivative of the soft cap
  };

  // From scale * q . k in scores.p. Leaves P there, what V is weighted by in the result.
  const Tile<T>& probabilities(const ScoreRule<T>& rule, const ScoreTile& tile, int rows, int lanes,
                               typename TileOps<T>::Probabilities exp, const T* row_lse,
                               Scores& scores) const {
    if (rule.has_softcap()) {
      std::copy_n(scores.p.data(), rows * scores.p.ld, scores.cap.data());
      rule.cap_derivative(tile, scores.cap.data());
    }
    rule.apply(tile, scores.p.data());
    exp(rows, lanes, scores.p.data(), scores.p.ld, row_lse);
    if (!rule.has_dropout()) return scores.p;
    std::copy_n(scores.p.data(), rows * scores.p.ld, scores.dropped.data());
    rule.drop(tile, scores.dropped.data());
    return scores.dropped;
  }

  // From dO . v in scores.ds: the gradient of the biased scores.
  void score_gradients(const ScoreRule<T>& rule, const ScoreTile& tile, int rows, int lanes,
                       typename TileOps<T>::ScoreGradients subtract, const T* row_delta,
                       Scores& scores) const {
    if (rule.has_dropout()) rule.drop(tile, scores.ds.data());
    subtract(rows, lanes, scores.p.data(), scores.ds.data(), scores.ds.ld, row_delta);
  }

  static void multiply(int rows, const Tile<T>& factor, Tile<T>& tile) {
    for (int64_t i = 0; i < rows * tile.ld; ++i) tile[i] *= factor[i];
  }

  // One tile of keys and one of queries. Lanes are keys: S = Q K^T, a row per query.
  struct KeyPass {
    KeyPass(int block_m, int block_n, int head_dim, const GeneralParams& general)
        : k_t(head_dim, block_n),
          v_t(head_dim, block_n),
          q(block_m, head_dim),
          dout(block_m, head_dim),
          scores(block_m, block_n, general) {}

    Tile<T> k_t, v_t, q, dout;
    Scores scores;
  };

  void load_keys(int64_t batch_idx, int64_t kv_head_idx, int64_t row, int keys,
                 KeyPass& pass) const {
    load_transposed(params.k, batch_idx, kv_head_idx, row, keys, pass.k_t);
    load_transposed(params.v, batch_idx, kv_head_idx, row, keys, pass.v_t);
  }

  // P of the loaded keys and the tile's queries.
  const Tile<T>& recompute_probabilities(const ScoreRule<T>& rule, int64_t batch_idx,
                                         int64_t head_idx, const ScoreTile& tile,
                                         KeyPass& pass) const {
    const Sequence& sequence = rule.sequence();
    const int64_t row = sequence.q_begin + tile.row0;
    load(params.q, batch_idx, head_idx, row, tile.rows, pass.q);
    load(params.dout, batch_idx, head_idx, row, tile.rows, pass.dout);
    const int lanes = static_cast<int>(pass.k_t.ld);
    Tile<T>& p = pass.scores.p;
    ops.gemm_nn(tile.rows, lanes, head_dim, scale, pass.q.data(), pass.q.ld, pass.k_t.data(),
                pass.k_t.ld, false, p.data(), p.ld);
    return probabilities(rule, tile, tile.rows, lanes, ops.probabilities_per_row,
                         &lse[row_index(sequence, batch_idx, head_idx, tile.row0)], pass.scores);
  }

  // dS, after recompute_probabilities.
  void recompute_score_gradients(const ScoreRule<T>& rule, int64_t batch_idx, int64_t head_idx,
                                 const ScoreTile& tile, KeyPass& pass) const {
    const int lanes = static_cast<int>(pass.v_t.ld);
    Tile<T>& ds = pass.scores.ds;
    ops.gemm_nn(tile.rows, lanes, head_dim, T{1}, pass.dout.data(), pass.dout.ld, pass.v_t.data(),
                pass.v_t.ld, false, ds.data(), ds.ld);
    score_gradients(rule, tile, tile.rows, lanes, ops.score_gradients_per_row,
                    &delta[row_index(rule.sequence(), batch_idx, head_idx, tile.row0)],
                    pass.scores);
  }

  // Calls f(tile, dS) for the tiles of one head among these blocks of queries and keys. dS has a
  // row per query.
  template <typename Function>
  void visit_score_gradients(ScoreRule<T>& rule, KeyPass& pass, int64_t batch_idx, int64_t head_idx,
                             BlockRange m_blocks, BlockRange n_blocks, const Function& f) const {
    rule.select(batch_idx, head_idx);
    const Sequence& sequence = rule.sequence();
    for (int n_block = n_blocks.begin; n_block < n_blocks.end; ++n_block) {
      const int key0 = n_block * block_n;
      const int keys = std::min(block_n, sequence.seqlen_k - key0);
      if (keys <= 0) break;
      load_keys(batch_idx, head_idx / shape.group_size(), sequence.k_begin + key0, keys, pass);
      const BlockRange seen = query_blocks(rule.band(), key0, key0 + keys - 1, block_m);
      const int m_end = std::min(seen.end, m_blocks.end);
      for (int m_block = std::max(seen.begin, m_blocks.begin); m_block < m_end; ++m_block) {
        const int row0 = m_block * block_m;
        const int rows = std::min(block_m, sequence.seqlen_q - row0);
        if (rule.hides(row0, rows, key0, keys)) continue;
        const ScoreTile tile{row0, rows, key0, keys, pass.scores.p.ld, 1};
        recompute_probabilities(rule, batch_idx, head_idx, tile, pass);
        recompute_score_gradients(rule, batch_idx, head_idx, tile, pass);
        f(tile, pass.scores.ds);
      }
    }
  }

  const BackwardParams& params;
  const AttentionShape& shape;
  const TileOps<T>& ops = tile_ops<T>();
  const TileLoads<Scalar>& loads = tile_loads<Scalar>();
  const int head_dim;
  const int block_m, block_n;
  const T scale;
  const TileList query_tiles, key_tiles;
  Lanes<T> lse;    // L, but +inf for a row with no visible key
  Lanes<T> delta;  // D
};

}  // namespace flash_ext::cpu
