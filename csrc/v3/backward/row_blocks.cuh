// Where a block of query rows lies, for the kernels around the main one.
#pragma once

#include "v3/backward/general_params.cuh"
#include "v3/backward/general_workspace.h"

namespace flash_ext::v3::backward {

struct BlockRows {
  int64_t batch_idx;
  int64_t head_idx;
  int64_t tensor_batch_idx;  // of Q's tensors: 0 if they are packed
  int64_t first_row;         // there, of the batch entry
  int64_t lse_begin;         // likewise, in lse
  int row0;                  // of the block, counted in its entry
  int seqlen_q;
};

__device__ __forceinline__ BlockRows dense_rows(const KernelParams& p, int64_t batch_head, int row0,
                                                int seqlen_q) {
  const int64_t batch_idx = batch_head / p.heads_q;
  return {batch_idx, batch_head % p.heads_q, batch_idx, 0, batch_head * seqlen_q, row0, seqlen_q};
}

// `block`: as row_block() counts them.
template <int kBlockM>
__device__ __forceinline__ BlockRows rows_of_block(const KernelParams& p, int64_t block) {
  const int m_block = static_cast<int>(block % p.num_m_blocks);
  return dense_rows(p, block / p.num_m_blocks, m_block * kBlockM, p.mask.seqlen_q);
}

// Blocks that are nobody's have a seqlen_q of 0.
template <int kBlockM>
__device__ __forceinline__ BlockRows rows_of_block(const GeneralKernelParams& p, int64_t block) {
  const int m_block = static_cast<int>(block % p.num_m_blocks);
  const int64_t head_idx = block / p.num_m_blocks;
  if (!p.sequences.is_packed()) {
    return dense_rows(p, head_idx, m_block * kBlockM, p.band.seqlen_q);
  }
  const int batch_idx = p.entries.row_entries[m_block];
  if (batch_idx < 0) return {0, head_idx, 0, 0, 0, 0, 0};
  const Sequence sequence = p.sequences[batch_idx];
  const int row0 = (m_block - first_row_block(sequence, batch_idx, kBlockM)) * kBlockM;
  const int64_t lse_begin = p.sequences.lse_index(sequence, batch_idx, head_idx, p.heads_q, 0);
  return {batch_idx, head_idx, 0, sequence.q_begin, lse_begin, row0, sequence.seqlen_q};
}

// Of every block 64 rows, counted likewise.
template <int kBlockM>
__device__ __forceinline__ BlockRows rows_of_64(const KernelParams& p, int64_t rows64) {
  const int64_t rows64_per_head = int64_t{p.num_m_blocks} * (kBlockM / 64);
  return dense_rows(p, rows64 / rows64_per_head, static_cast<int>(rows64 % rows64_per_head) * 64,
                    p.mask.seqlen_q);
}
template <int kBlockM>
__device__ __forceinline__ BlockRows rows_of_64(const GeneralKernelParams& p, int64_t rows64) {
  BlockRows rows = rows_of_block<kBlockM>(p, rows64 / (kBlockM / 64));
  rows.row0 += static_cast<int>(rows64 % (kBlockM / 64)) * 64;
  return rows;
}

// A head's keys.
struct HeadKeys {
  int64_t tensor_batch_idx;
  int64_t first_row;
  int seqlen_k;
};

__device__ __forceinline__ HeadKeys keys_of(const KernelParams& p, int64_t batch_idx) {
  return {batch_idx, 0, p.mask.seqlen_k};
}
__device__ __forceinline__ HeadKeys keys_of(const GeneralKernelParams& p, int64_t batch_idx) {
  if (p.entries.maps == nullptr) return {batch_idx, 0, p.band.seqlen_k};
  const Sequence sequence = p.sequences[batch_idx];
  return {p.sequences.is_packed() ? 0 : batch_idx, sequence.k_begin, sequence.seqlen_k};
}

__device__ __forceinline__ int num_key_heads(const KernelParams& p) {
  return p.schedule.order.num_heads;
}
__device__ __forceinline__ int num_key_heads(const GeneralKernelParams& p) {
  return p.num_key_heads;
}

}  // namespace flash_ext::v3::backward
