// The middle of the cross has two kernels. Where they are read where they lie, both come, and who multiplies by them adds them.
#pragma once
#include <cstdint>
#include <type_traits>

#include "common/element.cuh"

namespace effcore::cuda::conv3d::hopper {

// Of two pairs, each sum rounded once.
template <class T>
__device__ __forceinline__ std::uint32_t add_pairs(std::uint32_t a, std::uint32_t b) {
  std::uint32_t sum;
  if constexpr (std::is_same_v<T, bf16>)
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  else
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}

// Adds 64 columns of weights to others, by `Threads` threads.
template <class T, int Threads>
__device__ __forceinline__ void add_weights(char* weights, const char* added) {
#pragma unroll 1  // registers are scarce where this runs
  for (int i = threadIdx.x % Threads; i < 64 * 128 / 16; i += Threads) {
    auto& sum = reinterpret_cast<uint4*>(weights)[i];
    const uint4 a = sum, b = reinterpret_cast<const uint4*>(added)[i];
    sum = make_uint4(add_pairs<T>(a.x, b.x), add_pairs<T>(a.y, b.y), add_pairs<T>(a.z, b.z), add_pairs<T>(a.w, b.w));
  }
}

}  // namespace effcore::cuda::conv3d::hopper
