// Explicit instantiations by kernel family, as in ../../instances. EFFCORE_CUDA_SET_CI keeps one: bfloat16, head dimensions up
// to 64.
#pragma once

#define EFFCORE_HOPPER_FORWARD(T, D)                                                                  \
  template bool Kernels<T, D>::forward(const ForwardParams&, bool, void*, const char*, cudaStream_t); \
  template bool Kernels<T, D>::forward_probs(const ForwardParams&, float, const char*, cudaStream_t);
