// What dropout keeps of a step's scores, as scores.cuh holds them: rows are keys, columns are
// queries.
//
// P comes out of exp2 multiplied by Dropout::weight_factor() (the preprocess kernel has put it into
// L), and with it dS = P (keep dP - delta / factor), delta being divided by the factor there, too.
// So nothing is multiplied here. keep_scale is no more than that factor: v3::refusal() sees to it.
#pragma once

#include "common/numeric.cuh"
#include "common/philox.h"
#include "ptx/warpgroup.cuh"
#include "sm90/warpgroup_gemm.cuh"
#include "v3/backward/general_params.cuh"

namespace flash_ext::v3::backward {

// One bit for each element acc[n][i] of a thread.
template <int kN>
struct KeptElements {
  static constexpr int kWords = kN / 8;
  uint32_t words[kWords > 0 ? kWords : 1];

  // The upper 16 bits of `bits` become the last ones, and all others move down.
  __device__ __forceinline__ void push(uint32_t bits) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      words[i] = __funnelshift_r(words[i], i + 1 < kWords ? words[i + 1] : bits >> 16, 16);
    }
  }
  __device__ __forceinline__ bool is_kept(int n, int i) const {
    return (words[n / 8] >> (n % 8 * 4 + i) & 1) != 0;
  }
};

// Of a warp's keys in columns 0..15 (kWord = 0) or 16..31 (2) of a group of 32.
template <int kN, int kWord>
__device__ __forceinline__ KeptElements<kN> draw_kept_half(const Dropout& own, int batch_head,
                                                           int key0, int row0, int lane_idx) {
  const uint32_t lowest_high = own.threshold << 16;
  const int key = key0 + lane_idx / 4;
  const int row = row0 + lane_idx % 4 * 2;
  KeptElements<kN> kept{};
  // Not unrolled: four evaluations at once hide each other's latency, and more of them cost
  // registers that the accumulators in flight need.
#pragma unroll 1
  for (int n0 = 0; n0 < kN; n0 += 4) {
    uint32_t bits = 0;  // 16 above 16 zeros
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Philox4 group = dropout_group(own, batch_head, row + 8 * (n0 + n) + i, key);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t word = group.word[kWord + half];
          const int bit = 16 + 4 * n + 2 * half + i;
          if (word << 16 >= lowest_high) bits |= 1u << bit;
          if (word >= lowest_high) bits |= 1u << (bit + 4);
        }
      }
    }
    kept.push(bits);
  }
  return kept;
}

// Of a warp's keys from key0 on, a multiple of 16, and the queries from row0 on, likewise. One
// evaluation serves four elements of a thread: query rows r and r + 8 by keys c and c + 8. The
// other half of it is another warp's.
template <int kN>
__device__ __forceinline__ KeptElements<kN> draw_kept(const Dropout& dropout, int batch_head,
                                                      int key0, int row0, int lane_idx) {
  // Read each time, from L1: no register is free for it in between.
  const uint64_t state[2] = {dropout.rng_state[0], dropout.rng_state[1]};
  Dropout own = dropout;
  own.rng_state = state;
  return (ptx::warp_uniform(key0) & 16) != 0
             ? draw_kept_half<kN, 2>(own, batch_head, key0, row0, lane_idx)
             : draw_kept_half<kN, 0>(own, batch_head, key0, row0, lane_idx);
}

// Negates the weights that are dropped: their mark from here on. `first_n`: where acc[0] stands
// among the elements drawn.
template <int kN, int kDrawn>
__device__ __forceinline__ void mark_dropped(float (&acc_p)[kN][4],
                                             const KeptElements<kDrawn>& kept, int first_n) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!kept.is_kept(first_n + n, i)) acc_p[n][i] = -acc_p[n][i];
    }
  }
}

// P as the operand of dV, without those.
template <typename Element, bool kHasDropout, int kSteps, int kN>
__device__ __forceinline__ void pack_weights(uint32_t (&frag)[kSteps][4],
                                             const float (&acc_p)[kN][4]) {
  if constexpr (!kHasDropout) {
    sm90::pack_operand<Element>(frag, acc_p);
  } else {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        frag[n / 2][n % 2 * 2 + i] = pack_relu<Element>(acc_p[n][2 * i], acc_p[n][2 * i + 1]);
      }
    }
  }
}

}  // namespace flash_ext::v3::backward
