// What the general kernels do to the scores of a block, as a warp holds them in the accumulators of
// mma: general.h's steps 1 to 5, dropout, and what the gradients need of them. One object for one
// batch entry and query head. Every feature is a branch that all threads of the grid take alike.
#pragma once

#include "common/block_range.h"
#include "common/general.h"
#include "common/numeric.cuh"
#include "common/online_softmax.cuh"

namespace flash_ext {

// Scores leave the rule in units of `exponent`: where something is added to them, in natural units;
// otherwise as plain attention has them, q . k, so that the scale costs nothing and rounds nothing.
struct ScoreScale {
  SoftmaxScale exponent;
  float softmax_scale;
  bool is_biased;

  ScoreScale(double softmax_scale, const GeneralParams& general)
      : exponent(has_bias(general) ? 1.0 : softmax_scale),
        softmax_scale(static_cast<float>(softmax_scale)),
        is_biased(has_bias(general)) {}

 private:
  static bool has_bias(const GeneralParams& general) {
    const bool adds_mask = general.mask.data != nullptr && general.mask_type != MaskType::kBool;
    return adds_mask || general.softcap > 0.0 || general.alibi_slopes.data != nullptr;
  }
};

// Calls f(m, n, i) for the elements of a warp's accumulator. Element i of tile m, n lies in row
// 16 m + 8 (i / 2) and column 8 n + i % 2 from the thread's first.
template <int kM, int kN, typename Function>
__device__ __forceinline__ void for_each_element(const Function& f) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(m, n, i);
}

// Which elements of an accumulator dropout keeps: one bit each.
template <int kM, int kN>
struct KeptElements {
  static_assert(4 * kM * kN <= 32, "one register");
  uint32_t bits;

  // Those are multiplied by `factor`, others become 0.
  __device__ __forceinline__ void drop(float (&acc)[kM][kN][4], float factor) const {
    for_each_element<kM, kN>([&](int m, int n, int i) {
      acc[m][n][i] = (bits >> ((m * kN + n) * 4 + i) & 1) != 0 ? acc[m][n][i] * factor : 0.f;
    });
  }
};

template <typename Element>
class ScoreRule {
 public:
  __device__ __forceinline__ ScoreRule(const GeneralParams& general, const ScoreScale& scale,
                                       const BandMask& band, int batch_idx, int head_idx,
                                       int heads_q)
      : general_(general),
        scale_(scale),
        band_(band),
        batch_idx_(batch_idx),
        head_idx_(head_idx),
        batch_head_(batch_idx * heads_q + head_idx) {
    if (has_alibi()) slope_ = *general.alibi_slopes.at<const float>(batch_idx, head_idx);
  }

  __device__ __forceinline__ bool has_softcap() const { return general_.softcap > 0.0; }
  __device__ __forceinline__ bool has_alibi() const {
    return general_.alibi_slopes.data != nullptr;
  }
  __device__ __forceinline__ bool has_dropout() const {
    return general_.dropout.rng_state != nullptr;
  }
  __device__ __forceinline__ const Dropout& dropout() const { return general_.dropout; }
  __device__ __forceinline__ bool has_sink() const { return general_.sinks.data != nullptr; }
  __device__ __forceinline__ const SoftmaxScale& exponent() const { return scale_.exponent; }
  __device__ __forceinline__ const BandMask& band() const { return band_; }

  // -inf where there is none, which takes no part in a softmax.
  __device__ __forceinline__ float sink() const {
    return has_sink() ? *general_.sinks.at<const float>(batch_idx_, head_idx_) : -INFINITY;
  }

  // Steps 1 to 5 for products q . k. `row0`, `col0`: the thread's first row and column. `is_full`:
  // the band hides nothing of the block. on_tanh(m, n, i, tanh) sees what the softcap has made.
  template <int kM, int kN, typename OnTanh>
  __device__ __forceinline__ void apply(float (&acc)[kM][kN][4], int row0, int col0, bool is_full,
                                        const OnTanh& on_tanh) const {
    if (scale_.is_biased) {
      if (has_softcap()) {
        cap(acc, on_tanh);
      } else {
        for_each_element<kM, kN>(
            [&](int m, int n, int i) { acc[m][n][i] *= scale_.softmax_scale; });
      }
      if (has_alibi()) {
        for_each_distance(acc, row0, col0,
                          [&](float& s, float distance) { s = fmaf(-slope_, distance, s); });
      }
    } else {
      scale_.exponent.apply_sign(acc);
    }
    if (general_.mask.data != nullptr) {
      if (general_.mask_type == MaskType::kBool) {
        add_mask<bool>(acc, row0, col0);
      } else if (general_.mask_type == MaskType::kFloat) {
        add_mask<float>(acc, row0, col0);
      } else if constexpr (sizeof(Element) == 2) {  // the operators take no other than q's type
        add_mask<Element>(acc, row0, col0);
      }
    }
    if (!is_full) hide(acc, row0, col0);
  }

  template <int kM, int kN>
  __device__ __forceinline__ void apply(float (&acc)[kM][kN][4], int row0, int col0,
                                        bool is_full) const {
    apply(acc, row0, col0, is_full, [](int, int, int, float) {});
  }

  // What dropout keeps of a block; the warp's first column of it is a multiple of 16.
  template <int kM, int kN>
  __device__ __forceinline__ KeptElements<kM, kN> kept(int row0, int col0) const {
    constexpr int kGroup = kN < 4 ? kN : 4;  // column tiles that one evaluation serves
    static_assert(kN % kGroup == 0, "whole groups");
    const uint64_t state[2] = {general_.dropout.rng_state[0], general_.dropout.rng_state[1]};
    Dropout dropout = general_.dropout;
    dropout.rng_state = state;
    KeptElements<kM, kN> kept{0};
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n0 = 0; n0 < kN; n0 += kGroup) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int col = col0 + 8 * n0 + i;
          Philox4 group = dropout_group(dropout, batch_head_, row0 + 16 * m, col);
          if (kGroup < 4 && (col & 16) != 0) {  // its upper half
            group.word[0] = group.word[2];
            group.word[1] = group.word[3];
          }
#pragma unroll
          for (int n = 0; n < kGroup; ++n) {
            const uint32_t word = group.word[n];
            const int bit = (m * kN + n0 + n) * 4 + i;
            kept.bits |= static_cast<uint32_t>((word & 0xffff) >= dropout.threshold) << bit;
            kept.bits |= static_cast<uint32_t>(word >> 16 >= dropout.threshold) << (bit + 2);
          }
        }
      }
    }
    return kept;
  }

  // Calls f(element, |i + diagonal - j|) for all.
  template <int kM, int kN, typename Function>
  __device__ __forceinline__ void for_each_distance(float (&acc)[kM][kN][4], int row0, int col0,
                                                    const Function& f) const {
    // In fp32, where a distance beyond 2^24 is rounded as its product with the slope is anyway.
    const float first = static_cast<float>(row0 + band_.diagonal - col0);
    for_each_element<kM, kN>([&](int m, int n, int i) {
      f(acc[m][n][i], fabsf(first + static_cast<float>(16 * m + 8 * (i / 2) - 8 * n - i % 2)));
    });
  }

 private:
  template <int kM, int kN, typename OnTanh>
  __device__ __forceinline__ void cap(float (&acc)[kM][kN][4], const OnTanh& on_tanh) const {
    const float softcap = static_cast<float>(general_.softcap);
    const float factor = scale_.softmax_scale / softcap;
    for_each_element<kM, kN>([&](int m, int n, int i) {
      const float tanh = tanhf(acc[m][n][i] * factor);
      on_tanh(m, n, i, tanh);
      acc[m][n][i] = softcap * tanh;
    });
  }

  // Rows and keys past the end read the last ones instead: what becomes of them shows nowhere.
  template <typename MaskElement, int kM, int kN>
  __device__ __forceinline__ void add_mask(float (&acc)[kM][kN][4], int row0, int col0) const {
    const ScoreTensor& mask = general_.mask;
    const auto* data =
        static_cast<const MaskElement*>(mask.data) + mask.offset(batch_idx_, head_idx_, 0, 0);
    for_each_element<kM, kN>([&](int m, int n, int i) {
      const int row = min(row0 + 16 * m + 8 * (i / 2), band_.seqlen_q - 1);
      const int col = min(col0 + 8 * n + i % 2, band_.seqlen_k - 1);
      const MaskElement x = data[row * mask.row_stride + col * mask.key_stride];
      float& s = acc[m][n][i];
      if constexpr (sizeof(MaskElement) == 1) {
        s = x ? s : -INFINITY;
      } else {
        s = to_float(x) == -INFINITY ? -INFINITY : s + to_float(x);
      }
    });
  }

  template <int kM, int kN>
  __device__ __forceinline__ void hide(float (&acc)[kM][kN][4], int row0, int col0) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + 16 * m + 8 * half;
        const int key_begin = band_.key_begin(row);
        const int key_end = band_.key_end(row);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int col = col0 + 8 * n + i;
            if (col < key_begin || col >= key_end) acc[m][n][2 * half + i] = -INFINITY;
          }
        }
      }
    }
  }

  const GeneralParams& general_;
  const ScoreScale& scale_;
  const BandMask band_;
  const int batch_idx_, head_idx_, batch_head_;
  float slope_ = 0.f;
};

// The tiles of general kernels are at most 64 rows high and 64 keys wide, and begin at multiples of
// what they are: each lies in one block of a block_mask.
inline constexpr int kMaxGeneralTile = 64;

// Whether the tile with this first row and key is on in the block_mask, if there is one.
__device__ __forceinline__ bool tile_is_on(const BlockMask& mask, int batch_idx, int head_idx,
                                           int row, int key) {
  if (mask.data == nullptr) return true;
  const int shift = 31 - __clz(mask.block_size);
  return mask.is_on(batch_idx, head_idx, row >> shift, key >> shift);
}

// The first of `blocks` from `n_block` on that is on for the rows of a tile; blocks.end if none is.
__device__ __forceinline__ int next_key_block(const BlockMask& mask, int batch_idx, int head_idx,
                                              int m0, int n_block, int block_n,
                                              const BlockRange& blocks) {
  while (n_block < blocks.end && !tile_is_on(mask, batch_idx, head_idx, m0, n_block * block_n)) {
    ++n_block;
  }
  return n_block;
}

}  // namespace flash_ext
