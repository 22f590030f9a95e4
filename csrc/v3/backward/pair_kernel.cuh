// v3 backward at head_dim 256, where registers and shared memory hold 64 keys of a thread block:
// two thread blocks, a cluster, share a tile of 128 keys. The grid is persistent; a tile's keys
// stay while its query blocks pass. Four warpgroups, each with one thing to do:
//
//   producers, three threads   K and V of a tile | Q, L, delta of a query block | its dO
//   dV                         S^T = K Q^T, P^T = exp2(S^T - L), dV += P^T dO
//   dK                         dP^T = V dO^T, dS^T = P^T * (dP^T - delta), dK += dS^T Q
//   dQ                         dQ = dS K, added to memory
//
// dQ's sum runs over keys, those of both thread blocks too. Each computes half of the columns for
// all 128 keys, from the other's dS, which comes through the cluster (8 KB), and with the other's
// half of K, which TMA loads a second time. Alone, a thread block would add twice as much to
// memory, 64 KB for each query block, and at this speed that is all that L2 takes.
//
// A query block i, on its way:
//   dV   publish P_i (where dS_i will be) | dV += P_i^T dO_i | S_i+1 | P_i+1
//   dK   dS_i-1 complete: send it | dK += dS_i-1^T Q_i-1, dP_i | P_i awaited: dS_i in its place
//   dQ   dS_i and the other's awaited | a slab of 64 columns | the next slab, while the one before
//        leaves for memory between the products
// so that every warpgroup has products in the tensor cores' queue while others compute.
//
// Barriers                        who arrives                         who waits
//   K, V full                     the producer, then TMA's bytes      dV and dQ (K), dK (V)
//   K, V empty                    all three warpgroups (K), dK (V)    K/V thread of the producer
//   Q full, a stage               the producer, then TMA's bytes      dV, dK
//   Q empty, a stage              dV behind S, dK behind dK           Q thread of the producer
//   dO full, a half's stage       the producer, then TMA's bytes      dV, dK
//   dO empty, a half's stage      dV behind dV, dK behind dP          dO thread of the producer
//   P full, a stage and warp      dV's warp                           dK's warp of the same keys
//   dS full, a stage              dK                                  dK, dQ
//   dS empty, a stage             dK, dQ, the other block's dQ        dV, before it writes P there
//   other dS full, a stage        dK, then the other block's bytes    dQ
//
// Budget
//   shared memory   K, V 64; half of the other's K 16; Q 2 x 32; dO 3 halves of 16; P and dS, two
//                   of 8; the other's dS, two of 8: 224 KB of 227
//   registers       dV 200, of which dV 128, S 32, P 16; dK 192; dQ 88; producers 32
//
// H200, bf16, 4k tokens without a mask, TFLOP/s in one run: dQ added in bursts 455, between the
// products 493; a remote arrival with release semantics, which waits for these additions, 10 less.
// Two warpgroups that own half of the columns of all three gradients: 472.
#pragma once

#include "ptx/warpgroup.cuh"
#include "v3/backward/pair_dk.cuh"
#include "v3/backward/pair_dq.cuh"
#include "v3/backward/pair_dv.cuh"
#include "v3/backward/pair_producer.cuh"

namespace flash_ext::v3::backward {

template <typename Config>
__global__ void
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // what else is compiled for, and never runs it, has no clusters
__cluster_dims__(Config::kClusterSize)
#endif
    __launch_bounds__(Config::kNumThreads, 1) pair_kernel(const __grid_constant__ KernelParams p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(smem_bytes);
  if (threadIdx.x == 0) {
    smem.k_barriers.init(3 * 4);  // a warp at a time
    smem.v_barriers.init(4);
    smem.q_barriers.init(2 * 4);
    smem.dout_barriers.init(2 * 4);
    for (auto& stage : smem.p_full) {
      for (auto& bar : stage) ptx::mbarrier_init(bar, 1);
    }
    smem.ds_barriers.init(4, 3 * 4);
    for (auto& bar : smem.other_ds_full) ptx::mbarrier_init(bar, 1);
    ptx::mbarrier_init_fence();
  }
  ptx::cluster_sync();

  const int warpgroup_idx = ptx::warp_uniform(threadIdx.x / 128);
  if (warpgroup_idx == 0) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x == 0) produce_keys<Config>(smem, p);
    if (threadIdx.x == 32) produce_queries<Config>(smem, p);
    if (threadIdx.x == 64) produce_douts<Config>(smem, p);
  } else if (warpgroup_idx == 1) {
    ptx::setmaxnreg_inc<Config::kDvRegisters>();
    ValueGradient<Config>(smem, p).run();
  } else if (warpgroup_idx == 2) {
    ptx::setmaxnreg_inc<Config::kDkRegisters>();
    KeyGradient<Config>(smem, p).run();
  } else {
    ptx::setmaxnreg_dec<Config::kDqRegisters>();
    QueryGradient<Config>(smem, p).run();
  }
  __syncwarp();
  ptx::cluster_sync();  // the other thread block may still write to this one's shared memory
#endif
}

}  // namespace flash_ext::v3::backward
