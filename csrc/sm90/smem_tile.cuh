// A row-major tile of 16-bit elements in shared memory as TMA writes and wgmma reads it.
//
// The tile is cut into slabs of 64 columns. A slab's rows are 128 bytes, eight chunks of 16 bytes,
// and chunk c of row r lies at chunk c ^ (r % 8) (the 128-byte swizzle):
//
//   slab 0: columns 0..63        slab 1: columns 64..127    ...
//   row 0:  0 1 2 3 4 5 6 7      row 0:  0 1 2 3 4 5 6 7
//   row 1:  1 0 3 2 5 4 7 6      row 1:  1 0 3 2 5 4 7 6
//   ...                          ...
#pragma once

#include <cstdint>

#include "ptx/smem_addr.cuh"

namespace flash_ext::sm90 {

inline constexpr int kSlabCols = 64;
inline constexpr int kSlabRowBytes = 128;

template <typename Element_, int kRows_, int kCols_>
struct SmemTile {
  using Element = Element_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kSlabs = (kCols + kSlabCols - 1) / kSlabCols;
  static constexpr int kSlabBytes = kRows * kSlabRowBytes;
  static constexpr int kBytes = kSlabs * kSlabBytes;
  static_assert(sizeof(Element) == 2);
  static_assert(kRows % 8 == 0, "the swizzle permutes eight rows");

  alignas(1024) char data[kBytes];

  __device__ char* slab(int index) { return data + index * kSlabBytes; }

  // Byte offset of the 16-byte chunk that holds column `col` of row `row`.
  __device__ static constexpr int chunk_offset(int row, int col) {
    return col / kSlabCols * kSlabBytes + row * kSlabRowBytes +
           (((col % kSlabCols / 8) ^ (row & 7)) * 16);
  }
};

// What wgmma is told about an operand in shared memory (PTX ISA 9.7.15.5.1). Address and strides
// are in units of 16 bytes; the swizzle repeats every eight rows of 128 bytes.
class Descriptor {
 public:
  // Rows of the tile are rows of A, or columns of B; k runs along a row.
  template <typename Tile>
  __device__ static Descriptor k_major(const Tile& tile) {
    return Descriptor(tile, 16);  // not read where k fills whole rows of 128 bytes
  }

  // k runs down the rows: row k of the tile is row k of B.
  template <typename Tile>
  __device__ static Descriptor mn_major(const Tile& tile) {
    return Descriptor(tile, Tile::kSlabBytes);
  }

  // B of which all rows are alike: eight elements of 16 bits each column, read twice.
  template <typename Element>
  __device__ static Descriptor same_along_k(const Element (*columns)[8]) {
    return Descriptor(uint64_t{8 * 16 / 16} << 32 |  // no swizzle; from eight columns to the next
                      (ptx::smem_addr(columns) & 0x3ffff) >> 4);
  }

  // The operand that begins `index` tiles further on.
  template <typename Tile>
  __device__ __forceinline__ Descriptor tile(int index) const {
    return Descriptor(bits_ + index * (sizeof(Tile) / 16));
  }

  // The operand that begins at another row of the tile, a multiple of eight.
  __device__ __forceinline__ Descriptor from_row(int row) const {
    return Descriptor(bits_ + row * (kSlabRowBytes / 16));
  }

  // The operand that begins so many bytes further on, for the instruction.
  __device__ __forceinline__ uint64_t at(int bytes) const { return bits_ + bytes / 16; }

 private:
  __device__ explicit Descriptor(uint64_t bits) : bits_(bits) {}
  template <typename Tile>
  __device__ Descriptor(const Tile& tile, int leading_bytes)
      : bits_(uint64_t{1} << 62 |                                // 128-byte swizzle
              uint64_t{8 * kSlabRowBytes / 16} << 32 |           // from eight rows to the next
              static_cast<uint64_t>(leading_bytes / 16) << 16 |  // from slab to slab
              // In a cluster the address carries the thread block's rank above bit 18.
              (ptx::smem_addr(&tile) & 0x3ffff) >> 4) {}

  uint64_t bits_;
};

}  // namespace flash_ext::sm90
