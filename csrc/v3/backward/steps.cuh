// The steps of a general kernel's tile: blocks of query rows, of every query head in the group, of
// which band and block_mask leave something. The producer finds them before they are needed and
// announces each beside its Q and dO; nobody else counts.
#pragma once

#include <climits>

#include "v3/backward/general_params.cuh"
#include "v3/backward/workspace.h"

namespace flash_ext::v3::backward {

struct alignas(16) StepWork {
  static constexpr int kIsLast = 1 << 16;  // of the tile
  // A step's place is written anew when the stage of its successor's successor is free. By then
  // that one's predecessor has its dQ in shared memory, and this one's has been sent.
  static constexpr int kSlots = 4;

  int flags;  // seen() by consumer warpgroup 0, by 1 in the next byte, kIsLast
  int row0;
  int64_t row_block;               // see row_block()
  int next_row0, next_batch_head;  // of the next step of the tile, if there is one
};

// What a consumer warpgroup sees of a step: a bit for each 64 rows of which it sees something, and
// this one where it does not see all of them.
inline constexpr int kIsMasked = 4;

// The rows that see some of 64 keys by the band, and those of them that see all.
class BandRows {
 public:
  __device__ __forceinline__ BandRows(const BandMask& band, int key0) {
    if (key0 >= band.seqlen_k) return;
    const bool are_keys = key0 + 64 <= band.seqlen_k;
    begin_ = band.row_begin(key0);
    end_ = band.row_end(min(key0 + 64, band.seqlen_k) - 1);
    full_begin_ = are_keys ? band.row_begin(key0 + 63) : INT_MAX;
    full_end_ = band.row_end(key0);
    if (full_end_ == band.seqlen_q) full_end_ = INT_MAX;  // rows behind the last have no weights
  }

  // Of kBlockM rows from row0 on. `on`: what the block_mask leaves.
  template <int kBlockM>
  __device__ __forceinline__ int seen(int row0, int on) const {
    int parts = 0;
#pragma unroll
    for (int part = 0; part < kBlockM / 64; ++part) {
      const int row = row0 + 64 * part;
      if (row < end_ && row + 64 > begin_) parts |= on & 1 << part;
    }
    if (parts == 0) return 0;
    const int first = row0 + (parts == 2 ? 64 : 0);
    const int past = row0 + (parts == 1 ? 64 : 128);
    return first >= full_begin_ && past <= full_end_ ? parts : parts | kIsMasked;
  }

 private:
  int begin_ = 0, end_ = 0, full_begin_ = 0, full_end_ = 0;
};

// Of the block_mask, which parts of a tile's rows and keys stand on which of its rows and columns.
// Its blocks are no smaller than the parts, of 64 each, but may be smaller than the tile.
template <int kBlockM>
class MaskGrid {
  static constexpr int kLogBlockM = kBlockM == 64 ? 6 : 7;
  static_assert(kBlockM == 1 << kLogBlockM && kBackwardBlockN == 128);

 public:
  __device__ __forceinline__ explicit MaskGrid(const GeneralKernelParams& p)
      : p_(p), shift_(6 + p.block_mask.block_size / 128) {}

  __device__ __forceinline__ int row_of(int m_block, int part = 0) const {
    return shift_ >= kLogBlockM ? m_block >> (shift_ - kLogBlockM) : 2 * m_block + part;
  }
  // The block of query rows that a row of the mask begins in.
  __device__ __forceinline__ int m_block_of(int row) const {
    return shift_ >= kLogBlockM ? row << (shift_ - kLogBlockM) : row >> 1;
  }

  // A bit for each of kCount rows of the mask, for either half of a tile's keys. Off past its ends.
  template <int kCount>
  __device__ __forceinline__ void load(uint32_t (&bits)[2], int batch_idx, int head_idx, int row,
                                       int n_block) const {
    const BlockMask& mask = p_.block_mask;
    const int key0 = n_block * kBackwardBlockN;
    const bool* first =
        static_cast<const bool*>(mask.data) + mask.offset(batch_idx, head_idx, row, key0 >> shift_);
    const int rows = min(ceil_div(p_.band.seqlen_q, mask.block_size) - row, kCount);
    bits[0] = column<kCount>(first, rows);
    bits[1] = bits[0];
    if (shift_ > 6) return;
    bits[1] = key0 + 64 < p_.band.seqlen_k ? column<kCount>(first + mask.key_stride, rows) : 0;
  }

  // From `n_block` on, the first key tile for which some of a block of query rows is on.
  __device__ __forceinline__ int next_on(int batch_idx, int head_idx, int m_block,
                                         int n_block) const {
    for (; n_block < p_.schedule.order.tiles_per_head; ++n_block) {
      uint32_t bits[2];
      load<kBlockM / 64>(bits, batch_idx, head_idx, row_of(m_block), n_block);
      const uint32_t rows = shift_ >= kLogBlockM ? 1 : 3;
      if (((bits[0] | bits[1]) & rows) != 0) break;
    }
    return n_block;
  }

 private:
  template <int kCount>
  __device__ __forceinline__ uint32_t column(const bool* first, int rows) const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool is_on = i < rows && first[i * p_.block_mask.row_stride];
      bits |= static_cast<uint32_t>(is_on) << i;
    }
    return bits;
  }

  const GeneralKernelParams& p_;
  const int shift_;  // a row of the mask is 2^6 to 2^8 queries
};

// By one thread: a walk over the steps of a tile. The block_mask is read some rows at a time, for a
// read takes as long as a third of a step.
template <int kBlockM>
class StepWalk {
  static constexpr int kMaskRows = 8;
  static constexpr int kParts = kBlockM / 64;

 public:
  // `blocks`: of query rows, those that the band leaves.
  __device__ __forceinline__ StepWalk(const GeneralKernelParams& p, const BandMask& band,
                                      int batch_idx, int kv_head_idx, int n_block,
                                      BlockRange blocks)
      : p_(p),
        grid_(p),
        batch_idx_(batch_idx),
        n_block_(n_block),
        blocks_(blocks),
        rows_{{band, n_block * kBackwardBlockN}, {band, n_block * kBackwardBlockN + 64}},
        past_last_head_((kv_head_idx + 1) * p.group_size),
        head_idx_(blocks.begin < blocks.end ? kv_head_idx * p.group_size : past_last_head_),
        m_block_(blocks.begin) {}

  struct Step {
    int head_idx, m_block;
    int flags;  // of StepWork
    bool exists;
  };

  __device__ __forceinline__ Step next() {
    constexpr int kAll = (1 << kParts) - 1;
    int on[2] = {kAll, kAll};
    if (p_.block_mask.data != nullptr) {
      find_on(on);
    } else if (m_block_ >= blocks_.end) {
      next_head();
    }
    if (head_idx_ >= past_last_head_) return {0, 0, 0, false};
    const int m_block = m_block_++;
    const int row0 = m_block * kBlockM;
    const int flags = rows_[0].template seen<kBlockM>(row0, on[0]) |
                      rows_[1].template seen<kBlockM>(row0, on[1]) << 8;
    return {head_idx_, m_block, flags, true};
  }

 private:
  __device__ __forceinline__ void next_head() {
    ++head_idx_;
    m_block_ = blocks_.begin;
    past_loaded_ = 0;
  }

  // To the next block of rows of which the mask leaves something: to `on`, for either 64 keys.
  __device__ __forceinline__ void find_on(int (&on)[2]) {
    while (head_idx_ < past_last_head_) {
      const int row = grid_.row_of(m_block_);
      if (m_block_ >= blocks_.end) {
        next_head();
      } else if (row >= past_loaded_) {
        grid_.template load<kMaskRows>(bits_, batch_idx_, head_idx_, row, n_block_);
        first_loaded_ = row;
        past_loaded_ = row + kMaskRows;
      } else {
        const uint32_t left = (bits_[0] | bits_[1]) >> (row - first_loaded_);
        const int next_row = left == 0 ? past_loaded_ : row + __ffs(left) - 1;
        m_block_ = max(m_block_, grid_.m_block_of(next_row));
        if (left == 0 || m_block_ >= blocks_.end) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          on[half] = 0;
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const int bit = grid_.row_of(m_block_, part) - first_loaded_;
            on[half] |= (bits_[half] >> bit & 1) << part;
          }
        }
        return;
      }
    }
  }

  const GeneralKernelParams& p_;
  const MaskGrid<kBlockM> grid_;
  const int batch_idx_, n_block_;
  const BlockRange blocks_;
  const BandRows rows_[2];  // of either half of the keys
  const int past_last_head_;
  int head_idx_, m_block_;
  uint32_t bits_[2] = {};
  int first_loaded_ = 0, past_loaded_ = 0;  // rows of the mask, whose bits these are
};

}  // namespace flash_ext::v3::backward
