// Element types, and the two operations on pairs of them that the kernels need.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace effcore::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

template <class T>
constexpr bool is_16bit = sizeof(T) == 2;

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(bf16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(fp16 x) {
  return __half2float(x);
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (std::is_same_v<T, bf16>)
    return __float2bfloat16_rn(x);
  else
    return __float2half_rn(x);
}

// Two 16-bit elements in one register, the first in the low half.
template <class T>
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
  }
}
template <class T>
__device__ __forceinline__ float2 unpack(std::uint32_t pair) {
  if constexpr (std::is_same_v<T, bf16>)
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
  else
    return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// Writes two neighbouring elements, or those of them that lie below `columns`; `paired` says that the address allows one store.
template <class T>
__device__ __forceinline__ void store_pair(T* row, int column, int columns, bool paired, float low, float high) {
  if (paired && column + 1 < columns) {
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<float2*>(row + column) = make_float2(low, high);
    else
      *reinterpret_cast<std::uint32_t*>(row + column) = pack<T>(low, high);
  } else {
    if (column < columns) row[column] = from_float<T>(low);
    if (column + 1 < columns) row[column + 1] = from_float<T>(high);
  }
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace effcore::cuda
