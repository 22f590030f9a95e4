// What every kernel of the general backward gets, and the arithmetic they share.
#pragma once

#include "backward/general/workspace.h"
#include "backward/params.cuh"
#include "common/score_rule.cuh"
#include "sm80/copy_tile.cuh"

namespace flash_ext::backward {

// How the kernel of the query tiles leaves dmask.
enum class MaskGradient {
  kNone,
  kStored,  // every score has an element of its own
  kAdded,   // batch entries or heads share elements: in whatever order they come
};

struct GeneralKernelParams {
  TensorView q, k, v, out, dout, dq, dk, dv;
  const float* lse;
  const float* dlse;  // nullptr: no gradient reached L
  GeneralParams general;
  GeneralGradients gradients;
  MaskGradient mask_gradient = MaskGradient::kNone;
  ScoreScale scale;
  int head_dim;
  int batch;
  Divisor heads_q;
  Divisor heads_kv;
  Divisor group_size;
  TileOrder order{};  // of the kernel's own tiles
  StatsRows rows;
  // Sections of the workspace, see GeneralWorkspace; nullptr where they are not needed.
  float* lse_log2;
  float* delta;
  float* row_sum;  // of dS, when nothing is rounded
  float* dslope_rows;
  float* dsink_rows;
  float* key_mean;

  explicit GeneralKernelParams(const BackwardParams& params)
      : q(params.q),
        k(params.k),
        v(params.v),
        out(params.out),
        dout(params.dout),
        dq(params.dq),
        dk(params.dk),
        dv(params.dv),
        lse(static_cast<const float*>(params.lse)),
        dlse(static_cast<const float*>(params.dlse)),
        general(params.general),
        gradients(params.general_gradients),
        scale(params.softmax_scale, params.general),
        head_dim(static_cast<int>(params.shape.head_dim)),
        batch(static_cast<int>(params.shape.batch)),
        heads_q(params.shape.heads_q),
        heads_kv(params.shape.heads_kv),
        group_size(params.shape.group_size()) {
    const GeneralWorkspace sections(params);
    rows = sections.rows;
    lse_log2 = params.workspace + sections.lse_log2;
    delta = params.workspace + sections.delta;
    row_sum = params.workspace + sections.row_sum;
    key_mean = params.workspace + sections.key_mean;
    dslope_rows =
        gradients.dslopes.data != nullptr ? params.workspace + sections.dslope_rows : nullptr;
    dsink_rows =
        gradients.dsinks.data != nullptr ? params.workspace + sections.dsink_rows : nullptr;
  }
};

// The rows of a (batch, heads, ...) tensor that belong to one sequence.
template <typename Element>
__device__ __forceinline__ sm80::GmemRows<Element> rows_of_sequence(const TensorView& view,
                                                                    int batch_idx, int head_idx,
                                                                    int64_t begin, int head_dim) {
  return sm80::gmem_rows<Element>(view, batch_idx, head_idx, head_dim).from(begin);
}

// One batch entry and query head, with pointers to the numbers of its rows.
template <typename Element>
struct GeneralHead {
  int batch_idx, head_idx;
  Sequence sequence;
  ScoreRule<Element> rule;
  int64_t stats;     // of the first row in the sections of the workspace
  const float* lse;  // of the first row

  __device__ __forceinline__ GeneralHead(const GeneralKernelParams& p, const Sequence& sequence,
                                         int batch_idx, int head_idx)
      : batch_idx(batch_idx),
        head_idx(head_idx),
        sequence(sequence),
        rule(p.general, p.scale, p.general.band(sequence), batch_idx, head_idx, p.heads_q),
        stats(p.rows.begin(sequence, batch_idx, head_idx, p.heads_q)),
        lse(p.lse + p.general.sequences.lse_index(sequence, batch_idx, head_idx, p.heads_q, 0)) {}

  __device__ __forceinline__ bool is_full(int m0, int block_m, int n0, int block_n) const {
    const int last_row = min(m0 + block_m, sequence.seqlen_q) - 1;
    return block_is_full(rule.band(), m0, last_row, n0, block_n);
  }
};

// P from Q K^T in place, and in acc_slope the derivative of the softcap where there is one. `m0`,
// `n0`: the tile's first row and key; `row`, `col`: this thread's first within it. `lse_log2`: of
// the tile's rows.
template <typename Element, int kM, int kN>
__device__ __forceinline__ void recompute_p(float (&acc_s)[kM][kN][4],
                                            float (&acc_slope)[kM][kN][4],
                                            const GeneralHead<Element>& head, const float* lse_log2,
                                            int m0, int n0, int row, int col, bool is_full) {
  head.rule.apply(acc_s, m0 + row, n0 + col, is_full,
                  [&](int m, int n, int i, float tanh) { acc_slope[m][n][i] = 1.f - tanh * tanh; });
  recompute_p(acc_s, lse_log2, head.lse + m0, head.rule.exponent(), row);
}

// acc *= factor, element by element.
template <int kM, int kN>
__device__ __forceinline__ void multiply(float (&acc)[kM][kN][4],
                                         const float (&factor)[kM][kN][4]) {
  for_each_element<kM, kN>([&](int m, int n, int i) { acc[m][n][i] *= factor[m][n][i]; });
}

template <int kM, int kN>
__device__ __forceinline__ void multiply(float (&acc)[kM][kN][4], float factor) {
  for_each_element<kM, kN>([&](int m, int n, int i) { acc[m][n][i] *= factor; });
}

}  // namespace flash_ext::backward
