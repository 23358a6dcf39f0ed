// A SharedScores that two layers used gave a gradient that is the sum of two: plausible and wrong. The host may not wait to see
// the counters, so the gradients themselves say it: NaN.
#include <cstdint>

#include "common/element.cuh"
#include "common/error.h"
#include "effcore/cuda/attention.h"

namespace effcore::cuda::attention {
namespace {

constexpr int threads = 256;

struct SpoilParams {
  const float* uses[max_layers];
  int count;
  TensorView tensor;
  std::int64_t elements;
};

__global__ void __launch_bounds__(threads) spoil_kernel(const __grid_constant__ SpoilParams p) {
  bool reused = false;
  for (int i = 0; i < p.count; ++i) reused = reused || !(*p.uses[i] <= 1.0f);
  if (!reused) return;
  const TensorView& t = p.tensor;
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(threads) + threadIdx.x; i < p.elements;
       i += static_cast<std::int64_t>(gridDim.x) * threads) {
    std::int64_t rest = i, offset = 0;
    for (int d = t.rank - 1; d >= 0; --d) {
      offset += rest % t.size[d] * t.stride[d];
      rest /= t.size[d];
    }
    if (t.dtype == DType::float32)
      static_cast<float*>(t.data)[offset] = NAN;
    else
      static_cast<std::uint16_t*>(t.data)[offset] = 0x7fff;  // NaN in bfloat16 and in float16
  }
}

}  // namespace

void spoil_if_reused(const float* const* uses, int count, const TensorView& tensor, const Launch& to) {
  SpoilParams p{};
  p.tensor = tensor;
  p.elements = 1;
  for (int d = 0; d < tensor.rank; ++d) p.elements *= tensor.size[d];
  if (p.elements == 0) return;
  for (int first = 0; first < count; first += max_layers) {
    p.count = count - first < max_layers ? count - first : max_layers;
    for (int i = 0; i < p.count; ++i) p.uses[i] = uses[first + i];
    // A handful of blocks: in the usual case they read the counters and end.
    launch("attention_with_scores_bwd", spoil_kernel, 64, threads, 0, static_cast<cudaStream_t>(to.stream), p);
  }
}

}  // namespace effcore::cuda::attention
