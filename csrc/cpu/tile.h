// What the CPU algorithms share: scratch tiles, rows of strided tensors, and the list of tiles that
// threads take their work from.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/tile_ops.h"
#include "params.h"

namespace flash_ext::cpu {

// `columns` rounded up to whole vectors: the row stride of a tile.
template <typename T>
int64_t padded(int64_t columns) {
  constexpr int64_t kLanes = kTileAlignment / sizeof(T);
  return (columns + kLanes - 1) / kLanes * kLanes;
}

// Zero-initialised, aligned memory with row stride `ld`.
template <typename T>
class Tile {
 public:
  Tile(int64_t rows, int64_t columns)
      : ld(padded<T>(columns)),
        size_(rows * ld),
        data_(static_cast<T*>(::operator new[](size_ * sizeof(T), kAlignment))) {
    fill(T{});
  }

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  T* row(int64_t i) { return data_.get() + i * ld; }
  const T* row(int64_t i) const { return data_.get() + i * ld; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  void fill(T value) {
    for (int64_t i = 0; i < size_; ++i) data_[i] = value;
  }

  const int64_t ld;

 private:
  static constexpr std::align_val_t kAlignment{kTileAlignment};
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, kAlignment); }
  };

  int64_t size_;
  std::unique_ptr<T[], Free> data_;
};

// One value per lane of a tile, or per row.
template <typename T>
class Lanes : public Tile<T> {
 public:
  explicit Lanes(int64_t count) : Tile<T>(1, count) {}
};

template <typename T>
T* row_pointer(const TensorView& view, int64_t batch_idx, int64_t head_idx, int64_t row) {
  return static_cast<T*>(view.data) + batch_idx * view.batch_stride + head_idx * view.head_stride +
         row * view.row_stride;
}

// Rounds the rows of a tile to Scalar and stores them from `row0` on.
template <typename Scalar>
void store_rows(const TensorView& view, int64_t batch_idx, int64_t head_idx, int64_t row0, int rows,
                int columns, const Tile<Accum<Scalar>>& tile) {
  for (int i = 0; i < rows; ++i) {
    const Accum<Scalar>* from = tile.row(i);
    Scalar* to = row_pointer<Scalar>(view, batch_idx, head_idx, row0 + i);
    for (int c = 0; c < columns; ++c) to[c] = static_cast<Scalar>(from[c]);
  }
}

// The blocks of `block` rows of all (batch, head) pairs, numbered for at::parallel_for. Threads
// take contiguous ranges of these numbers; within a head the blocks alternate between the first and
// the last ones, so that under a causal mask every range holds cheap and expensive blocks.
struct TileList {
  int64_t batch;
  int64_t heads;
  int seqlen;
  int block;

  struct Item {
    int64_t batch_idx;
    int64_t head_idx;
    int row0;
    int rows;
  };

  int64_t blocks_per_head() const { return (int64_t{seqlen} + block - 1) / block; }

  int64_t size() const { return batch * heads * blocks_per_head(); }

  Item operator[](int64_t i) const {
    const int64_t blocks = blocks_per_head();
    const int64_t pair = i / blocks;
    const int64_t step = i % blocks;
    const int64_t block_idx = step % 2 == 0 ? step / 2 : blocks - 1 - step / 2;
    const int row0 = static_cast<int>(block_idx * block);
    return {pair / heads, pair % heads, row0, seqlen - row0 < block ? seqlen - row0 : block};
  }
};

// How many items a thread takes at least, for items of `work` multiply-adds each: below that,
// waking a thread costs more than it saves.
inline int64_t parallel_grain(int64_t work) {
  constexpr int64_t kMinWork = 1 << 18;
  return work >= kMinWork ? 1 : kMinWork / (work + 1);
}

// A tile block never needs to be larger than the sequence.
inline int clipped_block(int block, int64_t seqlen) {
  return seqlen < block ? static_cast<int>(seqlen < 1 ? 1 : seqlen) : block;
}

}  // namespace flash_ext::cpu
