// Gradients from Q, K, V, out, L and dO; S and P are recomputed tile by tile from L:
//   D = rowsum(dO * out) - dL
//   for each batch, K/V head and K/V tile (in parallel):         dK, dV
//     for each query head of the group and each Q block:
//       P = exp(scale * Q K^T - L);  dV += P^T dO
//       dS = P * (dO V^T - D);       dK += scale * dS^T Q
//   for each batch, head and Q tile (in parallel):               dQ
//     for each K/V block: P, dS as above, transposed;  dQ += scale * dS K
// Two passes recompute P twice, 7 products instead of 5, but every gradient is summed by one thread
// in a fixed order, any number of heads keeps all threads busy, and a gradient nobody asked for
// costs nothing.
//
// dQ is corrected for keys with a large mean. Exactly, the rows of dS sum to dL; computed, they
// miss it by the rounding of `out` in D, and that error e enters dQ as e * mean(K), which can be
// far larger than dQ itself. So e, which is rowsum(dS) - dL, times mean(K) is taken off again.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "common/block_range.h"
#include "common/softmax_math.h"
#include "cpu/attention.h"
#include "cpu/tile.h"

namespace flash_ext::cpu {
namespace {

template <typename Scalar>
class Backward {
  using T = Accum<Scalar>;

 public:
  Backward(const BackwardParams& params, TileShape tile)
      : params_(params),
        shape_(params.shape),
        mask_(params.mask),
        head_dim_(static_cast<int>(params.shape.head_dim)),
        block_m_(clipped_block(tile.block_m, params.shape.seqlen_q)),
        block_n_(clipped_block(tile.block_n, params.shape.seqlen_k)),
        scale_(static_cast<T>(params.softmax_scale)),
        query_tiles_{shape_.batch, shape_.heads_q, mask_.seqlen_q, block_m_},
        key_tiles_{shape_.batch, shape_.heads_kv, mask_.seqlen_k, block_n_},
        lse_(shape_.batch * shape_.heads_q * shape_.seqlen_q),
        delta_(shape_.batch * shape_.heads_q * shape_.seqlen_q) {}

  void run() {
    compute_row_statistics();
    if (params_.dk.data != nullptr || params_.dv.data != nullptr) compute_dk_dv();
    if (params_.dq.data != nullptr) compute_dq();
  }

 private:
  // Index of a query row in lse, dlse, lse_ and delta_.
  int64_t row_index(int64_t batch_idx, int64_t head_idx, int row) const {
    return (batch_idx * shape_.heads_q + head_idx) * shape_.seqlen_q + row;
  }

  T dlse(int64_t row_idx) const {
    return params_.dlse == nullptr ? T{0} : static_cast<const T*>(params_.dlse)[row_idx];
  }

  void load(const TensorView& view, int64_t batch_idx, int64_t head_idx, int row0, int rows,
            Tile<T>& tile) const {
    loads_.load(rows, head_dim_, row_pointer<Scalar>(view, batch_idx, head_idx, row0),
                view.row_stride, tile.data(), tile.ld);
  }

  void load_transposed(const TensorView& view, int64_t batch_idx, int64_t head_idx, int row0,
                       int rows, Tile<T>& tile) const {
    loads_.load_transposed(rows, head_dim_, row_pointer<Scalar>(view, batch_idx, head_idx, row0),
                           view.row_stride, tile.data(), tile.ld);
  }

  // lse_, and delta_ = D unless only dV is wanted.
  void compute_row_statistics() {
    const bool needs_delta = params_.dq.data != nullptr || params_.dk.data != nullptr;
    const int64_t work = int64_t{block_m_} * head_dim_;
    at::parallel_for(0, query_tiles_.size(), parallel_grain(work), [&](int64_t begin, int64_t end) {
      Tile<T> out(block_m_, head_dim_), dout(block_m_, head_dim_);
      for (int64_t i = begin; i < end; ++i) {
        const auto [batch_idx, head_idx, row0, rows] = query_tiles_[i];
        const int64_t row_idx = row_index(batch_idx, head_idx, row0);
        const T* lse = static_cast<const T*>(params_.lse) + row_idx;
        for (int r = 0; r < rows; ++r) lse_[row_idx + r] = backward_lse(lse[r]);
        if (!needs_delta) continue;
        load(params_.out, batch_idx, head_idx, row0, rows, out);
        load(params_.dout, batch_idx, head_idx, row0, rows, dout);
        for (int r = 0; r < rows; ++r) {
          double dot = 0.0;
          for (int c = 0; c < head_dim_; ++c) {
            dot += static_cast<double>(dout.row(r)[c]) * static_cast<double>(out.row(r)[c]);
          }
          delta_[row_idx + r] = static_cast<T>(dot - static_cast<double>(dlse(row_idx + r)));
        }
      }
    });
  }

  // One tile of keys against all queries that see it. Lanes are keys: S = Q K^T, a row per query.
  void compute_dk_dv() const {
    const bool needs_dk = params_.dk.data != nullptr;
    const bool needs_dv = params_.dv.data != nullptr;
    const int64_t work = block_n_ * shape_.seqlen_q * head_dim_;
    at::parallel_for(0, key_tiles_.size(), parallel_grain(work), [&](int64_t begin, int64_t end) {
      Tile<T> k_t(head_dim_, block_n_), v_t(head_dim_, block_n_);
      Tile<T> q(block_m_, head_dim_), dout(block_m_, head_dim_);
      Tile<T> p(block_m_, block_n_), ds(block_m_, block_n_);
      Tile<T> dk(block_n_, head_dim_), dv(block_n_, head_dim_);
      const int lanes = static_cast<int>(k_t.ld);
      const int columns = static_cast<int>(dk.ld);
      for (int64_t i = begin; i < end; ++i) {
        const auto [batch_idx, kv_head_idx, key0, keys] = key_tiles_[i];
        load_transposed(params_.k, batch_idx, kv_head_idx, key0, keys, k_t);
        load_transposed(params_.v, batch_idx, kv_head_idx, key0, keys, v_t);
        dk.fill(T{0});
        dv.fill(T{0});

        const BlockRange blocks = query_blocks(mask_, key0, block_m_);
        for (int64_t member = 0; member < shape_.group_size(); ++member) {
          const int64_t head_idx = kv_head_idx * shape_.group_size() + member;
          for (int m_block = blocks.begin; m_block < blocks.end; ++m_block) {
            const int row0 = m_block * block_m_;
            const int rows = std::min(block_m_, mask_.seqlen_q - row0);
            const int64_t row_idx = row_index(batch_idx, head_idx, row0);
            load(params_.q, batch_idx, head_idx, row0, rows, q);
            load(params_.dout, batch_idx, head_idx, row0, rows, dout);

            ops_.gemm_nn(rows, lanes, head_dim_, scale_, q.data(), q.ld, k_t.data(), k_t.ld, false,
                         p.data(), p.ld);
            if (!block_is_full(mask_, row0, key0, keys)) {
              mask_scores(mask_, row0, rows, key0, keys, p.data(), p.ld, 1);
            }
            ops_.probabilities_per_row(rows, lanes, p.data(), p.ld, &lse_[row_idx]);
            if (needs_dv) {
              ops_.gemm_tn(keys, columns, rows, T{1}, p.data(), p.ld, dout.data(), dout.ld, true,
                           dv.data(), dv.ld);
            }
            if (needs_dk) {
              ops_.gemm_nn(rows, lanes, head_dim_, T{1}, dout.data(), dout.ld, v_t.data(), v_t.ld,
                           false, ds.data(), ds.ld);
              ops_.score_gradients_per_row(rows, lanes, p.data(), ds.data(), ds.ld,
                                           &delta_[row_idx]);
              ops_.gemm_tn(keys, columns, rows, scale_, ds.data(), ds.ld, q.data(), q.ld, true,
                           dk.data(), dk.ld);
            }
          }
        }
        if (needs_dk) {
          store_rows<Scalar>(params_.dk, batch_idx, kv_head_idx, key0, keys, head_dim_, dk);
        }
        if (needs_dv) {
          store_rows<Scalar>(params_.dv, batch_idx, kv_head_idx, key0, keys, head_dim_, dv);
        }
      }
    });
  }

  // One tile of queries against all keys that it sees. Lanes are queries: S^T, as in the forward.
  void compute_dq() const {
    const Tile<T> key_mean = compute_key_mean();
    const int64_t work = block_m_ * shape_.seqlen_k * head_dim_;
    at::parallel_for(0, query_tiles_.size(), parallel_grain(work), [&](int64_t begin, int64_t end) {
      Tile<T> q_t(head_dim_, block_m_), dout_t(head_dim_, block_m_);
      Tile<T> k(block_n_, head_dim_), v(block_n_, head_dim_);
      Tile<T> p_t(block_n_, block_m_), ds_t(block_n_, block_m_);
      Tile<T> dq(block_m_, head_dim_);
      Lanes<T> lse(block_m_), delta(block_m_), ds_sum(block_m_);
      const int lanes = static_cast<int>(q_t.ld);
      for (int64_t i = begin; i < end; ++i) {
        const auto [batch_idx, head_idx, row0, rows] = query_tiles_[i];
        const int64_t kv_head_idx = head_idx / shape_.group_size();
        const int64_t row_idx = row_index(batch_idx, head_idx, row0);
        load_transposed(params_.q, batch_idx, head_idx, row0, rows, q_t);
        load_transposed(params_.dout, batch_idx, head_idx, row0, rows, dout_t);
        std::copy_n(&lse_[row_idx], rows, lse.data());
        std::copy_n(&delta_[row_idx], rows, delta.data());
        ds_sum.fill(T{0});
        dq.fill(T{0});

        const BlockRange blocks = key_blocks(mask_, row0, block_m_, block_n_);
        const int key_end = mask_.key_end(row0 + rows - 1);
        for (int n_block = blocks.begin; n_block < blocks.end; ++n_block) {
          const int key0 = n_block * block_n_;
          const int keys = std::min(block_n_, key_end - key0);
          load(params_.k, batch_idx, kv_head_idx, key0, keys, k);
          load(params_.v, batch_idx, kv_head_idx, key0, keys, v);

          ops_.gemm_nn(keys, lanes, head_dim_, scale_, k.data(), k.ld, q_t.data(), q_t.ld, false,
                       p_t.data(), p_t.ld);
          if (!block_is_full(mask_, row0, key0, keys)) {
            mask_scores(mask_, row0, rows, key0, keys, p_t.data(), 1, p_t.ld);
          }
          ops_.probabilities_per_lane(keys, lanes, p_t.data(), p_t.ld, lse.data());
          ops_.gemm_nn(keys, lanes, head_dim_, T{1}, v.data(), v.ld, dout_t.data(), dout_t.ld,
                       false, ds_t.data(), ds_t.ld);
          ops_.score_gradients_per_lane(keys, lanes, p_t.data(), ds_t.data(), ds_t.ld,
                                        delta.data());
          ops_.add_lane_sums(keys, lanes, ds_t.data(), ds_t.ld, ds_sum.data());
          ops_.gemm_tn(rows, static_cast<int>(dq.ld), keys, T{1}, ds_t.data(), ds_t.ld, k.data(),
                       k.ld, true, dq.data(), dq.ld);
        }

        const T* mean = key_mean.row(batch_idx * shape_.heads_kv + kv_head_idx);
        for (int r = 0; r < rows; ++r) {
          const bool is_empty = lse[r] == INFINITY;
          const T error = is_empty ? T{0} : ds_sum[r] - dlse(row_idx + r);
          T* dq_row = dq.row(r);
          for (int c = 0; c < head_dim_; ++c) dq_row[c] = scale_ * (dq_row[c] - error * mean[c]);
        }
        store_rows<Scalar>(params_.dq, batch_idx, head_idx, row0, rows, head_dim_, dq);
      }
    });
  }

  // mean(K) of each (batch, K/V head), one row each.
  Tile<T> compute_key_mean() const {
    const int64_t heads = shape_.batch * shape_.heads_kv;
    Tile<T> mean(heads, head_dim_);
    const int64_t work = shape_.seqlen_k * head_dim_;
    at::parallel_for(0, heads, parallel_grain(work), [&](int64_t begin, int64_t end) {
      Tile<T> k(block_n_, head_dim_);
      Lanes<T> weight(block_n_);
      weight.fill(T{1} / static_cast<T>(shape_.seqlen_k));
      for (int64_t i = begin; i < end; ++i) {
        for (int key0 = 0; key0 < mask_.seqlen_k; key0 += block_n_) {
          const int keys = std::min(block_n_, mask_.seqlen_k - key0);
          load(params_.k, i / shape_.heads_kv, i % shape_.heads_kv, key0, keys, k);
          ops_.gemm_tn(1, static_cast<int>(k.ld), keys, T{1}, weight.data(), 1, k.data(), k.ld,
                       true, mean.row(i), mean.ld);
        }
      }
    });
    return mean;
  }

  const BackwardParams& params_;
  const AttentionShape& shape_;
  const Mask& mask_;
  const TileOps<T>& ops_ = tile_ops<T>();
  const TileLoads<Scalar>& loads_ = tile_loads<Scalar>();
  const int head_dim_;
  const int block_m_, block_n_;
  const T scale_;
  const TileList query_tiles_, key_tiles_;
  Lanes<T> lse_;    // L, but +inf for a row with no visible key
  Lanes<T> delta_;  // D
};

}  // namespace

template <typename Scalar>
void backward(const BackwardParams& params, TileShape tile) {
  Backward<Scalar>(params, tile).run();
}

template void backward<float>(const BackwardParams&, TileShape);
template void backward<double>(const BackwardParams&, TileShape);
template void backward<c10::Half>(const BackwardParams&, TileShape);
template void backward<c10::BFloat16>(const BackwardParams&, TileShape);

}  // namespace flash_ext::cpu
