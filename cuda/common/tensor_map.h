// Tensor maps for the bulk tensor copy engine: boxes in the 128-byte swizzle that wgmma reads, of 16-bit elements or float32.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "effcore/tensor.h"

namespace effcore::cuda {

// A function of the driver, so that the library needs no libcuda to load; null where there is none.
template <class Function>
Function driver_function(const char* name) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(entry) : nullptr;
}

inline CUtensorMapDataType tensor_map_type(DType dtype) {
  return dtype == DType::float32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
         : dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                    : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// Sizes and boxes in elements, strides in bytes, innermost first (whose stride is one element). Of a box every step-th element
// is fetched. False where the copy engine does not take them.
template <int Rank>
bool encode_tensor_map(CUtensorMap* map, DType dtype, const void* data, const cuuint64_t (&size)[Rank],
                       const cuuint64_t (&stride)[Rank - 1], const cuuint32_t (&box)[Rank], const cuuint32_t (&step)[Rank]) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  return encode != nullptr && encode(map, tensor_map_type(dtype), Rank, const_cast<void*>(data), size, stride, box, step,
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

// The im2col mode: sizes [channels, w, h, ...] as above. A fetch brings `channels` of so many `positions` in a row, wherever
// lines end, as rows of 32, 64 or 128 bytes in the swizzle of that width.
template <int Rank>
bool encode_im2col_map(CUtensorMap* map, DType dtype, const void* data, const cuuint64_t (&size)[Rank],
                       const cuuint64_t (&stride)[Rank - 1], int channels, int positions) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  const int bytes = channels * (dtype == DType::float32 ? 4 : 2);
  const CUtensorMapSwizzle swizzle = bytes == 32   ? CU_TENSOR_MAP_SWIZZLE_32B
                                     : bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                   : CU_TENSOR_MAP_SWIZZLE_128B;
  constexpr int corner[Rank - 2] = {};
  cuuint32_t step[Rank];
  std::fill(step, step + Rank, 1u);
  return encode != nullptr &&
         encode(map, tensor_map_type(dtype), Rank, const_cast<void*>(data), size, stride, corner, corner,
                static_cast<cuuint32_t>(channels), static_cast<cuuint32_t>(positions), step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace effcore::cuda
