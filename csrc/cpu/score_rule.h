// What happens to a tile of scores between scale * Q K^T and the softmax, and its derivative: the
// steps of common/general.h for one (batch, head). The kernels ask whether a tile is changed at all
// before they have it changed, which is once for thousands of scores: a plain call pays nothing.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>

#include "common/block_range.h"
#include "common/general.h"
#include "params.h"

namespace flash_ext::cpu {

// A tile of queries [row0, row0 + rows) and keys [key0, key0 + keys), in sequence coordinates.
// Element (i, j) of the tile lies at i * query_stride + j * key_stride of its array.
struct ScoreTile {
  int row0, rows;
  int key0, keys;
  int64_t query_stride, key_stride;

  int64_t at(int i, int j) const { return i * query_stride + j * key_stride; }
};

template <typename T>
class ScoreRule {
 public:
  ScoreRule(const GeneralParams& general, int64_t heads_q)
      : general_(general),
        heads_q_(heads_q),
        cap_(static_cast<T>(general.softcap)),
        keep_scale_(static_cast<T>(general.dropout.keep_scale)),
        has_bias_(general.mask.data != nullptr || general.alibi_slopes.data != nullptr ||
                  general.softcap > 0.0) {}

  // The rule for one head from here on.
  void select(int64_t batch_idx, int64_t head_idx) {
    if (batch_idx != batch_idx_) {
      sequence_ = general_.sequences[batch_idx];
      band_ = general_.band(sequence_);
    }
    batch_idx_ = batch_idx;
    head_idx_ = head_idx;
    if (general_.alibi_slopes.data != nullptr) {
      slope_ = *general_.alibi_slopes.at<T>(batch_idx, head_idx);
    }
    if (general_.sinks.data != nullptr) sink_ = *general_.sinks.at<T>(batch_idx, head_idx);
  }

  const Sequence& sequence() const { return sequence_; }
  const BandMask& band() const { return band_; }
  bool has_dropout() const { return general_.dropout.rng_state != nullptr; }
  bool has_softcap() const { return cap_ > T{0}; }

  // The logit that has no value; -inf where there is none.
  T sink() const { return sink_; }

  // Whether block_mask hides the whole tile.
  bool hides(int row0, int rows, int key0, int keys) const {
    if (general_.block_mask.data == nullptr) return false;
    bool is_on = false;
    for_each_block({row0, rows, key0, keys, 0, 0},
                   [&](int, int, int, int, bool block_is_on) { is_on |= block_is_on; });
    return !is_on;
  }

  // Scores scale * q . k become what the softmax is taken of.
  void apply(const ScoreTile& tile, T* scores) const {
    if (has_bias_) add_bias(tile, scores);
    if (!block_is_full(band_, tile.row0, tile.row0 + tile.rows - 1, tile.key0, tile.keys)) {
      apply_band(tile, scores);
    }
    if (general_.block_mask.data != nullptr) {
      for_each_block(tile, [&](int i0, int i1, int j0, int j1, bool is_on) {
        for (int i = i0; !is_on && i < i1; ++i) {
          for (int j = j0; j < j1; ++j) scores[tile.at(i, j)] = -INFINITY;
        }
      });
    }
  }

  // Multiplies by keep / (1 - dropout_p): P on its way to P V, and dP.
  void drop(const ScoreTile& tile, T* values) const {
    const int64_t batch_head = batch_idx_ * heads_q_ + head_idx_;
    for (int i = 0; i < tile.rows; ++i) {
      for (int j = 0; j < tile.keys; ++j) {
        const int row = tile.row0 + i, key = tile.key0 + j;
        const Philox4 group = dropout_group(general_.dropout, batch_head, row, key);
        T& value = values[tile.at(i, j)];
        value = is_kept(general_.dropout, group, row, key) ? value * keep_scale_ : T{0};
      }
    }
  }

  // d cap(s) / ds at the scores scale * q . k, in their place.
  void cap_derivative(const ScoreTile& tile, T* scores) const {
    for_each(tile, [&](int i, int j) {
      T& s = scores[tile.at(i, j)];
      const T tanh = std::tanh(s / cap_);
      s = T{1} - tanh * tanh;
    });
  }

  // Distance of a query and a key along the row, as ALiBi counts it.
  T distance(int row, int key) const {
    return static_cast<T>(std::abs(int64_t{row} + band_.diagonal - key));
  }

 private:
  template <typename Function>
  static void for_each(const ScoreTile& tile, const Function& f) {
    for (int i = 0; i < tile.rows; ++i) {
      for (int j = 0; j < tile.keys; ++j) f(i, j);
    }
  }

  void add_bias(const ScoreTile& tile, T* scores) const {
    const ScoreTensor& mask = general_.mask;
    for_each(tile, [&](int i, int j) {
      const int row = tile.row0 + i, key = tile.key0 + j;
      T s = scores[tile.at(i, j)];
      if (has_softcap()) s = cap_ * std::tanh(s / cap_);
      if (general_.alibi_slopes.data != nullptr) s -= slope_ * distance(row, key);
      if (mask.data != nullptr) {
        const T value = mask_value<T, c10::Half, c10::BFloat16>(
            general_.mask_type, mask.data, mask.offset(batch_idx_, head_idx_, row, key));
        s = value == static_cast<T>(-INFINITY) ? value : s + value;
      }
      scores[tile.at(i, j)] = s;
    });
  }

  void apply_band(const ScoreTile& tile, T* scores) const {
    for (int i = 0; i < tile.rows; ++i) {
      const int begin = std::min(band_.key_begin(tile.row0 + i) - tile.key0, tile.keys);
      const int end = std::max(band_.key_end(tile.row0 + i) - tile.key0, 0);
      for (int j = 0; j < begin; ++j) scores[tile.at(i, j)] = -INFINITY;
      for (int j = end; j < tile.keys; ++j) scores[tile.at(i, j)] = -INFINITY;
    }
  }

  // Calls f(i0, i1, j0, j1, is_on) for the part of each block of block_mask that lies in the tile.
  template <typename Function>
  void for_each_block(const ScoreTile& tile, const Function& f) const {
    const BlockMask& blocks = general_.block_mask;
    const int size = blocks.block_size;
    const int row_end = tile.row0 + tile.rows, key_end = tile.key0 + tile.keys;
    for (int row = tile.row0; row < row_end; row = (row / size + 1) * size) {
      const int next_row = std::min((row / size + 1) * size, row_end);
      for (int key = tile.key0; key < key_end; key = (key / size + 1) * size) {
        const int next_key = std::min((key / size + 1) * size, key_end);
        f(row - tile.row0, next_row - tile.row0, key - tile.key0, next_key - tile.key0,
          blocks.is_on(batch_idx_, head_idx_, row / size, key / size));
      }
    }
  }

  const GeneralParams& general_;
  const int64_t heads_q_;
  const T cap_, keep_scale_;
  const bool has_bias_;
  int64_t batch_idx_ = -1, head_idx_ = -1;
  Sequence sequence_;
  BandMask band_;
  T slope_ = T{0};
  T sink_ = static_cast<T>(-INFINITY);
};

}  // namespace flash_ext::cpu
