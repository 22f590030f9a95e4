// Copies of csrc/sm90/copy_tile.cuh and the ring of csrc/sm90/pipeline.cuh, each alone in a kernel.
#include "harness.cuh"
#include "params.h"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "sm90/copy_tile.cuh"
#include "sm90/pipeline.cuh"
#include "sm90/smem_tile.cuh"
#include "sm90/tensor_map.h"

namespace flash_ext {

// ---- tiles by TMA -----------------------------------------------------------------------------

// Thread block (x, y, z) of a grid takes rows x * kRows.. of head y of batch z.
__device__ int64_t block_index() {
  return (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
}
__device__ sm90::TileCoords block_coords(int rows) {
  return {static_cast<int>(blockIdx.x) * rows, static_cast<int>(blockIdx.y),
          static_cast<int>(blockIdx.z)};
}

template <typename Tile>
struct TileStorage {
  Tile tile;
  char behind[1024];
  ptx::Mbarrier full;
  int done;
  static constexpr int kDumpedBytes = Tile::kBytes + 1024;
};

template <typename Tile>
__global__ void __launch_bounds__(kThreadsWhereSomeoneWaits)
    load_tile_kernel(const __grid_constant__ CUtensorMap map, char* dump) {
  auto& smem = shared_memory<TileStorage<Tile>>();
  if (threadIdx.x < kWorkers) poison(&smem, smem.kDumpedBytes);
  ptx::fence_proxy_async();
  if (threadIdx.x == 0) {
    smem.done = 0;
    ptx::mbarrier_init(smem.full, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == kFeeder) {
    sm90::load_tile(smem.tile, map, smem.full, block_coords(Tile::kRows));
  }
  if (threadIdx.x == kWatchdog) trap_unless_done(smem.done);
  if (threadIdx.x >= kWorkers) return;
  ptx::mbarrier_wait(smem.full, 0);
  copy(dump + block_index() * smem.kDumpedBytes, &smem, smem.kDumpedBytes);
  atomicAdd(&smem.done, 1);
}

// A tile's accumulator and row factors per thread block; dumps the tile and sends it off.
template <typename Tile>
__global__ void __launch_bounds__(kWorkers)
    store_tile_kernel(const __grid_constant__ CUtensorMap map, const float* accumulators,
                      const float* factors, char* dump) {
  auto& smem = shared_memory<TileStorage<Tile>>();
  poison(&smem, smem.kDumpedBytes);
  __syncthreads();
  float acc[Tile::kCols / 8][4];
  read_accumulator(acc, accumulators + block_index() * 64 * Tile::kCols);
  const int row0 = threadIdx.x / 32 * 16;
  const int lane_idx = threadIdx.x % 32;
  const float* const row_factors = factors + block_index() * 64 + row0 + lane_idx / 4;
  const float factor[2] = {row_factors[0], row_factors[8]};
  sm90::store_accumulator(smem.tile, acc, factor, row0, lane_idx);
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    sm90::store_slabs(smem.tile, map, block_coords(64));
    ptx::tma_store_commit_group();
    ptx::tma_store_wait_read();
  }
  __syncthreads();
  copy(dump + block_index() * smem.kDumpedBytes, &smem, smem.kDumpedBytes);
}

// ---- the ring ---------------------------------------------------------------------------------

using RingTile = sm90::SmemTile<__half, 8, 64>;

template <int kStages>
struct RingStorage {
  RingTile tiles[kStages];
  sm90::RingBarriers<kStages> barriers;
  int done;
};

// Item i is tile i of the map's tensor. Each of four consumer warps, on its own, writes the sum of
// every item's elements to sums[warp][item]. Someone dawdles now and then, so that the producer
// comes to wait for the slowest warp and every warp for the producer.
template <int kStages>
__global__ void __launch_bounds__(kThreadsWhereSomeoneWaits)
    ring_kernel(const __grid_constant__ CUtensorMap map, int items, int* sums) {
  auto& smem = shared_memory<RingStorage<kStages>>();
  if (threadIdx.x == 0) {
    smem.done = 0;
    smem.barriers.init(kWorkers / 32);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  sm90::RingPosition<kStages> at;
  if (threadIdx.x == kFeeder) {
    for (int item = 0; item < items; ++item) {
      if (item / 32 % 2 == 1) __nanosleep(4000);
      sm90::wait_empty(smem.barriers, at);
      sm90::load_tile(smem.tiles[at.stage], map, smem.barriers.full[at.stage],
                      {item * RingTile::kRows, 0, 0});
      at.advance();
    }
  }
  if (threadIdx.x == kWatchdog) trap_unless_done(smem.done);
  if (threadIdx.x >= kWorkers) return;
  const int warp_idx = threadIdx.x / 32;
  const int lane_idx = threadIdx.x % 32;
  for (int item = 0; item < items; ++item) {
    sm90::wait_full(smem.barriers, at);
    if (item % 7 == warp_idx) __nanosleep(20000);
    const auto* elements = reinterpret_cast<const __half*>(smem.tiles[at.stage].data);
    int sum = 0;
    for (int i = lane_idx; i < RingTile::kRows * RingTile::kCols; i += 32) {
      sum += static_cast<int>(__half2float(elements[i]));
    }
    sum = __reduce_add_sync(0xffffffffu, sum);
    if (lane_idx == 0) {
      sums[warp_idx * items + item] = sum;
      ptx::mbarrier_arrive(smem.barriers.empty[at.stage]);
    }
    at.advance();
  }
  atomicAdd(&smem.done, 1);
}

// ---- launches ----------------------------------------------------------------------------------

// A tensor as it comes from Python: address, sizes, and strides of all dimensions but the last.
struct Tensor {
  int64_t data, batch, heads, seqlen, head_dim, batch_stride, head_stride, row_stride;

  template <typename Element>
  CUtensorMap map(int box_rows) const {
    const TensorView view{reinterpret_cast<void*>(data), batch_stride, head_stride, row_stride,
                          true};
    return sm90::make_tensor_map<Element>(view, batch, heads, seqlen, head_dim, box_rows);
  }
  dim3 grid(int64_t row_tiles) const {
    return dim3(static_cast<unsigned>(row_tiles), static_cast<unsigned>(heads),
                static_cast<unsigned>(batch));
  }
};

extern "C" {

int64_t chunk_offset(int64_t row, int64_t col) {
  return sm90::SmemTile<__half, 96, 192>::chunk_offset(static_cast<int>(row),
                                                       static_cast<int>(col));
}

const char* load_tiles(int64_t is_bf16, int64_t rows, int64_t cols, const Tensor* tensor,
                       int64_t row_tiles, char* dump) {
  return message_of([&] {
    with_element(is_bf16, [&](auto element) {
      with_one_of<64, 96, 128>(rows, [&](auto kRows) {
        with_head_dim(cols, [&](auto kCols) {
          using Tile = sm90::SmemTile<decltype(element), kRows, kCols>;
          launch(load_tile_kernel<Tile>, tensor->grid(row_tiles), kThreadsWhereSomeoneWaits,
                 sizeof(TileStorage<Tile>), tensor->map<decltype(element)>(kRows), dump);
        });
      });
    });
  });
}

const char* store_tiles(int64_t is_bf16, int64_t cols, const Tensor* tensor, int64_t row_tiles,
                        const float* accumulators, const float* factors, char* dump) {
  return message_of([&] {
    with_element(is_bf16, [&](auto element) {
      with_head_dim(cols, [&](auto kCols) {
        using Tile = sm90::SmemTile<decltype(element), 64, kCols>;
        launch(store_tile_kernel<Tile>, tensor->grid(row_tiles), kWorkers,
               sizeof(TileStorage<Tile>), tensor->map<decltype(element)>(Tile::kRows), accumulators,
               factors, dump);
      });
    });
  });
}

const char* walk_ring(int64_t stages, const Tensor* tensor, int64_t items, int* sums) {
  return message_of([&] {
    with_one_of<1, 2, 3, 4>(stages, [&](auto kStages) {
      launch(ring_kernel<kStages>, 1, kThreadsWhereSomeoneWaits, sizeof(RingStorage<kStages>),
             tensor->map<__half>(RingTile::kRows), static_cast<int>(items), sums);
    });
  });
}

}  // extern "C"

}  // namespace flash_ext
