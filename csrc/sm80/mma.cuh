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
  struct FragmentA {
    uint32_t hi[4], lo[4];
  };
  struct FragmentB {
    uint32_t hi[2], lo[2];
  };

  static __device__ __forceinline__ void split(uint32_t bits, uint32_t& hi, uint32_t& lo) {
    const float x = __uint_as_float(bits);
    hi = ptx::cvt_rna_tf32(x);
    lo = ptx::cvt_rna_tf32(x - __uint_as_float(hi));
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
    ptx::mma_m16n8k8_tf32(d, a.lo, b.hi[0], b.hi[1]);
    ptx::mma_m16n8k8_tf32(d, a.hi, b.lo[0], b.lo[1]);
    ptx::mma_m16n8k8_tf32(d, a.hi, b.hi[0], b.hi[1]);
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
