// Dropout's random numbers: Philox4x32-7 (Salmon et al., SC 2011; of its members the fastest that
// passes BigCrush), a function of the random state and of the element's (batch, head, row, column)
// alone. So every algorithm, tile shape, layout and
// device drops the same elements, and the backward replays them without storing any.
//
// One evaluation gives eight numbers of 16 bits: for rows i, i + 8 and columns j, j + 8, j + 16,
// j + 24, which one thread of an mma or wgmma holds in its accumulators, in S as well as (half of
// them) in S^T. 16 bits: probabilities are multiples of 2^-16, and what is kept is divided by the
// very probability that is used, so that the expectation is exact.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace flash_ext {

struct Philox4 {
  uint32_t word[4];
};

// In one instruction: of the plain product nvcc adds up the upper half.
FLASH_HOST_DEVICE uint64_t multiply_wide(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

inline constexpr int kPhiloxRounds = 7;

FLASH_HOST_DEVICE Philox4 philox4x32(uint64_t key, Philox4 counter) {
  uint32_t key0 = static_cast<uint32_t>(key);
  uint32_t key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = multiply_wide(0xD2511F53u, counter.word[0]);
    const uint64_t product1 = multiply_wide(0xCD9E8D57u, counter.word[2]);
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

struct Dropout {
  // (seed, offset): 16 bytes in the memory of the device that runs the kernel, so that a replayed
  // CUDA graph sees new ones. nullptr: no dropout.
  const uint64_t* rng_state = nullptr;
  uint32_t threshold = 0;   // a number below it drops its element; 2^16 drops all
  float keep_scale = 1.0f;  // on what is kept: 1 / (1 - threshold / 2^16), or 0 if nothing is

  // The same in two factors: of weights before they are rounded for their product, lest small ones
  // lose bits in fp16, as far as large ones do not overflow there; and of the product.
  static constexpr float kMaxWeightFactor = 1024.0f;
  FLASH_HOST_DEVICE float weight_factor() const {
    return keep_scale < kMaxWeightFactor ? keep_scale : kMaxWeightFactor;
  }
  FLASH_HOST_DEVICE float product_factor() const {
    return keep_scale > kMaxWeightFactor ? keep_scale / kMaxWeightFactor : 1.0f;
  }

  static Dropout make(double probability, const void* rng_state) {
    Dropout dropout;
    dropout.rng_state = static_cast<const uint64_t*>(rng_state);
    dropout.threshold = static_cast<uint32_t>(probability * 65536.0 + 0.5);
    const uint32_t kept = 65536u - dropout.threshold;
    dropout.keep_scale = kept == 0 ? 0.0f : static_cast<float>(65536.0 / kept);
    return dropout;
  }
};

// The numbers of a group; (row, column) is any element of it. batch_head = batch * heads_q + head.
FLASH_HOST_DEVICE Philox4 dropout_group(const Dropout& dropout, int64_t batch_head, int row,
                                        int column) {
  const uint32_t group_row = (static_cast<uint32_t>(row) >> 4 << 3) | (row & 7);
  const uint32_t group_column = (static_cast<uint32_t>(column) >> 5 << 3) | (column & 7);
  return philox4x32(dropout.rng_state[0],
                    {{group_column, group_row, static_cast<uint32_t>(batch_head),
                      static_cast<uint32_t>(dropout.rng_state[1])}});
}

// Whether the element (row, column) of that group is kept.
FLASH_HOST_DEVICE bool is_kept(const Dropout& dropout, const Philox4& group, int row, int column) {
  const uint32_t word = group.word[(column >> 3) & 3];
  const uint32_t number = (row & 8) != 0 ? word >> 16 : word & 0xffff;
  return number >= dropout.threshold;
}

}  // namespace flash_ext
