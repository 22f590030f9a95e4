// Runtime values -> template arguments. What is compiled in comes from the build's table of
// instances through two macros, so that table, instances and dispatcher cannot disagree:
//   FLASH_EXT_HEAD_DIMS  e.g. 64,128,256
//   FLASH_EXT_ELEMENTS   e.g. __half,__nv_bfloat16,float
// and FLASH_EXT_SM90_HEAD_DIMS, FLASH_EXT_SM90_ELEMENTS for v3, which a build may be without.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "params.h"

struct __half;
struct __nv_bfloat16;

namespace flash_ext {

template <typename T>
struct TypeTag {
  using type = T;
};

template <typename... Types>
struct TypeList {};

template <typename Element>
constexpr c10::ScalarType kScalarTypeOf = c10::CppTypeToScalarType<Element>::value;
template <>
inline constexpr c10::ScalarType kScalarTypeOf<__half> = c10::ScalarType::Half;
template <>
inline constexpr c10::ScalarType kScalarTypeOf<__nv_bfloat16> = c10::ScalarType::BFloat16;

// Calls f(TypeTag<Element>) for the element type that is `dtype`.
template <typename... Elements, typename Function>
void dispatch_dtype(TypeList<Elements...>, c10::ScalarType dtype, const Function& f) {
  const bool found =
      ((dtype == kScalarTypeOf<Elements> ? (f(TypeTag<Elements>{}), true) : false) || ...);
  TORCH_CHECK(found, "flash_ext: dtype ", dtype, " is not compiled into this build (",
              c10::ArrayRef<c10::ScalarType>({kScalarTypeOf<Elements>...}), ")");
}

// Calls f(std::integral_constant<int, kHeadDim>) for the kHeadDim that is `padded_head_dim`.
template <int... kHeadDims, typename Function>
void dispatch_head_dim(std::integer_sequence<int, kHeadDims...>, int64_t padded_head_dim,
                       const Function& f) {
  const bool found =
      ((padded_head_dim == kHeadDims ? (f(std::integral_constant<int, kHeadDims>{}), true)
                                     : false) ||
       ...);
  TORCH_CHECK(found, "flash_ext: head_dim ", padded_head_dim, " is not compiled into this build (",
              c10::ArrayRef<int>({kHeadDims...}), ")");
}

#ifdef FLASH_EXT_HEAD_DIMS
using CudaElements = TypeList<FLASH_EXT_ELEMENTS>;
using CudaHeadDims = std::integer_sequence<int, FLASH_EXT_HEAD_DIMS>;

// Calls f(TypeTag<Element>, std::integral_constant<int, kHeadDim>) for a CUDA kernel instance.
template <typename Function>
void dispatch_instance(c10::ScalarType dtype, const AttentionShape& shape, const Function& f) {
  dispatch_dtype(CudaElements{}, dtype, [&](auto element) {
    dispatch_head_dim(CudaHeadDims{}, shape.padded_head_dim(),
                      [&](auto head_dim) { f(element, head_dim); });
  });
}
#endif

#ifdef FLASH_EXT_SM90_HEAD_DIMS
inline constexpr bool kHasSm90 = true;

// The same for v3.
template <typename Function>
void dispatch_instance_v3(c10::ScalarType dtype, const AttentionShape& shape, const Function& f) {
  using HeadDims = std::integer_sequence<int, FLASH_EXT_SM90_HEAD_DIMS>;
  dispatch_dtype(TypeList<FLASH_EXT_SM90_ELEMENTS>{}, dtype, [&](auto element) {
    dispatch_head_dim(HeadDims{}, shape.padded_head_dim_v3(),
                      [&](auto head_dim) { f(element, head_dim); });
  });
}
#else
inline constexpr bool kHasSm90 = false;

template <typename Function>
void dispatch_instance_v3(c10::ScalarType, const AttentionShape&, const Function&) {}
#endif

}  // namespace flash_ext
