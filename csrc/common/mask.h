// Which keys a query row may attend to. Every kernel, on every device, asks one of these structs
// and nothing else:
//   Mask       causal or not: what the kernels for plain attention carry, and no larger
//   BandMask   causal, window and the lengths of one sequence, for the general kernels
// Both answer the same four questions, so that block_range.h serves either.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace flash_ext {

enum class CausalMode : int {
  kNone,
  kBottomRight,  // the last query sees every key, also when lengths differ
  kTopLeft,      // query i sees keys 0..i (torch SDPA's is_causal)
};

struct Mask {
  int seqlen_q = 0;
  int seqlen_k = 0;
  bool is_causal = false;
  int causal_offset = 0;  // row i sees key j when j <= i + causal_offset

  static Mask make(CausalMode mode, int64_t seqlen_q, int64_t seqlen_k) {
    Mask mask;
    mask.seqlen_q = static_cast<int>(seqlen_q);
    mask.seqlen_k = static_cast<int>(seqlen_k);
    mask.is_causal = mode != CausalMode::kNone;
    mask.causal_offset = mode == CausalMode::kBottomRight ? mask.seqlen_k - mask.seqlen_q : 0;
    return mask;
  }

  // Row `row` sees exactly the keys [key_begin(row), key_end(row)). Both are non-decreasing in
  // `row`; the end is at least 0.
  FLASH_HOST_DEVICE int key_begin(int) const { return 0; }
  FLASH_HOST_DEVICE int key_end(int row) const {
    if (!is_causal) return seqlen_k;
    const int end = row + 1 + causal_offset;
    return end < 0 ? 0 : (end < seqlen_k ? end : seqlen_k);
  }

  // First row that sees key `key`, seqlen_q if none does, and the one behind the last. Both are
  // non-decreasing in `key`.
  FLASH_HOST_DEVICE int row_begin(int key) const {
    if (!is_causal) return 0;
    const int begin = key - causal_offset;
    return begin < 0 ? 0 : (begin < seqlen_q ? begin : seqlen_q);
  }
  FLASH_HOST_DEVICE int row_end(int) const { return seqlen_q; }
};

// A band along a diagonal: query i stands at key i + diagonal and sees the keys from `left` before
// to `right` behind that one. The diagonal ends in the bottom right corner (also where there is no
// causal mask, as in FlashAttention), except for kTopLeft, where it begins in the top left one.
struct BandMask {
  // Wider than any distance between a query and a key, and far from overflow: an open side.
  static constexpr int64_t kOpen = int64_t{1} << 33;

  int seqlen_q = 0;
  int seqlen_k = 0;
  int diagonal = 0;
  int64_t left = kOpen;
  int64_t right = kOpen;

  // window_left, window_right: keys seen on either side of the diagonal, negative for all. A causal
  // mask is a window_right of 0.
  FLASH_HOST_DEVICE static BandMask make(CausalMode mode, int64_t window_left, int64_t window_right,
                                         int seqlen_q, int seqlen_k) {
    BandMask mask;
    mask.seqlen_q = seqlen_q;
    mask.seqlen_k = seqlen_k;
    mask.diagonal = mode == CausalMode::kTopLeft ? 0 : seqlen_k - seqlen_q;
    mask.left = window_left < 0 || window_left > kOpen ? kOpen : window_left;
    mask.right = window_right < 0 || window_right > kOpen ? kOpen : window_right;
    if (mode != CausalMode::kNone) mask.right = 0;
    return mask;
  }

  // The same four questions. A row that sees nothing has key_begin >= key_end.
  FLASH_HOST_DEVICE int key_begin(int row) const { return clamp(row + diagonal - left, seqlen_k); }
  FLASH_HOST_DEVICE int key_end(int row) const {
    return clamp(row + diagonal + right + 1, seqlen_k);
  }
  FLASH_HOST_DEVICE int row_begin(int key) const { return clamp(key - diagonal - right, seqlen_q); }
  FLASH_HOST_DEVICE int row_end(int key) const {
    return clamp(key - diagonal + left + 1, seqlen_q);
  }

 private:
  FLASH_HOST_DEVICE static int clamp(int64_t x, int upper) {
    return x < 0 ? 0 : (x < upper ? static_cast<int>(x) : upper);
  }
};

}  // namespace flash_ext
