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

// What a tensor of four dimensions is copied by. Coordinates are (column, row, head, batch).
struct MapLayout {
  CUtensorMapDataType type;
  int64_t element_bytes;
  CUtensorMapSwizzle swizzle;
  int box_rows;  // of 64 columns
};

inline CUtensorMap encode_tensor_map(const MapLayout& layout, const TensorView& view, int64_t batch,
                                     int64_t heads, int64_t rows, int64_t cols) {
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  // A dimension of size 1 may come with any stride; its own must still be a multiple of 16.
  const auto bytes = [&](int64_t stride, int64_t n) {
    return static_cast<cuuint64_t>(n > 1 ? stride * layout.element_bytes : 16);
  };
  const cuuint64_t sizes[4] = {size(cols), size(rows), size(heads), size(batch)};
  const cuuint64_t strides[3] = {bytes(view.row_stride, rows), bytes(view.head_stride, heads),
                                 bytes(view.batch_stride, batch)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(layout.box_rows), 1, 1};
  const cuuint32_t every_element[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const auto encode = [&] {
    return tensor_map_encoder()(&map, layout.type, 4, view.data, sizes, strides, box, every_element,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, layout.swizzle,
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

template <typename Element>
inline constexpr auto kMapType = std::is_same_v<Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// A map of a (batch, heads, seqlen, head_dim) tensor for copies of boxes of `box_rows` rows and 64
// columns, one slab of an sm90::SmemTile.
template <typename Element>
CUtensorMap make_tensor_map(const TensorView& view, int64_t batch, int64_t heads, int64_t seqlen,
                            int64_t head_dim, int box_rows) {
  const MapLayout layout{kMapType<Element>, 2, CU_TENSOR_MAP_SWIZZLE_128B, box_rows};
  return encode_tensor_map(layout, view, batch, heads, seqlen, head_dim);
}

// The same of a (batch, heads_q, seqlen_q, seqlen_k) tensor, broadcast or not, whose keys are
// neighbours. Of a bool one rows of 64 bytes, under the 64-byte swizzle.
template <typename Element>
CUtensorMap make_score_map(const ScoreTensor& scores, bool is_bool, const AttentionShape& s,
                           int box_rows) {
  const MapLayout layout =
      is_bool ? MapLayout{CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, CU_TENSOR_MAP_SWIZZLE_64B, box_rows}
              : MapLayout{kMapType<Element>, 2, CU_TENSOR_MAP_SWIZZLE_128B, box_rows};
  const TensorView view{scores.data, scores.batch_stride, scores.head_stride, scores.row_stride};
  return encode_tensor_map(layout, view, s.batch, s.heads_q, s.seqlen_q, s.seqlen_k);
}

}  // namespace flash_ext::sm90
