// What a call may ask beyond plain attention, for the general kernels of every device. Plain
// pointers and numbers, cheap to pass by value; a nullptr (or 0) is a feature that is not used.
//
// For batch entry b, query head h, query i and key j, counted within their sequence:
//   1. s = softmax_scale * (q_i . k_j)
//   2. s = softcap * tanh(s / softcap)                         softcap > 0
//   3. s = s - slope[b, h] * |i + diagonal - j|                alibi_slopes; see BandMask::diagonal
//   4. s = s + mask[b, h, i, j]                                float attn_mask
//   5. s = -inf where bool attn_mask, band (causal, window, lengths) or block_mask hide j from i
//   6. L = log(sum_j exp(s_j) + exp(sink[h])),  p_j = exp(s_j - L)
//   7. out = sum_j p_j * keep_j / (1 - dropout_p) * v_j        L is taken before dropout
// The sink takes part in the softmax and has no value, so L (lse) includes it. A query without a
// visible key has out 0 and L = sink, or -inf without one. +inf and NaN in a mask are the caller's.
//
// Gradients, with dP_j = keep_j / (1 - dropout_p) * (dO . v_j) and D = dO . out - dL:
//   dS_j = p_j (dP_j - D)           with respect to s after step 4: what float masks are given
//   dmask = dS;  dslope = -sum dS * |i + diagonal - j|;  dsink = -sum_i exp(sink - L_i) * D_i
//   d(q . k)_j = softmax_scale * dS_j * (1 - (s_j / softcap)^2), s_j as after step 2
//   rowsum(dS) = dL + exp(sink - L) * D, which the correction of dQ for the keys' mean needs
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"
#include "common/mask.h"
#include "common/philox.h"
#include "common/sequences.h"

namespace flash_ext {

// Of an attn_mask's elements.
enum class MaskType : int { kNone, kBool, kHalf, kBFloat16, kFloat, kDouble };

// A tensor broadcast to (batch, heads_q, seqlen_q, seqlen_k), strides in elements and 0 where it is
// broadcast. Within packed sequences rows and keys count from the beginning of each. Nothing beyond
// a sequence's own rows and keys is read.
struct ScoreTensor {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
  int64_t key_stride = 0;

  FLASH_HOST_DEVICE int64_t offset(int64_t batch_idx, int64_t head_idx, int64_t row,
                                   int64_t key) const {
    return batch_idx * batch_stride + head_idx * head_stride + row * row_stride + key * key_stride;
  }
};

// One number for each (batch, head) or head: fp32, fp64 for fp64 inputs.
struct HeadTensor {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;

  template <typename T>
  FLASH_HOST_DEVICE T* at(int64_t batch_idx, int64_t head_idx) const {
    return static_cast<T*>(data) + batch_idx * batch_stride + head_idx * head_stride;
  }
};

// bool, one for each block of block_size x block_size scores; row and key of ScoreTensor are
// blocks.
struct BlockMask : ScoreTensor {
  int block_size = 0;  // 64, 128 or 256

  FLASH_HOST_DEVICE bool is_on(int64_t batch_idx, int64_t head_idx, int row_block,
                               int key_block) const {
    return static_cast<const bool*>(data)[offset(batch_idx, head_idx, row_block, key_block)];
  }
};

struct GeneralParams {
  GeneralParams() = default;
  // Of a call with nothing more than a causal mask, which the CPU kernels take like any other.
  GeneralParams(CausalMode causal, int64_t seqlen_q, int64_t seqlen_k) : causal(causal) {
    sequences.max_seqlen_q = static_cast<int>(seqlen_q);
    sequences.max_seqlen_k = static_cast<int>(seqlen_k);
  }

  CausalMode causal = CausalMode::kNone;
  int64_t window_left = -1;   // keys seen before the diagonal; negative: all
  int64_t window_right = -1;  // and behind it
  ScoreTensor mask;           // attn_mask
  MaskType mask_type = MaskType::kNone;
  HeadTensor alibi_slopes;
  HeadTensor sinks;
  double softcap = 0.0;
  Dropout dropout;
  Sequences sequences;
  BlockMask block_mask;

  // The band of visible scores of one batch entry.
  FLASH_HOST_DEVICE BandMask band(const Sequence& sequence) const {
    return BandMask::make(causal, window_left, window_right, sequence.seqlen_q, sequence.seqlen_k);
  }
};

// What else the backward may be asked for; data == nullptr: not wanted. All in fp32 (fp64 for fp64
// inputs) and zero before the launch, so that kernels may add. A stride of 0 is a dimension that
// the gradient is summed over.
struct GeneralGradients {
  ScoreTensor dmask;
  HeadTensor dslopes;
  HeadTensor dsinks;

  bool any() const {
    return dmask.data != nullptr || dslopes.data != nullptr || dsinks.data != nullptr;
  }
};

// The element of a float mask, or 0 and -inf for the true and false of a bool one.
template <typename T, typename Half, typename BFloat16>
FLASH_HOST_DEVICE T mask_value(MaskType type, const void* data, int64_t offset) {
  switch (type) {
    case MaskType::kBool:
      return static_cast<const bool*>(data)[offset] ? T{0} : static_cast<T>(-INFINITY);
    case MaskType::kHalf:
      return static_cast<T>(static_cast<float>(static_cast<const Half*>(data)[offset]));
    case MaskType::kBFloat16:
      return static_cast<T>(static_cast<float>(static_cast<const BFloat16*>(data)[offset]));
    case MaskType::kFloat:
      return static_cast<T>(static_cast<const float*>(data)[offset]);
    case MaskType::kDouble:
      return static_cast<T>(static_cast<const double*>(data)[offset]);
    default:
      return T{0};
  }
}

}  // namespace flash_ext
