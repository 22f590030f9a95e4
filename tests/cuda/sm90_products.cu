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
#pragma unroll
  for (int j = 0; j < kK / 8; ++j) {
    frag_a[j / 2][j % 2 * 2] = pack<Element>(acc_a[j][0], acc_a[j][1]);
    frag_a[j / 2][j % 2 * 2 + 1] = pack<Element>(acc_a[j][2], acc_a[j][3]);
  }
  const bool accumulates = c != nullptr;
  float acc[kN / 8][4];
  if (accumulates) {
    read_accumulator(acc, c);
  } else {
    poison_accumulator(acc);
  }
  ptx::wgmma_fence();
  sm90::gemm_ab<BTile>(
      acc, frag_a, sm90::Descriptor::mn_major(smem[0]).template tile<BTile>(b_index), accumulates);
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

}  // extern "C"

}  // namespace flash_ext
