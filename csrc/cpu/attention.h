// The CPU kernels: the tile algorithms of the CUDA kernels for machines with no GPU, exact and with
// memory linear in the sequence length. Scalar is float, double, c10::Half or c10::BFloat16; 16-bit
// inputs are computed in float and rounded once, when a result is stored.
//
// Results do not depend on the number of threads: each output tile is computed by one thread, in an
// order fixed by the shape alone.
//
// Scratch, in elements of the accumulation type (float, double for double), rows rounded up to 64
// bytes: a few tiles per thread, of block_m x head_dim, block_n x head_dim and block_m x block_n;
//   forward_v1   seqlen_q * (head_dim + 2) per thread
//   backward     2 * batch * heads_q * seqlen_q + batch * heads_kv * head_dim
#pragma once

#include "params.h"

namespace flash_ext::cpu {

// Rows of Q and rows of K/V in a tile; any positive numbers.
struct TileShape {
  int block_m;
  int block_n;
};

// CPU time at 1 x 8 x 2048 x 64 fp32, AVX-512 (Xeon, 2 MiB of L2): forward 76 ms, with 64 x 64 84
// ms, 128 x 128 73 ms; causal 42, 42, 42 ms. At 4 x 4 x 256 x 64 causal smaller tiles skip more:
// backward 6.8 ms, with 128 x 64 8.3 ms.
inline TileShape default_forward_tile() { return {128, 64}; }
inline TileShape default_backward_tile() { return {64, 64}; }

// FlashAttention, Algorithm 1: K/V blocks outside, Q tiles inside. Parallel over batch and heads.
template <typename Scalar>
void forward_v1(const ForwardParams& params, TileShape tile);

// FlashAttention-2, Algorithm 1: Q tiles outside. Parallel over batch, heads and Q tiles.
template <typename Scalar>
void forward_v2(const ForwardParams& params, TileShape tile);

// Gradients of both. Those whose `data` is nullptr are not computed.
template <typename Scalar>
void backward(const BackwardParams& params, TileShape tile);

// The instruction set the tile operations run with: "avx512", "avx2" or "default".
const char* cpu_capability();

}  // namespace flash_ext::cpu
