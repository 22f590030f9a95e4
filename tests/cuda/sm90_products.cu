// Products of csrc/sm90/warpgroup_gemm.cuh, each alone in a kernel of one warpgroup.
#include "common/numeric.cuh"
#include "harness.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"
#include "sm90/smem_tile.cuh"
#include "sm90/warpgroup_gemm.cuh"

namespace flash_ext {

// The operands lie in one of two tiles each, so that Descriptor::tile() has something to find.
template <typename ATile, typename BTile>
struct AbtStorage {
  ATile a[2];
  BTile b[2];
};

template <typename Element, int kN, int kHeadDim>
__global__ void __launch_bounds__(kWorkers)
    gemm_abt_kernel(const void* a, const void* b, int a_index, float* out) {
  using ATile = sm90::SmemTile<Element, 64, kHeadDim>;
  using BTile = sm90::SmemTile<Element, kN, kHeadDim>;
  auto& smem = shared_memory<AbtStorage<ATile, BTile>>();
  const int b_index = 1 - a_index;
  poison(&smem, sizeof(smem));
  __syncthreads();
  copy(smem.a[a_index].data, a, ATile::kBytes);
  copy(smem.b[b_index].data, b, BTile::kBytes);
  ptx::fence_proxy_async();
  __syncthreads();
  float acc[kN / 8][4];
  poison_accumulator(acc);
  ptx::wgmma_fence();
  sm90::gemm_abt<ATile, BTile>(acc,
                               sm90::Descriptor::k_major(smem.a[0]).template tile<ATile>(a_index),
                               sm90::Descriptor::k_major(smem.b[0]).template tile<BTile>(b_index));
  ptx::wgmma_wait_group<0>();
  write_accumulator(acc, out);
}

// What the product is added to, or NaN where there is nothing of the kind.
template <int kTiles>
__device__ __forceinline__ void begin_accumulator(float (&acc)[kTiles][4], const float* c) {
  if (c != nullptr) {
    read_accumulator(acc, c);
  } else {
    poison_accumulator(acc);
  }
}

template <typename Element, int kK, int kN>
__global__ void __launch_bounds__(kWorkers)
    gemm_ab_kernel(const float* a, const void* b, int b_index, const float* c, float* out) {
  using BTile = sm90::SmemTile<Element, kK, kN>;
  auto& smem = shared_memory<BTile[2]>();
  poison(&smem, sizeof(smem));
  __syncthreads();
  copy(smem[b_index].data, b, BTile::kBytes);
  ptx::fence_proxy_async();
  __syncthreads();
  float acc_a[kK / 8][4];
  read_accumulator(acc_a, a);
  uint32_t frag_a[kK / 16][4];
  sm90::pack_operand<Element>(frag_a, acc_a);
  const bool accumulates = c != nullptr;
  float acc[kN / 8][4];
  begin_accumulator(acc, c);
  ptx::wgmma_fence();
  sm90::gemm_ab<BTile>(
      acc, frag_a, sm90::Descriptor::mn_major(smem[0]).template tile<BTile>(b_index), accumulates);
  ptx::wgmma_wait_group<0>();
  write_accumulator(acc, out);
}

// A is the first or the second half of a tile of 128 rows, of which the other half is NaN.
template <typename Element, int kK, int kN>
struct SharedAbStorage {
  sm90::SmemTile<Element, 128, kK> a;
  sm90::SmemTile<Element, kK, kN> b;
};

template <typename Element, int kK, int kN>
__global__ void __launch_bounds__(kWorkers)
    gemm_ab_shared_kernel(const void* a, int row0, const void* b, const float* c, float* out) {
  using Storage = SharedAbStorage<Element, kK, kN>;
  using ATile = decltype(Storage::a);
  using BTile = decltype(Storage::b);
  constexpr int kHalfSlab = 64 * sm90::kSlabRowBytes;
  auto& smem = shared_memory<Storage>();
  poison(&smem, sizeof(smem));
  __syncthreads();
  for (int s = 0; s < ATile::kSlabs; ++s) {
    copy(smem.a.slab(s) + row0 * sm90::kSlabRowBytes, static_cast<const char*>(a) + s * kHalfSlab,
         kHalfSlab);
  }
  copy(smem.b.data, b, BTile::kBytes);
  ptx::fence_proxy_async();
  __syncthreads();
  float acc[kN / 8][4];
  begin_accumulator(acc, c);
  ptx::wgmma_fence();
  sm90::gemm_ab<ATile, BTile>(acc, sm90::Descriptor::k_major(smem.a).from_row(row0),
                              sm90::Descriptor::mn_major(smem.b), c != nullptr);
  ptx::wgmma_wait_group<0>();
  write_accumulator(acc, out);
}

extern "C" {

const char* gemm_abt(int64_t is_bf16, int64_t n, int64_t head_dim, const void* a, const void* b,
                     int64_t a_index, float* out) {
  return message_of([&] {
    with_element(is_bf16, [&](auto element) {
      with_one_of<64, 96, 128>(n, [&](auto kN) {
        with_head_dim(head_dim, [&](auto kHeadDim) {
          using Element = decltype(element);
          using ATile = sm90::SmemTile<Element, 64, kHeadDim>;
          using BTile = sm90::SmemTile<Element, kN, kHeadDim>;
          launch(gemm_abt_kernel<Element, kN, kHeadDim>, 1, kWorkers,
                 sizeof(AbtStorage<ATile, BTile>), a, b, static_cast<int>(a_index), out);
        });
      });
    });
  });
}

const char* gemm_ab(int64_t is_bf16, int64_t k, int64_t n, const float* a, const void* b,
                    int64_t b_index, const float* c, float* out) {
  return message_of([&] {
    with_element(is_bf16, [&](auto element) {
      with_one_of<64, 96, 128>(k, [&](auto kK) {
        with_head_dim(n, [&](auto kN) {
          using Element = decltype(element);
          launch(gemm_ab_kernel<Element, kK, kN>, 1, kWorkers,
                 2 * sizeof(sm90::SmemTile<Element, kK, kN>), a, b, static_cast<int>(b_index), c,
                 out);
        });
      });
    });
  });
}

const char* gemm_ab_shared(int64_t is_bf16, int64_t k, int64_t n, const void* a, int64_t row0,
                           const void* b, const float* c, float* out) {
  return message_of([&] {
    with_element(is_bf16, [&](auto element) {
      with_one_of<64, 128>(k, [&](auto kK) {
        with_head_dim(n, [&](auto kN) {
          using Element = decltype(element);
          launch(gemm_ab_shared_kernel<Element, kK, kN>, 1, kWorkers,
                 sizeof(SharedAbStorage<Element, kK, kN>), a, static_cast<int>(row0), b, c, out);
        });
      });
    });
  });
}

}  // extern "C"

}  // namespace flash_ext
