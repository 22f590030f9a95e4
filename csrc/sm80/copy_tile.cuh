// Tiles between global and shared memory. Rows and columns outside the tensor are zero-filled on
// load, never read: 0 * NaN of a neighbour would otherwise reach the result through P * V.
#pragma once

#include "common/numeric.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mbarrier.cuh"
#include "sm80/smem_tile.cuh"

namespace flash_ext::sm80 {

// A tile's place in a (batch, heads, seqlen, head_dim) tensor.
template <typename Element>
struct GmemRows {
  Element* data;       // row 0 of this batch and head
  int64_t row_stride;  // in elements
  int num_cols;        // head_dim
  bool aligned16;      // rows may be read and written in 16-byte chunks

  // The rows from `row` on: those of one packed sequence.
  __device__ __forceinline__ GmemRows from(int64_t row) const {
    return {data + row * row_stride, row_stride, num_cols, aligned16};
  }
};

template <typename Element, typename View>
__device__ __forceinline__ GmemRows<Element> gmem_rows(const View& view, int64_t batch_idx,
                                                       int64_t head_idx, int head_dim) {
  return {static_cast<Element*>(view.data) + batch_idx * view.batch_stride +
              head_idx * view.head_stride,
          view.row_stride, head_dim, view.aligned16};
}

// Eight neighbouring threads move one 128-byte piece of a row, so a warp touches four whole lines.
// With 64 threads or more, a thread's rows are a multiple of 8 apart: its swizzle never changes and
// its addresses in shared memory differ by constants.
template <typename Tile, int kNumThreads>
struct TileThread {
  static constexpr int kRowsPerPass = kNumThreads / 8;
  static constexpr int kPasses = Tile::kRows / kRowsPerPass;
  static constexpr int kPieces = Tile::kChunksPerRow / 8;
  static constexpr int kPieceCols = 8 * Tile::kChunk;
  static_assert(Tile::kRows % kRowsPerPass == 0, "whole passes");

  int row, col, first_offset;

  __device__ __forceinline__ explicit TileThread(int thread_idx)
      : row(thread_idx / 8),
        col(thread_idx % 8 * Tile::kChunk),
        first_offset(Tile::chunk_offset(row, thread_idx % 8)) {}

  // Byte offset of a chunk in the tile.
  __device__ __forceinline__ int offset(int pass, int piece) const {
    if constexpr (kRowsPerPass % 8 == 0) {
      return first_offset + pass * kRowsPerPass * Tile::kRowBytes + piece * 128;
    }
    return Tile::chunk_offset(row + pass * kRowsPerPass, col / Tile::kChunk) + piece * 128;
  }
};

// The same value, of which the compiler knows nothing. Addresses derived from it are computed where
// they are used instead of being held in registers across a loop, where the accumulators need the
// room: without it the head_dim 128 forward spills 68 bytes.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Starts the copy of rows [row0, row0 + kRows) that lie below `row_end`. With aligned rows it is
// asynchronous: cp_async_commit_group() and a wait must follow. Otherwise it is complete, for this
// thread, on return. `kAligned`: the caller knows that rows are, and spares the code for others.
template <int kNumThreads, bool kAligned = false, typename Tile>
__device__ __forceinline__ void load_tile(Tile& tile, const GmemRows<typename Tile::Element>& gmem,
                                          int row0, int row_end, int thread_idx) {
  using Element = typename Tile::Element;
  using Thread = TileThread<Tile, kNumThreads>;
  const Thread thread(opaque(thread_idx));
  if (kAligned || gmem.aligned16) {
    const uint32_t dst = ptx::smem_addr(tile.data);
    const Element* src = gmem.data + (row0 + thread.row) * gmem.row_stride + thread.col;
    int piece_bytes[Thread::kPieces];
#pragma unroll
    for (int piece = 0; piece < Thread::kPieces; ++piece) {
      const int left = gmem.num_cols - thread.col - piece * Thread::kPieceCols;
      piece_bytes[piece] = min(max(left, 0), Tile::kChunk) * static_cast<int>(sizeof(Element));
    }
#pragma unroll
    for (int pass = 0; pass < Thread::kPasses; ++pass) {
      const bool inside = row0 + thread.row + pass * Thread::kRowsPerPass < row_end;
#pragma unroll
      for (int piece = 0; piece < Thread::kPieces; ++piece) {
        // Of 0 bytes nothing is read, so the address may lie outside the tensor.
        ptx::cp_async_16B_zfill(dst + thread.offset(pass, piece), src + piece * Thread::kPieceCols,
                                inside ? piece_bytes[piece] : 0);
      }
      src += Thread::kRowsPerPass * gmem.row_stride;
    }
    return;
  }
  if constexpr (!kAligned) {
#pragma unroll 1
    for (int i = thread_idx; i < Tile::kRows * Tile::kCols; i += kNumThreads) {
      const int row = i / Tile::kCols;
      const int col = i % Tile::kCols;
      const bool inside = row0 + row < row_end && col < gmem.num_cols;
      tile.at(row, col) =
          inside ? gmem.data[(row0 + row) * gmem.row_stride + col] : from_float<Element>(0.f);
    }
  }
}

// Arrives at `bar`, whose count is the number of threads, when this thread's copies are complete.
// `are_async`: all of them were of aligned rows.
__device__ __forceinline__ void arrive_when_copied(ptx::Mbarrier& bar, bool are_async) {
  if (are_async) {
    ptx::cp_async_mbarrier_arrive(ptx::smem_addr(&bar));
    return;
  }
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  ptx::mbarrier_arrive(bar);
}

// Arrives at `bar`, whose count is the number of warps: this warp's reads or writes so far are
// done.
__device__ __forceinline__ void warp_arrive(ptx::Mbarrier& bar, int lane_idx) {
  __syncwarp();
  if (lane_idx == 0) ptx::mbarrier_arrive(bar);
}

// Writes the rows below `row_end` and the columns below gmem.num_cols. `kAligned`: whole chunks.
template <int kNumThreads, bool kAligned = false, typename Tile>
__device__ __forceinline__ void store_tile(const GmemRows<typename Tile::Element>& gmem, Tile& tile,
                                           int row0, int row_end, int thread_idx) {
  using Element = typename Tile::Element;
  using Thread = TileThread<Tile, kNumThreads>;
  const Thread thread(opaque(thread_idx));
  Element* dst = gmem.data + (row0 + thread.row) * gmem.row_stride + thread.col;
  if (kAligned || (gmem.aligned16 && gmem.num_cols % Tile::kChunk == 0)) {
#pragma unroll
    for (int pass = 0; pass < Thread::kPasses; ++pass) {
      const bool inside = row0 + thread.row + pass * Thread::kRowsPerPass < row_end;
#pragma unroll
      for (int piece = 0; piece < Thread::kPieces; ++piece) {
        if (inside && thread.col + piece * Thread::kPieceCols < gmem.num_cols) {
          *reinterpret_cast<uint4*>(dst + piece * Thread::kPieceCols) =
              *reinterpret_cast<const uint4*>(tile.bytes() + thread.offset(pass, piece));
        }
      }
      dst += Thread::kRowsPerPass * gmem.row_stride;
    }
    return;
  }
  if constexpr (!kAligned) {
#pragma unroll 1
    for (int i = 0; i < Thread::kPasses * Thread::kPieces; ++i) {
      const int row = row0 + thread.row + i / Thread::kPieces * Thread::kRowsPerPass;
      const int col = thread.col + i % Thread::kPieces * Thread::kPieceCols;
      if (row >= row_end) return;
      const char* src = tile.bytes() + thread.offset(i / Thread::kPieces, i % Thread::kPieces);
#pragma unroll 1
      for (int e = 0; e < Tile::kChunk && col + e < gmem.num_cols; ++e) {
        gmem.data[row * gmem.row_stride + col + e] = reinterpret_cast<const Element*>(src)[e];
      }
    }
  }
}

}  // namespace flash_ext::sm80
