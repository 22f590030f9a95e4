// One function per input rule. Every message reads
//   flash_ext.<operator>: <argument> <rule>, got <value>
// Sizes are compared as SymInt, so that the same rules hold while torch.compile traces.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <optional>
#include <string_view>

#include "algorithm.h"
#include "common/mask.h"

namespace flash_ext {

constexpr int64_t kMaxHeadDim = 256;

// Kernels count rows and keys in int; the last tile may reach past the end by less than this.
constexpr int64_t kMaxSeqlen = (int64_t{1} << 31) - 1024;

// A tensor under its public name, and the operator it was given to.
struct Argument {
  const char* op;
  const char* name;
  const at::Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& stream, const Argument& arg) {
  return stream << "flash_ext." << arg.op << ": " << arg.name;
}

inline void check_rank(const Argument& arg) {
  TORCH_CHECK(arg.tensor.dim() == 4, arg,
              " must have 4 dimensions (batch, heads, seqlen, head_dim), got ", arg.tensor.dim());
}

inline void check_dtype_supported(const Argument& arg) {
  const auto dtype = arg.tensor.scalar_type();
  const bool is_supported = dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat ||
                            (dtype == at::kDouble && !arg.tensor.is_cuda());
  TORCH_CHECK(is_supported, arg,
              " must be float16, bfloat16 or float32 (float64 on the CPU only), got ", dtype);
}

inline void check_dtype(const Argument& arg, at::ScalarType expected) {
  TORCH_CHECK(arg.tensor.scalar_type() == expected, arg, " must have dtype ", expected, ", got ",
              arg.tensor.scalar_type());
}

inline void check_same_device(const Argument& arg, const Argument& like) {
  TORCH_CHECK(arg.tensor.device() == like.tensor.device(), arg, " must be on ",
              like.tensor.device(), " like ", like.name, ", got ", arg.tensor.device());
}

inline void check_same_dtype(const Argument& arg, const Argument& like) {
  TORCH_CHECK(arg.tensor.scalar_type() == like.tensor.scalar_type(), arg, " must have dtype ",
              like.tensor.scalar_type(), " like ", like.name, ", got ", arg.tensor.scalar_type());
}

inline void check_same_size(const Argument& arg, const Argument& like, int dim,
                            const char* dim_name) {
  TORCH_CHECK(arg.tensor.sym_size(dim) == like.tensor.sym_size(dim), arg, " must have ", dim_name,
              " ", like.tensor.sym_size(dim), " like ", like.name, ", got ",
              arg.tensor.sym_size(dim));
}

inline void check_same_shape(const Argument& arg, const Argument& like) {
  TORCH_CHECK(arg.tensor.sym_sizes() == like.tensor.sym_sizes(), arg, " must have shape ",
              like.tensor.sym_sizes(), " like ", like.name, ", got ", arg.tensor.sym_sizes());
}

// Limits hold for sizes that are known. One that is still a symbol while torch.export traces must
// not be narrowed by them; it is checked when the graph runs.
inline void check_head_dim(const Argument& arg) {
  const auto head_dim = arg.tensor.sym_size(3).maybe_as_int();
  TORCH_CHECK(!head_dim || (*head_dim >= 1 && *head_dim <= kMaxHeadDim), arg,
              " must have head_dim 1 to ", kMaxHeadDim, ", got ", *head_dim);
}

inline void check_seqlen(const Argument& arg) {
  const auto seqlen = arg.tensor.sym_size(2).maybe_as_int();
  TORCH_CHECK(!seqlen || *seqlen <= kMaxSeqlen, arg, " must have seqlen at most ", kMaxSeqlen,
              ", got ", *seqlen);
}

inline void check_heads_divide(const Argument& kv, const Argument& q) {
  const auto heads_q = q.tensor.sym_size(1);
  const auto heads_kv = kv.tensor.sym_size(1);
  TORCH_CHECK(heads_q == heads_kv || (heads_kv > 0 && heads_q % heads_kv == 0), kv,
              " must have a number of heads that divides q's ", heads_q, ", got ", heads_kv);
}

// A row of one element is dense whatever its stride; so is a tensor without elements.
inline void check_last_dim_dense(const Argument& arg) {
  TORCH_CHECK(
      arg.tensor.sym_size(3) == 1 || arg.tensor.sym_numel() == 0 || arg.tensor.sym_stride(3) == 1,
      arg, " must have a dense last dimension (stride 1), got stride ", arg.tensor.sym_stride(3));
}

inline void check_lse_shape(const Argument& arg, const Argument& q) {
  const auto sizes = arg.tensor.sym_sizes();
  const auto expected = q.tensor.sym_sizes().slice(0, 3);
  TORCH_CHECK(sizes == expected, arg, " must have shape ", expected,
              " (batch, heads, seqlen_q), got ", sizes);
}

inline void check_scale(const char* op, std::optional<double> scale) {
  TORCH_CHECK(!scale || std::isfinite(*scale), "flash_ext.", op, ": scale must be finite, got ",
              *scale);
}

inline CausalMode parse_causal(const char* op, std::string_view causal) {
  if (causal == "none") return CausalMode::kNone;
  if (causal == "bottom_right") return CausalMode::kBottomRight;
  if (causal == "top_left") return CausalMode::kTopLeft;
  TORCH_CHECK(false, "flash_ext.", op,
              ": causal must be 'none', 'bottom_right' or 'top_left', got '", causal, "'");
}

inline Algorithm parse_algorithm(const char* op, std::string_view algorithm) {
  if (algorithm == "v1") return Algorithm::kV1;
  if (algorithm == "v2") return Algorithm::kV2;
  if (algorithm == "v3") return Algorithm::kV3;
  if (algorithm == "auto") return Algorithm::kAuto;
  TORCH_CHECK(false, "flash_ext.", op, ": algorithm must be 'auto', 'v1', 'v2' or 'v3', got '",
              algorithm, "'");
}

inline void check_tile(const char* op, at::OptionalIntArrayRef tile) {
  TORCH_CHECK(!tile || ((*tile)[0] > 0 && (*tile)[1] > 0), "flash_ext.", op,
              ": tile must be two positive sizes (block_m, block_n), got ", *tile);
}

// All that forward and backward ask of q, k and v.
inline void check_qkv(const Argument& q, const Argument& k, const Argument& v) {
  for (const Argument& arg : {q, k, v}) check_rank(arg);
  check_dtype_supported(q);
  for (const Argument& arg : {k, v}) {
    check_same_device(arg, q);
    check_same_dtype(arg, q);
    check_same_size(arg, q, 0, "batch");
    check_same_size(arg, q, 3, "head_dim");
  }
  check_same_size(v, k, 1, "heads");
  check_same_size(v, k, 2, "seqlen");
  check_head_dim(q);
  check_heads_divide(k, q);
  check_seqlen(q);
  check_seqlen(k);
  for (const Argument& arg : {q, k, v}) check_last_dim_dense(arg);
}

}  // namespace flash_ext
