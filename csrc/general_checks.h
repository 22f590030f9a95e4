// The input rules of the general operators, beside those of checks.h and in the same words.
#pragma once

#include "checks.h"
#include "general_options.h"
#include "layout.h"

namespace flash_ext {

// The sizes that every other argument must agree with.
struct GeneralSizes {
  c10::SymInt batch, heads_q, seqlen_q, seqlen_k;
};

inline void check_max_seqlen(const char* op, const char* name,
                             const std::optional<c10::SymInt>& max_seqlen, bool is_packed) {
  TORCH_CHECK(max_seqlen.has_value() == is_packed, "flash_ext.", op, ": ", name,
              " must be given with cu_seqlens_q and cu_seqlens_k and without them not, got ",
              max_seqlen ? "one" : "none");
  const auto known = max_seqlen ? max_seqlen->maybe_as_int() : std::nullopt;
  TORCH_CHECK(!known || (*known >= 0 && *known <= kMaxSeqlen), "flash_ext.", op, ": ", name,
              " must be 0 to ", kMaxSeqlen, ", got ", *known);
}

// int32 numbers for each batch entry, dense.
inline void check_lengths(const Argument& arg, const Argument& q, const c10::SymInt& count) {
  check_same_device(arg, q);
  check_dtype(arg, at::kInt);
  TORCH_CHECK(arg.tensor.dim() == 1 && arg.tensor.sym_size(0) == count, arg, " must have shape [",
              count, "], got ", arg.tensor.sym_sizes());
  TORCH_CHECK(arg.tensor.is_contiguous(), arg, " must be dense, got stride ",
              arg.tensor.sym_stride(0));
}

inline void check_both_cu_seqlens(const char* op, const GeneralOptions& options) {
  const bool has_q = options.cu_seqlens_q.defined();
  TORCH_CHECK(has_q == options.cu_seqlens_k.defined(), "flash_ext.", op,
              ": cu_seqlens_q and cu_seqlens_k must be given together, got ",
              has_q ? "cu_seqlens_q" : "cu_seqlens_k", " alone");
}

inline GeneralSizes check_sequences(const char* op, const Argument& q, const Argument& k,
                                    const GeneralOptions& options) {
  const bool is_packed = options.is_packed();
  check_max_seqlen(op, "max_seqlen_q", options.max_seqlen_q, is_packed);
  check_max_seqlen(op, "max_seqlen_k", options.max_seqlen_k, is_packed);
  GeneralSizes sizes{q.tensor.sym_size(0), q.tensor.sym_size(1), q.tensor.sym_size(2),
                     k.tensor.sym_size(2)};
  if (is_packed) {
    const Argument cu_q{op, "cu_seqlens_q", options.cu_seqlens_q};
    TORCH_CHECK(cu_q.tensor.dim() == 1 && cu_q.tensor.sym_size(0) >= 1, cu_q,
                " must have shape [batch + 1], got ", cu_q.tensor.sym_sizes());
    sizes.batch = cu_q.tensor.sym_size(0) - 1;
    sizes.seqlen_q = *options.max_seqlen_q;
    sizes.seqlen_k = *options.max_seqlen_k;
    check_lengths(cu_q, q, sizes.batch + 1);
    check_lengths({op, "cu_seqlens_k", options.cu_seqlens_k}, q, sizes.batch + 1);
  }
  if (options.seqlens_k.defined()) {
    check_lengths({op, "seqlens_k", options.seqlens_k}, q, sizes.batch);
  }
  return sizes;
}

// A small tensor of parameters or a mask: as precise as q, or float32.
inline void check_dtype_like_or_float(const Argument& arg, const Argument& q, bool may_be_bool) {
  const auto dtype = arg.tensor.scalar_type();
  const bool is_good =
      dtype == q.tensor.scalar_type() || dtype == at::kFloat || (may_be_bool && dtype == at::kBool);
  TORCH_CHECK(is_good, arg, " must have dtype ", may_be_bool ? "Bool, " : "",
              q.tensor.scalar_type(), " like q or Float, got ", dtype);
}

// 4 dimensions, each 1 or the size of the scores.
inline void check_broadcasts(const Argument& arg, const Argument& q,
                             std::array<c10::SymInt, 4> sizes, const char* meaning) {
  check_same_device(arg, q);
  bool is_good = arg.tensor.dim() == 4;
  for (int dim = 0; is_good && dim < 4; ++dim) {
    is_good = arg.tensor.sym_size(dim) == 1 || arg.tensor.sym_size(dim) == sizes[dim];
  }
  TORCH_CHECK(is_good, arg, " must have shape ", c10::SymIntArrayRef(sizes), " ", meaning,
              " or 1 in place of any size, got ", arg.tensor.sym_sizes());
}

inline void check_head_values(const Argument& arg, const Argument& q, const GeneralSizes& sizes,
                              bool may_have_batch) {
  check_same_device(arg, q);
  check_dtype_like_or_float(arg, q, /*may_be_bool=*/false);
  const auto& x = arg.tensor;
  const bool is_good = (x.dim() == 1 && x.sym_size(0) == sizes.heads_q) ||
                       (may_have_batch && x.dim() == 2 && x.sym_size(0) == sizes.batch &&
                        x.sym_size(1) == sizes.heads_q);
  TORCH_CHECK(is_good, arg, " must have shape [heads]", may_have_batch ? " or [batch, heads]" : "",
              " with ", sizes.heads_q, " heads", " like q, got ", x.sym_sizes());
}

inline void check_block_mask(const Argument& arg, const Argument& q, const GeneralSizes& sizes,
                             int64_t block_size) {
  TORCH_CHECK(block_size == 64 || block_size == 128 || block_size == 256, "flash_ext.", arg.op,
              ": block_size must be 64, 128 or 256, got ", block_size);
  check_dtype(arg, at::kBool);
  const auto blocks = [&](const c10::SymInt& seqlen) {
    return (seqlen + (block_size - 1)) / block_size;
  };
  check_same_device(arg, q);
  const auto& x = arg.tensor;
  const auto rows = blocks(sizes.seqlen_q);
  const auto keys = blocks(sizes.seqlen_k);
  const bool is_good = x.dim() == 4 && (x.sym_size(0) == 1 || x.sym_size(0) == sizes.batch) &&
                       (x.sym_size(1) == 1 || x.sym_size(1) == sizes.heads_q) &&
                       x.sym_size(2) == rows && x.sym_size(3) == keys;
  TORCH_CHECK(is_good, arg, " must have shape [batch or 1, heads or 1, ", rows, ", ", keys,
              "] for block_size ", block_size, ", got ", x.sym_sizes());
}

inline void check_dropout(const char* op, const Argument& q, double dropout_p,
                          const at::Tensor& rng_state) {
  TORCH_CHECK(dropout_p >= 0.0 && dropout_p <= 1.0, "flash_ext.", op,
              ": dropout_p must be 0 to 1, got ", dropout_p);
  if (dropout_p == 0.0) return;
  const Argument arg{op, "rng_state", rng_state};
  TORCH_CHECK(rng_state.defined(), arg, " must be given with dropout_p > 0, got none");
  check_same_device(arg, q);
  check_dtype(arg, at::kLong);
  TORCH_CHECK(rng_state.dim() == 1 && rng_state.sym_size(0) == 2 && rng_state.is_contiguous(), arg,
              " must be two dense numbers, got shape ", rng_state.sym_sizes());
}

inline GeneralSizes check_general(const Argument& q, const Argument& k, const Argument& v,
                                  const at::Tensor& attn_mask, const at::Tensor& alibi_slopes,
                                  const at::Tensor& sinks, const GeneralOptions& options) {
  const char* op = q.op;
  check_qkv(q, k, v);
  check_scale(op, options.scale);
  TORCH_CHECK(!options.tile || !q.tensor.is_cuda(), "flash_ext.", op,
              ": tile must not be given for CUDA tensors, got ", *options.tile);
  if (options.tile) check_tile(op, at::OptionalIntArrayRef(*options.tile));
  const auto sizes = check_sequences(op, q, k, options);
  if (attn_mask.defined()) {
    const Argument arg{op, "attn_mask", attn_mask};
    check_dtype_like_or_float(arg, q, /*may_be_bool=*/true);
    check_broadcasts(arg, q, {sizes.batch, sizes.heads_q, sizes.seqlen_q, sizes.seqlen_k},
                     "(batch, heads, seqlen_q, seqlen_k)");
  }
  if (alibi_slopes.defined()) {
    check_head_values({op, "alibi_slopes", alibi_slopes}, q, sizes, /*may_have_batch=*/true);
  }
  if (sinks.defined()) check_head_values({op, "sinks", sinks}, q, sizes, /*may_have_batch=*/false);
  if (options.block_mask.defined()) {
    check_block_mask({op, "block_mask", options.block_mask}, q, sizes, options.block_size);
  }
  for (const int64_t side : options.window) {
    TORCH_CHECK(side >= -1, "flash_ext.", op, ": window must be two sizes of at least -1, got ",
                options.window);
  }
  TORCH_CHECK(std::isfinite(options.softcap) && options.softcap >= 0.0, "flash_ext.", op,
              ": softcap must be finite and at least 0, got ", options.softcap);
  check_dropout(op, q, options.dropout_p, options.rng_state);
  return sizes;
}

// validate=True: what device kernels would clamp in silence raises. Waits for the device.
inline void validate_cu_seqlens(const Argument& arg, int64_t total, int64_t max_seqlen) {
  const auto host = arg.tensor.to(at::kCPU);
  const int* cu = host.const_data_ptr<int>();
  TORCH_CHECK(cu[0] >= 0, arg, " must begin with 0 or more, got ", cu[0]);
  for (int64_t i = 1; i < host.numel(); ++i) {
    TORCH_CHECK(cu[i] >= cu[i - 1], arg, " must not decrease, got ", cu[i - 1], " and ", cu[i],
                " at ", i);
    TORCH_CHECK(cu[i] - cu[i - 1] <= max_seqlen, arg, " must have lengths of at most ", max_seqlen,
                ", got ", cu[i] - cu[i - 1], " at ", i);
  }
  TORCH_CHECK(cu[host.numel() - 1] <= total, arg, " must end at or before row ", total, ", got ",
              cu[host.numel() - 1]);
}

inline void validate_lengths(const char* op, const at::Tensor& q, const at::Tensor& k,
                             const GeneralOptions& options) {
  if (!options.validate) return;
  if (options.is_packed()) {
    validate_cu_seqlens({op, "cu_seqlens_q", options.cu_seqlens_q}, q.size(2),
                        options.max_seqlen_q->expect_int());
    validate_cu_seqlens({op, "cu_seqlens_k", options.cu_seqlens_k}, k.size(2),
                        options.max_seqlen_k->expect_int());
  }
  if (!options.seqlens_k.defined()) return;
  const auto host = options.seqlens_k.to(at::kCPU);
  const auto cu = options.is_packed() ? options.cu_seqlens_k.to(at::kCPU) : at::Tensor();
  for (int64_t i = 0; i < host.numel(); ++i) {
    const int length = host.const_data_ptr<int>()[i];
    const int64_t limit =
        cu.defined() ? cu.const_data_ptr<int>()[i + 1] - cu.const_data_ptr<int>()[i] : k.size(2);
    TORCH_CHECK(length >= 0 && length <= limit, "flash_ext.", op, ": seqlens_k must be 0 to ",
                limit, ", the keys there are, got ", length, " at ", i);
  }
}

}  // namespace flash_ext
