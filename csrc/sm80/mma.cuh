// One k-step of a warp's matrix product, 16 elements of the contraction dimension, for every
// element type the kernels take. A fragment is loaded in pieces of 32 bytes of that dimension: one
// piece for 16-bit elements, two for fp32.
//
// fp32 runs on the TF32 tensor cores in three products of split operands, x = hi + lo:
// a*b ~ hi*hi + hi*lo + lo*hi, dropping only lo*lo (at most 2^-22 of the product, of either sign).
#pragma once

#include "common/numeric.cuh"
#include "ptx/mma_sync.cuh"

namespace flash_ext::sm80 {

inline constexpr int kMmaK = 16;

template <typename Element>
struct Mma {
  static constexpr int kPieces = 1;
  static constexpr int kUnroll = 16;  // k-steps: all of them
  struct FragmentA {
    uint32_t x[4];
    __device__ __forceinline__ void set(int, const uint32_t (&r)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = r[i];
    }
  };
  struct FragmentB {
    uint32_t x[2];
    __device__ __forceinline__ void set(int, uint32_t b0, uint32_t b1) {
      x[0] = b0;
      x[1] = b1;
    }
  };

  static __device__ __forceinline__ FragmentB ones_b() {
    const uint32_t ones = pack<Element>(1.f, 1.f);
    return {{ones, ones}};
  }

  static __device__ __forceinline__ void mma(float (&d)[4], const FragmentA& a,
                                             const FragmentB& b) {
    ptx::mma_m16n8k16<Element>(d, a.x, b.x[0], b.x[1]);
  }

  // k-step `k` of an accumulator as the A operand of the next product: P of P * V. The
  // accumulator's map is the operand's, so no data moves between threads.
  template <int kN>
  static __device__ __forceinline__ FragmentA from_accumulator(const float (&acc)[kN][4], int k) {
    return {{pack<Element>(acc[2 * k][0], acc[2 * k][1]),
             pack<Element>(acc[2 * k][2], acc[2 * k][3]),
             pack<Element>(acc[2 * k + 1][0], acc[2 * k + 1][1]),
             pack<Element>(acc[2 * k + 1][2], acc[2 * k + 1][3])}};
  }
};

template <>
struct Mma<float> {
  static constexpr int kPieces = 2;
  // Two of them are one period of the swizzle. More, and ptxas keeps so many split operands in
  // flight that it spills.
  static constexpr int kUnroll = 2;

  // The tensor core reads the upper 19 bits of an operand, 10 of them mantissa, and ignores the
  // rest. hi is x rounded to them, lo the exact remainder, of either sign; what the tensor core
  // cuts off lo is at most 2^-21 of x. (cvt.rna.tf32 would round as well, in nine instructions on
  // sm_90.)
  static __device__ __forceinline__ void split(uint32_t bits, uint32_t& hi, uint32_t& lo) {
    constexpr uint32_t kHalfUnit = 0x1000u;
    hi = (bits + kHalfUnit) & 0xffffe000u;
    lo = __float_as_uint(__uint_as_float(bits) - __uint_as_float(hi));
  }

  struct FragmentA {
    uint32_t hi[2][4], lo[2][4];
    __device__ __forceinline__ void set(int piece, const uint32_t (&r)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) split(r[i], hi[piece][i], lo[piece][i]);
    }
  };
  struct FragmentB {
    uint32_t hi[2][2], lo[2][2];
    __device__ __forceinline__ void set(int piece, uint32_t b0, uint32_t b1) {
      split(b0, hi[piece][0], lo[piece][0]);
      split(b1, hi[piece][1], lo[piece][1]);
    }
  };

  static __device__ __forceinline__ FragmentB ones_b() {
    FragmentB b;
    const uint32_t one = __float_as_uint(1.f);
    b.set(0, one, one);
    b.set(1, one, one);
    return b;
  }

  static __device__ __forceinline__ void mma(float (&d)[4], const FragmentA& a,
                                             const FragmentB& b) {
    // The tensor core truncates its sums, so a k-step is summed from zero and added with rounding:
    // the long sum would otherwise drift by 2^-24 of itself an instruction.
    float step[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      ptx::mma_m16n8k8_tf32(step, a.lo[piece], b.hi[piece][0], b.hi[piece][1]);
      ptx::mma_m16n8k8_tf32(step, a.hi[piece], b.lo[piece][0], b.lo[piece][1]);
    }
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      ptx::mma_m16n8k8_tf32(step, a.hi[piece], b.hi[piece][0], b.hi[piece][1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += step[i];
  }

  // The accumulator holds columns 2t, 2t+1 where the operand wants k = t, t+4. The order of k is
  // free as long as both operands agree, so B is loaded in the order 0 2 4 6 1 3 5 7
  // (KOrder::kPaired).
  template <int kN>
  static __device__ __forceinline__ FragmentA from_accumulator(const float (&acc)[kN][4], int k) {
    FragmentA a;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const float (&x)[4] = acc[2 * k + piece];
      a.set(piece, {__float_as_uint(x[0]), __float_as_uint(x[2]), __float_as_uint(x[1]),
                    __float_as_uint(x[3])});
    }
    return a;
  }
};

}  // namespace flash_ext::sm80
