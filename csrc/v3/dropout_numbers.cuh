// Dropout's random numbers as a consumer warp draws them: dropout_group() of common/philox.h, bit
// for bit, with all that a thread's rows and the head decide computed once a tile. Of the
// seven rounds a column then costs 12 wide multiplications and 13 LOP3.
#pragma once

#include "common/philox.h"
#include "ptx/warpgroup.cuh"

namespace flash_ext::v3 {

class DropoutNumbers {
 public:
  // `rng_state`: as in Dropout. Once a kernel.
  __device__ __forceinline__ explicit DropoutNumbers(const uint64_t* rng_state) {
    const uint64_t seed = rng_state[0];
    key0_ = uniform(static_cast<uint32_t>(seed));
    key1_ = uniform(static_cast<uint32_t>(seed >> 32));
    offset_ = uniform(static_cast<uint32_t>(rng_state[1]));
  }

  // `group_row`: dropout_group()'s, (row / 16) * 8 + row % 8.
  __device__ __forceinline__ void begin_rows(int batch_head, int group_row) {
    const uint64_t product1 = uint64_t{kMultiplier1} * static_cast<uint32_t>(batch_head);
    const uint32_t word0 = high(product1) ^ static_cast<uint32_t>(group_row) ^ key0_;
    const uint64_t product0 = uint64_t{kMultiplier0} * word0;
    round1_word1_ = static_cast<uint32_t>(product1);
    round2_word2_ = high(product0) ^ key1(1);
    round2_word3_ = static_cast<uint32_t>(product0);
  }

  // Once a block, before its groups: the compiler is to compute the keys of the rounds anew, for as
  // 18 more uniform registers they would live on the stack.
  __device__ __forceinline__ void forget_keys() { asm volatile("" : "+r"(key0_), "+r"(key1_)); }

  // The numbers of those rows and of columns c, c + 8, c + 16, c + 24; `group_column`:
  // dropout_group()'s, (c / 32) * 8 + c % 8.
  __device__ __forceinline__ Philox4 group(int group_column) const {
    const uint64_t first = uint64_t{kMultiplier0} * static_cast<uint32_t>(group_column);
    const uint64_t second = uint64_t{kMultiplier1} * (high(first) ^ offset_ ^ key1(0));
    uint32_t word[4] = {high(second) ^ round1_word1_ ^ key0(1), static_cast<uint32_t>(second),
                        round2_word2_ ^ static_cast<uint32_t>(first), round2_word3_};
#pragma unroll
    for (int round = 2; round < kPhiloxRounds; ++round) {
      const uint64_t product0 = uint64_t{kMultiplier0} * word[0];
      const uint64_t product1 = uint64_t{kMultiplier1} * word[2];
      word[0] = high(product1) ^ word[1] ^ key0(round);
      word[1] = static_cast<uint32_t>(product1);
      word[2] = high(product0) ^ word[3] ^ key1(round);
      word[3] = static_cast<uint32_t>(product0);
    }
    return {{word[0], word[1], word[2], word[3]}};
  }

 private:
  static constexpr uint32_t kMultiplier0 = 0xD2511F53u;
  static constexpr uint32_t kMultiplier1 = 0xCD9E8D57u;

  __device__ __forceinline__ static uint32_t uniform(uint32_t x) {
    return static_cast<uint32_t>(ptx::warp_uniform(static_cast<int>(x)));
  }
  __device__ __forceinline__ static uint32_t high(uint64_t x) {
    return static_cast<uint32_t>(x >> 32);
  }
  __device__ __forceinline__ uint32_t key0(int round) const { return key0_ + round * 0x9E3779B9u; }
  __device__ __forceinline__ uint32_t key1(int round) const { return key1_ + round * 0xBB67AE85u; }

  uint32_t key0_, key1_, offset_;  // the same in all threads
  // Of rows: the words after the first and the second round that no column changes.
  uint32_t round1_word1_, round2_word2_, round2_word3_;
};

}  // namespace flash_ext::v3
