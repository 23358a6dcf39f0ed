// Activation functions and their derivatives in float32.
#pragma once
#include <cuda_runtime.h>

#include "effcore/lowrank.h"

namespace effcore::cuda::lowrank {

using effcore::lowrank::Activation;

__device__ __forceinline__ float sigmoid(float x) {
  return 1.0f / (1.0f + __expf(-x));
}
__device__ __forceinline__ float tanh_argument(float x) {  // gelu_tanh = x sigmoid(of this)
  return 1.59576912160573f * x * (1.0f + 0.044715f * x * x);
}

template <Activation activation>
__device__ __forceinline__ float value(float x) {
  if constexpr (activation == Activation::relu) return x < 0.0f ? 0.0f : x;  // NaN stays
  if constexpr (activation == Activation::gelu) return 0.5f * x * erfcf(-0.70710678f * x);
  if constexpr (activation == Activation::gelu_tanh) return x * sigmoid(tanh_argument(x));
  if constexpr (activation == Activation::silu) return x * sigmoid(x);
  return x;
}

template <Activation activation>
__device__ __forceinline__ float derivative(float x) {
  if constexpr (activation == Activation::relu) return x <= 0.0f ? 0.0f : 1.0f;
  if constexpr (activation == Activation::gelu) return 0.5f * erfcf(-0.70710678f * x) + x * 0.39894228f * __expf(-0.5f * x * x);
  if constexpr (activation == Activation::gelu_tanh) {
    const float u = tanh_argument(x), slope = 1.59576912160573f * (1.0f + 0.134145f * x * x);
    return sigmoid(u) * (1.0f + x * sigmoid(-u) * slope);
  }
  if constexpr (activation == Activation::silu) return sigmoid(x) * (1.0f + x * sigmoid(-x));
  return 1.0f;
}

// Calls body(std::integral_constant of the activation).
template <class Body>
__device__ __forceinline__ void dispatch(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::relu: return body(std::integral_constant<Activation, Activation::relu>{});
    case Activation::gelu: return body(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh: return body(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::silu: return body(std::integral_constant<Activation, Activation::silu>{});
    case Activation::none: return body(std::integral_constant<Activation, Activation::none>{});
  }
}

}  // namespace effcore::cuda::lowrank
