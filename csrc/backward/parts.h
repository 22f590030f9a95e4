// Few key heads make few thread blocks for dK and dV, each with a whole group of query heads to
// walk over, and under a causal mask of very different length. There a group is cut into parts of
// so and so many query heads: a thread block takes one, and a last kernel adds up the dK and dV
// they leave.
#pragma once

#include <algorithm>

#include "params.h"

namespace flash_ext {

// Keys of the thread blocks that a multiprocessor runs at once, of 16-bit elements.
constexpr int64_t backward_keys_per_multiprocessor(int64_t padded_head_dim) {
  return padded_head_dim == 64 ? 192 : (padded_head_dim == 128 ? 128 : 64);
}

// Fewer query rows a part are not worth the adding up.
inline constexpr int64_t kMinQueriesPerPart = 512;

// How many parts a group of query heads is cut into; they are of one size. As few as make the
// thread blocks of one sequence one and a half times those that the GPU runs at once: then the long
// ones of a causal mask and the short ones after them even out. One sequence decides, not the
// batch, on which no row's bits may depend.
inline int64_t num_group_parts(const AttentionShape& s, int64_t num_multiprocessors) {
  const int64_t wanted_keys =
      3 * num_multiprocessors * backward_keys_per_multiprocessor(s.padded_head_dim()) / 2;
  const int64_t keys = std::max<int64_t>(1, s.heads_kv * s.seqlen_k);
  const int64_t worthwhile = s.group_size() * s.seqlen_q / kMinQueriesPerPart;
  int64_t parts = std::min({(wanted_keys + keys - 1) / keys, worthwhile, s.group_size()});
  if (parts <= 1) return 1;
  while (s.group_size() % parts != 0) ++parts;
  return parts;
}

}  // namespace flash_ext
