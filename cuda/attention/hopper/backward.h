// The backward kernels of sm_90a as attention.cu sees them: when they serve, what they need, and their launchers.
#pragma once
#include <cuda_runtime.h>

#include <span>

#include "attention/launch.h"

namespace effcore::cuda::attention::hopper {

// Whether these kernels take a backward on the current device: 16-bit, head_dim == value_dim of 64 or 128, and tensors that TMA
// can read (rows that start at multiples of 16 bytes, no dimension expanded from one element). What is not taken is left to the
// portable kernels.
bool serves_backward(const Problem& problem, std::span<const TensorView* const> tensors, bool from_probs);

template <class T, int D>
struct BackwardKernels {
  static BackwardPlan plan(const Problem& p, bool from_probs, int layers);                 // of the owner's blocks
  static void owner(const BackwardParams& p, const char* function, cudaStream_t stream);   // dq, dk, dv
  static void values(const BackwardParams& p, const char* function, cudaStream_t stream);  // dv of a consumer
};

}  // namespace effcore::cuda::attention::hopper
