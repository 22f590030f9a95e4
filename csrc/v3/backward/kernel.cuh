// v3 backward at head_dim up to 128: FlashAttention-2's backward (Dao 2023, arXiv 2307.08691,
// Algorithm 2) on wgmma and TMA, by specialised warps. The grid is persistent, one thread block a
// multiprocessor; a tile is a block of 128 keys of one key head.
//
//   producer, one thread      announces the tiles; loads K, V, and of each step Q, dO, L, delta
//   gradients, one thread     sends dV and dK off
//   dQ, one thread            adds dQ to memory
//   consumers, 64 keys each   the products
//
// A tile's steps are the query blocks that see it, of every query head in the group. Everything is
// computed transposed, keys down the rows, so that P and dS are operands of the next products as
// the registers hold them:
//   1. S^T = K Q^T and dP^T = V dO^T are issued
//   2. wait for S; P = exp2(S - L); wait for dP; dS = P * (dP - delta)
//   3. dS goes to shared memory, where its rows are queries, for dQ
//   4. dV += P^T dO, dK += dS^T Q from registers
//   5. dQ = dS (K - mean of K), which needs the dS of both warpgroups. They compute it in turns:
//   while
//      one does, the other runs ahead into its next softmax. It leaves through shared memory.
//
// Of general kernels' steps (window, block_mask) the producer announces each beside its Q and dO,
// and what of it each consumer sees: see steps.cuh. A consumer that sees nothing leaves dS = 0.
//
// Between two tiles nothing waits for memory. K and V of the next one arrive behind the last step;
// dV goes to shared memory at the end of the tile and dK, for which there is no room beside it, in
// the middle of the next tile's first step, when its registers are needed.
//
// What binds is shared memory. At head_dim 128 a step took 3,485 clocks with all of V read from
// there, in which ncu counts 2,670 wavefronts (and not TMA's 512): S and dP read 128 bytes a clock,
// dV and dK 64, dQ 96, beside dS, dQ on its way out, and the row statistics, which every thread
// reads. The tensor cores need 2,560. So a part of V stays in registers (Config::kVSteps).
// H200, measured and dropped, at head_dim 128: both warpgroups computing half of each dQ a step
// later, so that neither waits, 2 to 4% slower; dQ from registers by red.v4, half the columns each,
// 1 to 9%; dQ's first summand stored instead of added to zeros, 6%; dQ's last one followed by the
// conversion to elements, 250%; its zeros written by this kernel shortly before, 4 to 6% at 512
// (they have left L2 when they are added to); all three kernels for a few batch entries at a time,
// so that the accumulator stays in L2, 3 to 38% at 512, 5 to 13% at 2k; the next tile's first
// operands fetched to L2 by the producer, which then spilled more, 2 to 11%; dV before dS: C7512.
//
// Barriers                     who arrives                        who waits
//   tile full                  the producer                       everyone else
//   tile empty                 everyone else                      the producer
//   query full                 the producer, then TMA's bytes     consumers
//   query empty                every consumer warp                the producer
//   K, V full / empty          likewise
//   centred K full / empty     every consumer warp                consumers, at a tile's first dQ /
//                                                                 before it is overwritten
//   gradient full / empty      every consumer warp / its thread   its thread / consumers
//   dQ full / empty            the owner's warps / its thread     its thread / the next owner
//   dQ sent                    its thread, at the end of a tile   consumers that leave dK there
//   named 1, 2                 consumers: dS is in shared memory  consumers that need it for dQ
// and those of mask_tiles.cuh.
#pragma once

#include "v3/backward/producer.cuh"
#include "v3/backward/tile_consumer.cuh"

namespace flash_ext::v3::backward {

template <typename Config>
__global__ void __launch_bounds__(Config::kNumThreads, 1)
    backward_kernel(const __grid_constant__ typename Config::Params p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kConsumerWarps = 4 * Config::kConsumers;
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(smem_bytes);
  if (threadIdx.x == 0) {
    smem.tile_barriers.init(1, kConsumerWarps + 2);
    smem.query_barriers.init(1, kConsumerWarps);
    smem.k_barriers.init(1, kConsumerWarps);
    smem.v_barriers.init(1, kConsumerWarps);
    smem.k_centred_barriers.init(kConsumerWarps, kConsumerWarps);
    smem.gradient_barriers.init(kConsumerWarps, 1);
    smem.dq_barriers.init(4, 1);
    ptx::mbarrier_init(smem.dq_sent, 1);
    if constexpr (Config::kHasMask) smem.mask_barriers[0].init();
    ptx::mbarrier_init_fence();
  }
  __syncthreads();

  const int warp_idx = ptx::warp_uniform(threadIdx.x / 32);
  if (warp_idx < 4) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x == 0) Producer<Config>(smem, p).run();
    if (threadIdx.x == 32) send_gradients<Config>(smem, p);
    if (threadIdx.x == 64) add_dq<Config>(smem, p);
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    TileConsumer<Config>(smem, p, warp_idx / 4 - 1).run();
  }
#endif
}

}  // namespace flash_ext::v3::backward
