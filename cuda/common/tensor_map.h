// Tensor maps for the bulk tensor copy engine: boxes in the 128-byte swizzle that wgmma reads, of 16-bit elements or float32.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "effcore/tensor.h"

namespace effcore::cuda {

// cuTensorMapEncodeTiled from the driver, so that the library needs no libcuda to load; null where there is none.
inline auto tensor_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess)
      entry = nullptr;
    return reinterpret_cast<Encode>(entry);
  }();
  return function;
}

// Sizes and boxes in elements, strides in bytes, innermost first (whose stride is one element). Of a box every step-th element
// is fetched. False where the copy engine does not take them.
template <int Rank>
bool encode_tensor_map(CUtensorMap* map, DType dtype, const void* data, const cuuint64_t (&size)[Rank],
                       const cuuint64_t (&stride)[Rank - 1], const cuuint32_t (&box)[Rank], const cuuint32_t (&step)[Rank]) {
  const auto encode = tensor_map_encoder();
  const CUtensorMapDataType type = dtype == DType::float32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode != nullptr && encode(map, type, Rank, const_cast<void*>(data), size, stride, box, step,
                                     CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <int Rank>
bool encode_tensor_map(CUtensorMap* map, DType dtype, const void* data, const cuuint64_t (&size)[Rank],
                       const cuuint64_t (&stride)[Rank - 1], const cuuint32_t (&box)[Rank]) {
  cuuint32_t step[Rank];
  std::fill(step, step + Rank, 1u);
  return encode_tensor_map(map, dtype, data, size, stride, box, step);
}

}  // namespace effcore::cuda
