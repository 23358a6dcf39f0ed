// Explicit instantiations by kernel family. EFFCORE_CUDA_SET_CI keeps one: bfloat16, head dimensions up to 64.
#pragma once

#define EFFCORE_FORWARD(T, D)                                                                  \
  template void Kernels<T, D>::forward(const ForwardParams&, bool, const char*, cudaStream_t); \
  template void Kernels<T, D>::forward_probs(const ForwardParams&, const char*, cudaStream_t); \
  template void Kernels<T, D>::probs(const ProbsParams&, const char*, cudaStream_t);

#define EFFCORE_BACKWARD(T, D)                                                                    \
  template BackwardPlan Kernels<T, D>::backward_plan(bool, int, const char*);                     \
  template void Kernels<T, D>::backward(const BackwardParams&, bool, const char*, cudaStream_t);  \
  template void Kernels<T, D>::shared_backward(const BackwardParams&, const char*, cudaStream_t); \
  template void Kernels<T, D>::delta(const DeltaParams&, const char*, cudaStream_t);

#define EFFCORE_DECODE(T, D) template void Kernels<T, D>::decode(const DecodeParams&, bool, const char*, cudaStream_t);
