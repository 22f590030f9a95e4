// dQ = dS K is computed from K minus the mean of the head's keys, in both backwards on tensor
// cores.
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

namespace flash_ext {

// The difference can be twice as large as any key: in fp16 half of it is kept, lest it overflow.
template <typename Element>
inline constexpr float kCentredKeyScale = std::is_same_v<Element, __half> ? 0.5f : 1.f;

}  // namespace flash_ext
