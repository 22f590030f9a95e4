// Tiles whose lengths nobody knows before the launch, as under a block_mask: each goes to the
// thread block that asks next. Dealt out beforehand, 16k keys of which a quarter are seen took 1.04
// times as long (H200, d=64).
#pragma once

#include "sm90/pipeline.cuh"

namespace flash_ext::v3::forward {

// The tiles, by their numbers, that a thread block's K/V warp has taken and its Q thread follows.
struct TileQueue {
  static constexpr int kTiles = 4;
  using Position = sm90::RingPosition<kTiles>;

  int index[kTiles];
  sm90::RingBarriers<kTiles> barriers;

  __device__ void init() { barriers.init(1); }

  // By a whole warp. `counter`: how many tiles have been taken by all.
  __device__ __forceinline__ int take(Position& at, int* counter) {
    int taken = 0;
    if (threadIdx.x % 32 == 0) {
      taken = atomicAdd(counter, 1);
      sm90::wait_empty(barriers, at);
      index[at.stage] = taken;
      ptx::mbarrier_arrive(barriers.full[at.stage]);
    }
    at.advance();
    return __shfl_sync(0xffffffffu, taken, 0);
  }

  // By one thread: the same numbers.
  __device__ __forceinline__ int follow(Position& at) {
    sm90::wait_full(barriers, at);
    const int taken = index[at.stage];
    ptx::mbarrier_arrive(barriers.empty[at.stage]);
    at.advance();
    return taken;
  }
};
struct NoQueue {
  __device__ void init() {}
};

}  // namespace flash_ext::v3::forward
