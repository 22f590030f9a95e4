// Tensor maps: what TMA is told about a tensor in global memory. Encoded on the host, by the
// driver's own function, found at run time so that nothing links against libcuda.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "params.h"

namespace flash_ext::sm90 {

inline auto tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const auto status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                         cudaEnableDefault, &found);
    if (status != cudaSuccess || function == nullptr) {
      throw std::runtime_error("flash_ext: this driver has no cuTensorMapEncodeTiled (CUDA 12.0)");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// A map of a (batch, heads, seqlen, head_dim) tensor for copies of boxes of `box_rows` rows and 128
// bytes, one slab of an sm90::SmemTile, or 64. Coordinates are (column, row, head, batch). Bytes
// may stand for elements of one.
template <typename Element, int kRowBytes = 128>
CUtensorMap make_tensor_map(const TensorView& view, int64_t batch, int64_t heads, int64_t seqlen,
                            int64_t head_dim, int box_rows) {
  constexpr auto kType = std::is_same_v<Element, bool>     ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                         : std::is_same_v<Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                           : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  // A dimension of size 1 may come with any stride; its own must still be a multiple of 16.
  const auto bytes = [](int64_t stride, int64_t n) {
    return static_cast<cuuint64_t>(n > 1 ? stride * int64_t{sizeof(Element)} : 16);
  };
  const cuuint64_t sizes[4] = {size(head_dim), size(seqlen), size(heads), size(batch)};
  const cuuint64_t strides[3] = {bytes(view.row_stride, seqlen), bytes(view.head_stride, heads),
                                 bytes(view.batch_stride, batch)};
  const cuuint32_t box[4] = {kRowBytes / sizeof(Element), static_cast<cuuint32_t>(box_rows), 1, 1};
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  constexpr auto kSwizzle =
      kRowBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const cuuint32_t every_element[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const auto encode = [&] {
    return tensor_map_encoder()(&map, kType, 4, view.data, sizes, strides, box, every_element,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzle,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult status = encode();
  // A thread's first call to CUDA may be this one, as in autograd's. The runtime would make the
  // device's context current; the driver's function only asks for one.
  if (status == CUDA_ERROR_INVALID_CONTEXT) {
    int device = 0;
    cudaGetDevice(&device);
    cudaSetDevice(device);
    status = encode();
  }
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("flash_ext: cuTensorMapEncodeTiled failed with CUDA driver error " +
                             std::to_string(static_cast<int>(status)));
  }
  return map;
}

}  // namespace flash_ext::sm90
