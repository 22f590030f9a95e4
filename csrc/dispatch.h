// Runtime values -> template arguments. What is compiled in comes from the build's table of
// instances through two macros, so that table, instances and dispatcher cannot disagree:
//   FLASH_EXT_HEAD_DIMS  e.g. 64,128,256
//   FLASH_EXT_ELEMENTS   e.g. __half,__nv_bfloat16,float
// and the same of FLASH_EXT_FORWARD_V3, FLASH_EXT_BACKWARD_V3, FLASH_EXT_GENERAL_FORWARD_V3 and
// FLASH_EXT_GENERAL_BACKWARD_V3, which a build may be without.
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

// Calls f(TypeTag<Element>, std::integral_constant<int, kHeadDim>) for a CUDA kernel instance.
template <typename Elements, typename HeadDims, typename Function>
void dispatch_element_and_head_dim(c10::ScalarType dtype, int64_t padded_head_dim,
                                   const Function& f) {
  dispatch_dtype(Elements{}, dtype, [&](auto element) {
    dispatch_head_dim(HeadDims{}, padded_head_dim, [&](auto head_dim) { f(element, head_dim); });
  });
}

#ifdef FLASH_EXT_HEAD_DIMS
template <typename Function>
void dispatch_instance(c10::ScalarType dtype, const AttentionShape& shape, const Function& f) {
  dispatch_element_and_head_dim<TypeList<FLASH_EXT_ELEMENTS>,
                                std::integer_sequence<int, FLASH_EXT_HEAD_DIMS>>(
      dtype, shape.padded_head_dim(), f);
}
#endif

#ifdef FLASH_EXT_FORWARD_V3_HEAD_DIMS
inline constexpr bool kHasV3 = true;

template <typename Function>
void dispatch_forward_v3(c10::ScalarType dtype, const AttentionShape& shape, const Function& f) {
  dispatch_element_and_head_dim<TypeList<FLASH_EXT_FORWARD_V3_ELEMENTS>,
                                std::integer_sequence<int, FLASH_EXT_FORWARD_V3_HEAD_DIMS>>(
      dtype, shape.padded_head_dim_v3(), f);
}

template <typename Function>
void dispatch_backward_v3(c10::ScalarType dtype, const AttentionShape& shape, const Function& f) {
  dispatch_element_and_head_dim<TypeList<FLASH_EXT_BACKWARD_V3_ELEMENTS>,
                                std::integer_sequence<int, FLASH_EXT_BACKWARD_V3_HEAD_DIMS>>(
      dtype, shape.padded_head_dim(), f);
}
#else
inline constexpr bool kHasV3 = false;

template <typename Function>
void dispatch_forward_v3(c10::ScalarType, const AttentionShape&, const Function&) {}

template <typename Function>
void dispatch_backward_v3(c10::ScalarType, const AttentionShape&, const Function&) {}
#endif

#ifdef FLASH_EXT_GENERAL_FORWARD_V3_HEAD_DIMS
inline constexpr bool kHasGeneralV3 = true;

template <typename Function>
void dispatch_general_forward_v3(c10::ScalarType dtype, const AttentionShape& shape,
                                 const Function& f) {
  dispatch_element_and_head_dim<TypeList<FLASH_EXT_GENERAL_FORWARD_V3_ELEMENTS>,
                                std::integer_sequence<int, FLASH_EXT_GENERAL_FORWARD_V3_HEAD_DIMS>>(
      dtype, shape.padded_head_dim(), f);
}

template <typename Function>
void dispatch_general_backward_v3(c10::ScalarType dtype, const AttentionShape& shape,
                                  const Function& f) {
  dispatch_element_and_head_dim<
      TypeList<FLASH_EXT_GENERAL_BACKWARD_V3_ELEMENTS>,
      std::integer_sequence<int, FLASH_EXT_GENERAL_BACKWARD_V3_HEAD_DIMS>>(
      dtype, shape.padded_head_dim(), f);
}
#else
inline constexpr bool kHasGeneralV3 = false;

template <typename Function>
void dispatch_general_forward_v3(c10::ScalarType, const AttentionShape&, const Function&) {}

template <typename Function>
void dispatch_general_backward_v3(c10::ScalarType, const AttentionShape&, const Function&) {}
#endif

}  // namespace flash_ext
