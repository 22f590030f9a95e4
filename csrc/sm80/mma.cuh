// One k-step of a warp's matrix product, for every element type the kernels take.
//
// A k-step covers 32 bytes of the contraction dimension: 16 half-precision elements, or 8 fp32 ones.
// fp32 runs on the TF32 tensor cores in three products of split operands, x = hi + lo:
// a*b ~ hi*hi + hi*lo + lo*hi, dropping only lo*lo (2^-22 of the product).
#pragma once

#include "common/numeric.cuh"
#include "ptx/mma_sync.cuh"

namespace flash_ext::sm80 {

template <typename Element>
struct Mma {
  static constexpr int kK = 16;
  static constexpr int kUnroll = 16;  // k-steps: all of them
  struct FragmentA {
    uint32_t x[4];
  };
  struct FragmentB {
    uint32_t x[2];
  };

  static __device__ __forceinline__ FragmentA make_a(const uint32_t (&r)[4]) {
    return {{r[0], r[1], r[2], r[3]}};
  }
  static __device__ __forceinline__ FragmentB make_b(uint32_t b0, uint32_t b1) { return {{b0, b1}}; }
  static __device__ __forceinline__ FragmentB make_ones_b() {
    const uint32_t ones = pack<Element>(1.f, 1.f);
    return {{ones, ones}};
  }

  static __device__ __forceinline__ void mma(float (&d)[4], const FragmentA& a, const FragmentB& b) {
    ptx::mma_m16n8k16<Element>(d, a.x, b.x[0], b.x[1]);
  }

  // k-step `k` of an accumulator as the A operand of the next product: P of P * V. The accumulator's
  // map is the operand's, so no data moves between threads.
  template <int kN>
  static __device__ __forceinline__ FragmentA from_accumulator(const float (&acc)[kN][4], int k) {
    return {{pack<Element>(acc[2 * k][0], acc[2 * k][1]), pack<Element>(acc[2 * k][2], acc[2 * k][3]),
             pack<Element>(acc[2 * k + 1][0], acc[2 * k + 1][1]),
             pack<Element>(acc[2 * k + 1][2], acc[2 * k + 1][3])}};
  }
};

template <>
struct Mma<float> {
  static constexpr int kK = 8;
  // One swizzle period. More, and ptxas keeps so many split operands in flight that it spills.
  static constexpr int kUnroll = 4;
  struct FragmentA {
    uint32_t hi[4], lo[4];
  };
  struct FragmentB {
    uint32_t hi[2], lo[2];
  };

  // The tensor core reads the upper 19 bits of an operand, 10 of them mantissa, and ignores the rest. hi
  // is what it sees of x, lo the exact remainder plus half a unit of its own last place: rounded, that
  // is. (cvt.rna.tf32 would do as well but is nine instructions on sm_90.)
  static __device__ __forceinline__ void split(uint32_t bits, uint32_t& hi, uint32_t& lo) {
    hi = bits & 0xffffe000u;
    lo = __float_as_uint(__uint_as_float(bits) - __uint_as_float(hi)) + 0x1000u;
  }

  static __device__ __forceinline__ FragmentA make_a(const uint32_t (&r)[4]) {
    FragmentA a;
#pragma unroll
    for (int i = 0; i < 4; ++i) split(r[i], a.hi[i], a.lo[i]);
    return a;
  }
  static __device__ __forceinline__ FragmentB make_b(uint32_t b0, uint32_t b1) {
    FragmentB b;
    split(b0, b.hi[0], b.lo[0]);
    split(b1, b.hi[1], b.lo[1]);
    return b;
  }
  static __device__ __forceinline__ FragmentB make_ones_b() {
    return make_b(__float_as_uint(1.f), __float_as_uint(1.f));
  }

  static __device__ __forceinline__ void mma(float (&d)[4], const FragmentA& a, const FragmentB& b) {
    // The tensor core truncates its sums, so a k-step is summed from zero and added with rounding: the
    // long sum would otherwise drift by 2^-24 of itself a step.
    float step[4] = {0.f, 0.f, 0.f, 0.f};
    ptx::mma_m16n8k8_tf32(step, a.lo, b.hi[0], b.hi[1]);
    ptx::mma_m16n8k8_tf32(step, a.hi, b.lo[0], b.lo[1]);
    ptx::mma_m16n8k8_tf32(step, a.hi, b.hi[0], b.hi[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += step[i];
  }

  // The accumulator holds columns 2t, 2t+1 where the operand wants k = t, t+4. The order of k is free
  // as long as both operands agree, so B is loaded in the order 0 2 4 6 1 3 5 7 (KOrder::kAccumulator).
  template <int kN>
  static __device__ __forceinline__ FragmentA from_accumulator(const float (&acc)[kN][4], int k) {
    const uint32_t r[4] = {__float_as_uint(acc[k][0]), __float_as_uint(acc[k][2]),
                           __float_as_uint(acc[k][1]), __float_as_uint(acc[k][3])};
    return make_a(r);
  }
};

}  // namespace flash_ext::sm80
