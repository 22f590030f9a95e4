// A row-major tile in shared memory, swizzled so that neither ldmatrix nor 16-byte copies conflict.
//
// Rows are cut into 16-byte chunks; chunk c of row r lies at chunk c ^ (r % 8). Eight rows of one
// chunk column, which is what ldmatrix reads at once, thus hit eight different groups of four
// banks:
//
//   row 0:  0 1 2 3 4 5 6 7      row 2:  2 3 0 1 6 7 4 5
//   row 1:  1 0 3 2 5 4 7 6      row 3:  3 2 1 0 7 6 5 4   ...
#pragma once

#include <cstdint>

namespace flash_ext::sm80 {

template <typename Element_, int kRows_, int kCols_>
struct SmemTile {
  using Element = Element_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(Element));  // elements of 16 bytes
  static constexpr int kChunksPerRow = kCols / kChunk;
  static constexpr int kRowBytes = kCols * static_cast<int>(sizeof(Element));
  static_assert(kChunksPerRow % 8 == 0, "the swizzle permutes groups of eight chunks (128 bytes)");

  alignas(128) Element data[kRows * kCols];

  // Byte offset of chunk `chunk` of row `row`.
  __device__ static constexpr int chunk_offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ (row & 7)) * 16);
  }

  __device__ static constexpr int byte_offset(int row, int col) {
    return chunk_offset(row, col / kChunk) + (col % kChunk) * static_cast<int>(sizeof(Element));
  }

  __device__ char* bytes() { return reinterpret_cast<char*>(data); }
  __device__ Element& at(int row, int col) {
    return *reinterpret_cast<Element*>(bytes() + byte_offset(row, col));
  }
};

}  // namespace flash_ext::sm80
