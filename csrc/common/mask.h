// Which keys a query row may attend to. Every kernel, on every device, asks this struct and nothing
// else, so that a new mask (window, padding lengths) is a change here and not in six kernels.
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

  // Row `row` sees exactly the keys [0, key_end(row)). Non-decreasing in `row`; at least 0.
  FLASH_HOST_DEVICE int key_end(int row) const {
    if (!is_causal) return seqlen_k;
    const int end = row + 1 + causal_offset;
    return end < 0 ? 0 : (end < seqlen_k ? end : seqlen_k);
  }

  // First row that sees key `key`; seqlen_q if none does. Non-decreasing in `key`.
  FLASH_HOST_DEVICE int row_begin(int key) const {
    if (!is_causal) return 0;
    const int begin = key - causal_offset;
    return begin < 0 ? 0 : (begin < seqlen_q ? begin : seqlen_q);
  }
};

}  // namespace flash_ext
