// Gradients from Q, K, V, out, L and dO; S and P are recomputed tile by tile from L:
//   D = rowsum(dO * out) - dL
//   for each batch, K/V head and K/V tile (in parallel):         dK, dV
//     for each query head of the group and each Q block:
//       P = exp(S - L), S as in common/general.h;  dV += P^T dO
//       dS = P * (dO V^T - D);       dK += scale * dS^T Q
//   for each batch, head and Q tile (in parallel):               dQ
//     for each K/V block: P, dS as above, transposed;  dQ += scale * dS K
// Two passes recompute P twice, 7 products instead of 5, but every gradient is summed by one thread
// in a fixed order, any number of heads keeps all threads busy, and a gradient nobody asked for
// costs nothing.
//
// dQ is corrected for keys with a large mean. The sum of a row of dS is known: dL, and with a sink
// of weight p_sink also p_sink * D; computed, it misses that by the rounding e of D from `out`.
// With e, dQ misses e * sum_j p_j t_j k_j (t_j: the derivative of the soft cap, or 1), nearly e *
// mean(K) * sum_j p_j t_j, which can be far larger than dQ itself. So that is taken off again.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cpu/backward_steps.h"
#include "cpu/bias_gradients.h"

namespace flash_ext::cpu {
namespace {

// mean(K) of each (batch, K/V head), one row each, over the keys in use.
template <typename Scalar>
Tile<Accum<Scalar>> compute_key_mean(const BackwardSteps<Scalar>& s) {
  using T = Accum<Scalar>;
  const int64_t heads = s.shape.batch * s.shape.heads_kv;
  Tile<T> mean(heads, s.head_dim);
  const int64_t work = s.shape.seqlen_k * s.head_dim;
  at::parallel_for(0, heads, parallel_grain(work), [&](int64_t begin, int64_t end) {
    Tile<T> k(s.block_n, s.head_dim);
    Lanes<T> weight(s.block_n);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch_idx = i / s.shape.heads_kv;
      const Sequence sequence = s.params.general.sequences[batch_idx];
      weight.fill(T{1} / static_cast<T>(sequence.seqlen_k));
      for (int key0 = 0; key0 < sequence.seqlen_k; key0 += s.block_n) {
        const int keys = std::min(s.block_n, sequence.seqlen_k - key0);
        s.load(s.params.k, batch_idx, i % s.shape.heads_kv, sequence.k_begin + key0, keys, k);
        s.ops.gemm_tn(1, static_cast<int>(k.ld), keys, T{1}, weight.data(), 1, k.data(), k.ld, true,
                      mean.row(i), mean.ld);
      }
    }
  });
  return mean;
}

// One tile of keys against all queries that see it.
template <typename Scalar>
void compute_dk_dv(const BackwardSteps<Scalar>& s) {
  using T = Accum<Scalar>;
  const bool needs_dk = s.params.dk.data != nullptr;
  const bool needs_dv = s.params.dv.data != nullptr;
  const int64_t work = s.block_n * s.shape.seqlen_q * s.head_dim;
  at::parallel_for(0, s.key_tiles.size(), parallel_grain(work), [&](int64_t begin, int64_t end) {
    ScoreRule<T> rule(s.params.general, s.shape.heads_q);
    typename BackwardSteps<Scalar>::KeyPass pass(s.block_m, s.block_n, s.head_dim,
                                                 s.params.general);
    Tile<T> dk(s.block_n, s.head_dim), dv(s.block_n, s.head_dim);
    const int columns = static_cast<int>(dk.ld);
    for (int64_t i = begin; i < end; ++i) {
      const auto [batch_idx, kv_head_idx, key0, keys_of_longest] = s.key_tiles[i];
      const Sequence sequence = s.params.general.sequences[batch_idx];
      const int keys = std::min(keys_of_longest, sequence.seqlen_k - key0);
      // Keys past seqlens_k have gradients of 0, which in packed tensors are there already.
      const int rows_to_store = s.params.general.sequences.is_packed() ? keys : keys_of_longest;
      dk.fill(T{0});
      dv.fill(T{0});
      if (keys > 0) s.load_keys(batch_idx, kv_head_idx, sequence.k_begin + key0, keys, pass);

      for (int64_t member = 0; keys > 0 && member < s.shape.group_size(); ++member) {
        const int64_t head_idx = kv_head_idx * s.shape.group_size() + member;
        rule.select(batch_idx, head_idx);
        const BlockRange blocks = query_blocks(rule.band(), key0, key0 + keys - 1, s.block_m);
        for (int m_block = blocks.begin; m_block < blocks.end; ++m_block) {
          const int row0 = m_block * s.block_m;
          const int rows = std::min(s.block_m, sequence.seqlen_q - row0);
          if (rule.hides(row0, rows, key0, keys)) continue;
          const ScoreTile tile{row0, rows, key0, keys, pass.scores.p.ld, 1};
          const Tile<T>& p = s.recompute_probabilities(rule, batch_idx, head_idx, tile, pass);
          if (needs_dv) {
            s.ops.gemm_tn(keys, columns, rows, T{1}, p.data(), p.ld, pass.dout.data(), pass.dout.ld,
                          true, dv.data(), dv.ld);
          }
          if (!needs_dk) continue;
          s.recompute_score_gradients(rule, batch_idx, head_idx, tile, pass);
          Tile<T>& ds = pass.scores.ds;
          if (rule.has_softcap()) s.multiply(rows, pass.scores.cap, ds);
          s.ops.gemm_tn(keys, columns, rows, s.scale, ds.data(), ds.ld, pass.q.data(), pass.q.ld,
                        true, dk.data(), dk.ld);
        }
      }
      const int64_t row = sequence.k_begin + key0;
      if (needs_dk) {
        store_rows<Scalar>(s.params.dk, batch_idx, kv_head_idx, row, rows_to_store, s.head_dim, dk);
      }
      if (needs_dv) {
        store_rows<Scalar>(s.params.dv, batch_idx, kv_head_idx, row, rows_to_store, s.head_dim, dv);
      }
    }
  });
}

// One tile of queries against all keys that it sees. Lanes are queries: S^T, as in the forward.
template <typename Scalar>
void compute_dq(const BackwardSteps<Scalar>& s) {
  using T = Accum<Scalar>;
  const Tile<T> key_mean = compute_key_mean(s);
  const int64_t work = s.block_m * s.shape.seqlen_k * s.head_dim;
  at::parallel_for(0, s.query_tiles.size(), parallel_grain(work), [&](int64_t begin, int64_t end) {
    ScoreRule<T> rule(s.params.general, s.shape.heads_q);
    Tile<T> q_t(s.head_dim, s.block_m), dout_t(s.head_dim, s.block_m);
    Tile<T> k(s.block_n, s.head_dim), v(s.block_n, s.head_dim);
    typename BackwardSteps<Scalar>::Scores scores(s.block_n, s.block_m, s.params.general);
    Tile<T>&p_t = scores.p, &ds_t = scores.ds;
    Tile<T> dq(s.block_m, s.head_dim);
    Lanes<T> lse(s.block_m), delta(s.block_m), ds_sum(s.block_m), cap_sum(s.block_m);
    const int lanes = static_cast<int>(q_t.ld);
    for (int64_t i = begin; i < end; ++i) {
      const auto [batch_idx, head_idx, row0, rows_of_longest] = s.query_tiles[i];
      rule.select(batch_idx, head_idx);
      const Sequence& sequence = rule.sequence();
      const int rows = std::min(rows_of_longest, sequence.seqlen_q - row0);
      if (rows <= 0) continue;
      const int64_t kv_head_idx = head_idx / s.shape.group_size();
      const int64_t row_idx = s.row_index(sequence, batch_idx, head_idx, row0);
      s.load_transposed(s.params.q, batch_idx, head_idx, sequence.q_begin + row0, rows, q_t);
      s.load_transposed(s.params.dout, batch_idx, head_idx, sequence.q_begin + row0, rows, dout_t);
      std::copy_n(&s.lse[row_idx], rows, lse.data());
      std::copy_n(&s.delta[row_idx], rows, delta.data());
      ds_sum.fill(T{0});
      cap_sum.fill(T{0});
      dq.fill(T{0});

      const BlockRange blocks = key_blocks(rule.band(), row0, s.block_m, s.block_n);
      const int key_end = rule.band().key_end(row0 + rows - 1);
      for (int n_block = blocks.begin; n_block < blocks.end; ++n_block) {
        const int key0 = n_block * s.block_n;
        const int keys = std::min(s.block_n, key_end - key0);
        if (rule.hides(row0, rows, key0, keys)) continue;
        const ScoreTile tile{row0, rows, key0, keys, 1, p_t.ld};
        s.load(s.params.k, batch_idx, kv_head_idx, sequence.k_begin + key0, keys, k);
        s.load(s.params.v, batch_idx, kv_head_idx, sequence.k_begin + key0, keys, v);

        s.ops.gemm_nn(keys, lanes, s.head_dim, s.scale, k.data(), k.ld, q_t.data(), q_t.ld, false,
                      p_t.data(), p_t.ld);
        s.probabilities(rule, tile, keys, lanes, s.ops.probabilities_per_lane, lse.data(), scores);
        s.ops.gemm_nn(keys, lanes, s.head_dim, T{1}, v.data(), v.ld, dout_t.data(), dout_t.ld,
                      false, ds_t.data(), ds_t.ld);
        s.score_gradients(rule, tile, keys, lanes, s.ops.score_gradients_per_lane, delta.data(),
                          scores);
        s.ops.add_lane_sums(keys, lanes, ds_t.data(), ds_t.ld, ds_sum.data());
        if (rule.has_softcap()) {
          s.multiply(keys, scores.cap, ds_t);
          s.multiply(keys, scores.cap, p_t);
          s.ops.add_lane_sums(keys, lanes, p_t.data(), p_t.ld, cap_sum.data());
        }
        s.ops.gemm_tn(rows, static_cast<int>(dq.ld), keys, T{1}, ds_t.data(), ds_t.ld, k.data(),
                      k.ld, true, dq.data(), dq.ld);
      }

      const T* mean = key_mean.row(batch_idx * s.shape.heads_kv + kv_head_idx);
      for (int r = 0; r < rows; ++r) {
        const bool is_empty = lse[r] == INFINITY;
        const T sink_weight = std::exp(rule.sink() - lse[r]);
        const T sum = s.dlse(row_idx + r) + sink_weight * delta[r];
        const T weight = rule.has_softcap() ? cap_sum[r] : T{1} - sink_weight;
        const T error = is_empty ? T{0} : (ds_sum[r] - sum) * weight;
        T* dq_row = dq.row(r);
        for (int c = 0; c < s.head_dim; ++c) dq_row[c] = s.scale * (dq_row[c] - error * mean[c]);
      }
      store_rows<Scalar>(s.params.dq, batch_idx, head_idx, sequence.q_begin + row0, rows,
                         s.head_dim, dq);
    }
  });
}

}  // namespace

template <typename Scalar>
void backward(const BackwardParams& params, TileShape tile) {
  BackwardSteps<Scalar> steps(params, tile);
  steps.compute_row_statistics();
  if (params.dk.data != nullptr || params.dv.data != nullptr) compute_dk_dv(steps);
  if (params.dq.data != nullptr) compute_dq(steps);
  compute_bias_gradients(steps);
}

template void backward<float>(const BackwardParams&, TileShape);
template void backward<double>(const BackwardParams&, TileShape);
template void backward<c10::Half>(const BackwardParams&, TileShape);
template void backward<c10::BFloat16>(const BackwardParams&, TileShape);

}  // namespace flash_ext::cpu
