// Launchers of the kernels for sm_90a, one more set beside launch.h's; dispatch.h chooses.
#pragma once
#include <cuda_runtime.h>

#include "attention/params.h"

namespace effcore::cuda::attention::hopper {

// Ints of memory for an owner's forward to draw work from: two counters, a count, and for each piece a mark and a number
// (forward.cuh: Again).
constexpr int fewest_forward_rows = 128;  // of a piece, at any head dimension
inline std::int64_t forward_tickets(const Problem& p) {
  return 3 + 2 * p.batch * p.heads * ((p.queries + fewest_forward_rows - 1) / fewest_forward_rows);
}

template <class T, int D>
struct Kernels {
  // All return false, having launched nothing, where an argument has no TMA descriptor (rows that are not multiples of 16 bytes
  // apart, expanded tensors): the portable kernels take it. `known_lse`: a consumer; `probs`: where an owner keeps P, or null.
  static bool forward(const ForwardParams& p, bool known_lse, void* probs, const char* function, cudaStream_t stream);
  static bool forward_probs(const ForwardParams& p, float factor, const char* function,
                            cudaStream_t stream);  // out times factor
};

}  // namespace effcore::cuda::attention::hopper
