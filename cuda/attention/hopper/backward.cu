// When the backward kernels of sm_90a serve.

#include "attention/hopper/backward.h"
#include "attention/hopper/backward_tiles.cuh"
#include "common/error.h"

namespace effcore::cuda::attention::hopper {

namespace tiled = effcore::cuda::hopper;

bool serves_backward(const Problem& p, std::span<const TensorView* const> tensors, bool from_probs) {
  if ((p.dtype != DType::bfloat16 && p.dtype != DType::float16) || p.head_dim != p.value_dim ||
      (p.head_dim != 64 && p.head_dim != 128))
    return false;
#ifdef EFFCORE_CUDA_SET_CI
  if (p.dtype != DType::bfloat16 || p.head_dim != 64) return false;
#endif
  if (p.batch == 0 || p.heads == 0 || p.queries == 0 || p.keys == 0) return false;
  const std::int64_t probs_rows = p.batch * p.heads * (p.queries / probs_tile + 1) * (p.keys / probs_tile + 1) * probs_tile;
  if (from_probs && probs_rows > tiled::behind_probs) return false;
  for (const TensorView* t : tensors) {
    if (reinterpret_cast<std::uintptr_t>(t->data) % 16 != 0) return false;
    for (int d = 0; d < 3; ++d)
      if (t->size[d] > 1 && (t->stride[d] <= 0 || t->stride[d] % 8 != 0)) return false;
  }
  return shared_memory_limit("path") >= tiled::shared_limit;
}

}  // namespace effcore::cuda::attention::hopper
