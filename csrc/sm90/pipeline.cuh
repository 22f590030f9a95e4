// A ring of shared-memory buffers between a producer and its consumers.
#pragma once

#include "ptx/mbarrier.cuh"

namespace flash_ext::sm90 {

// full[i] completes when buffer i has been filled, empty[i] when all consumers have let go of it.
template <int kStages>
struct RingBarriers {
  ptx::Mbarrier full[kStages];
  ptx::Mbarrier empty[kStages];

  __device__ void init(int consumer_arrivals) { init(1, consumer_arrivals); }
  __device__ void init(int producer_arrivals, int consumer_arrivals) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full[i], producer_arrivals);
      ptx::mbarrier_init(empty[i], consumer_arrivals);
    }
  }
};

// A walk around the ring: the buffer to use next, and the parity of the phase in which it is used.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Producer: until the consumers have let go of the buffer's previous contents.
template <int kStages>
__device__ __forceinline__ void wait_empty(RingBarriers<kStages>& ring, RingPosition<kStages> at) {
  ptx::mbarrier_wait(ring.empty[at.stage], at.phase ^ 1);
}

// Consumer: until the buffer has been filled.
template <int kStages>
__device__ __forceinline__ void wait_full(RingBarriers<kStages>& ring, RingPosition<kStages> at) {
  ptx::mbarrier_wait(ring.full[at.stage], at.phase);
}

}  // namespace flash_ext::sm90
