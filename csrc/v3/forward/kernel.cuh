// v3 forward: FlashAttention-3's schedule (Shah et al. 2024, arXiv 2407.08608, Algorithm 2) for
// Hopper: TMA, wgmma, specialised warps. The grid is persistent, one thread block a multiprocessor.
//
//   producer, two threads     K and V of one tile's blocks after another | Q and O of the tiles
//   consumers, 64 rows each   S = Q K^T, softmax, O += P V
//
// A warpgroup's step for block j, the last visible block first; j + 1 is the block before:
//   1. wait for K_j, then for the turn, in some shapes at a tile's first block alone (general
//   calls:
//      before, unpack a float mask, to which S is added)
//   2. issue S = Q K_j^T; wait for V_j+1; issue O += P V_j+1; pass the turn on
//   3. wait for S, let go of K_j, mask it if the block lies on an edge (general calls: softcap,
//      attn_mask and ALiBi before that)
//   4. the first weights, by the row maximum so far   } the tensor cores compute O meanwhile
//   5. wait for O, let go of V_j+1
//   6. the other weights, P; only where their sums say that the maximum has grown by more than 2^8
//      of weight that maximum, the weights again, and O rescaled: see softmax.cuh
// Blocks on an edge, and kernels without registers for scores beside weights, begin 4 with the row
// maximum. Dropout's random numbers are drawn beside the weights in 6, see dropout.cuh.
//
//   tensor cores  | S0 | PV0   | S1 | PV1   | S0 | PV0   | S1 | PV1   |      0, 1: warpgroups
//   softmax 0          |####################|    |####################|
//   softmax 1     #####|         |####################|    |####################|
//
// A tile's first block has no P V beside it, its last P V no S: there 1 / l and L are computed. O
// leaves through the warpgroup's own rows of Q while the next tile begins, sent by the producer:
// consumers that send it, and wait until TMA has read it, take 3 to 10% longer at d=128 up to 1k
// keys. With a single Q buffer O leaves straight from registers, and the next Q arrives from the
// last S on. The next tile's first S issued behind the last P V, before O leaves, is up to 7%
// slower, two halves of a block's S in flight at d=64 4 to 15% (H200).
//
// Barriers                     who arrives                          who waits
//   K, V full, a stage         the producer, then TMA's bytes       consumers
//   K, V empty, a stage        every consumer warp                  K/V thread of the producer
//   Q full, buffer and group   the producer, then TMA's bytes       the group
//   Q empty, buffer and group  the group's warps, O lying there     Q thread of the producer
//   named 1.. (turns)          the group before, the group itself   the group whose turn it is
//   named behind these         one group, where it alters its Q     the group
//
// General calls with lengths that the GPU reads have tiles and tensor maps from
// prepare_sequences.cuh. Only the producer's two threads ask for them.
//
// Under a block_mask the K/V thread announces each block beside the buffer it loads K to, and which
// warpgroups see it (sparse_producer.cuh). The others pass over it: they let go of K and V at once,
// while the P V of the block that they saw last may still be to come (sparse_consumer.cuh). Turns
// are for a tile's first block alone, whoever sees it.
//
// That is for blocks of 64 scores a side, or beside biases and windows. Where the mask's blocks are
// no smaller than a tile of 128 rows no warpgroup passes over anything (uniform_consumer.cuh), and
// each thread block takes the tile that is next when it is free (tile_queue.cuh).
//
// Budget at                    d=64      d=64, short  d=128     d=256
//   consumers x keys           3 x 128   4 x 64       2 x 128   2 x 64
//   Q, K, V in shared memory   48+64+64  64+64+64     64+64+64  64+64+64 KB
//   registers of a consumer    160       112          232       232
//   of which S, half of it P   64        32           64        32
//   of which O                 32        32           64        128
#pragma once

#include "ptx/griddepcontrol.cuh"
#include "v3/forward/consumer.cuh"
#include "v3/forward/producer.cuh"
#include "v3/forward/sparse_consumer.cuh"
#include "v3/forward/uniform_consumer.cuh"

namespace flash_ext::v3::forward {

template <typename Config>
__global__ void __launch_bounds__(Config::kNumThreads, 1)
    forward_kernel(const __grid_constant__ typename Config::Params p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Config::SharedStorage*>(smem_bytes);
  if (threadIdx.x == 0) {
    smem.k_barriers.init(4 * Config::kConsumers);  // a warp at a time
    smem.v_barriers.init(4 * Config::kConsumers);
    for (auto& ring : smem.q_barriers) ring.init(4);
    smem.init_mask();
    smem.tiles.init();
    ptx::mbarrier_init_fence();
  }
  smem.number_columns();
  __syncthreads();
  if constexpr (Config::kIsGeneral) ptx::griddepcontrol_wait();  // for what EntryTables hold

  const int warpgroup_idx = ptx::warp_uniform(threadIdx.x / 128);
  if (warpgroup_idx == 0) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if constexpr (Config::kIsSparse) {
      if (threadIdx.x < 32) produce_sparse_kv<Config>(smem, p);
    } else {
      if (threadIdx.x == 0) produce_kv<Config>(smem, p);
    }
    if (threadIdx.x == 32) produce_q<Config>(smem, p);
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    using ConsumerType = std::conditional_t<
        Config::kIsUniform, UniformConsumer<Config>,
        std::conditional_t<Config::kIsSparse, SparseConsumer<Config>, Consumer<Config>>>;
    ConsumerType(smem, p, warpgroup_idx - 1).run();
  }
#endif
}

}  // namespace flash_ext::v3::forward
