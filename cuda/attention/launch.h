// One launcher a kernel: what an instantiation unit (instances/*.cu) defines and attention.cu calls. Another implementation of
// a kernel (wgmma and TMA on sm_90a) is one more set of these, chosen in dispatch.h.
#pragma once
#include <cuda_runtime.h>

#include "attention/params.h"
#include "common/element.cuh"

namespace effcore::cuda::attention {

// The blocks that a backward works in on the current GPU, and what that needs.
struct BackwardPlan {
  bool compact;               // the blocks for little shared memory
  int queries, keys;          // of a block
  int dq_elements;            // float32 sums a block of queries
  std::int64_t scores_bytes;  // of dS, and of P where it is not kept, that go through device memory; 0: neither does
};

template <class T, int D>
struct Kernels {
  static void forward(const ForwardParams& p, bool known_lse, const char* function, cudaStream_t stream);
  static void forward_probs(const ForwardParams& p, const char* function, cudaStream_t stream);
  static void probs(const ProbsParams& p, const char* function, cudaStream_t stream);
  static void delta(const DeltaParams& p, const char* function, cudaStream_t stream);
  static void decode(const DecodeParams& p, bool from_probs, const char* function, cudaStream_t stream);
  static BackwardPlan backward_plan(bool from_probs, int layers, const char* function);
  static void backward(const BackwardParams& p, bool compact, const char* function, cudaStream_t stream);  // dq, dk, dv
  static void shared_backward(const BackwardParams& p, const char* function, cudaStream_t stream);         // dv
};

}  // namespace effcore::cuda::attention
