// The inverse of a list: for each token the first place that names it, for each place the next one that names the same token;
// -1: none. So the gradient of a gather is written row by row of its result, each once, whatever the list repeats.
//
// One block a batch row. The least place is found with an integer minimum, whose result no order of threads changes. Repeats
// are rare: where there are any, each place looks for its successor.
#pragma once
#include "routing/rows.cuh"

namespace effcore::cuda::routing {

struct InverseParams {
  List index;
  std::int32_t *first, *next;  // [B, tokens], [B, size]
  int tokens, size;
};

constexpr int inverse_threads = 512;

static __global__ void __launch_bounds__(inverse_threads) inverse_kernel(const __grid_constant__ InverseParams p) {
  const std::int64_t b = blockIdx.x;
  auto* const first = reinterpret_cast<std::uint32_t*>(p.first + b * p.tokens);
  std::int32_t* const next = p.next + b * p.size;
  for (int n = threadIdx.x; n < p.tokens; n += inverse_threads) first[n] = ~0u;
  __syncthreads();
  for (int i = threadIdx.x; i < p.size; i += inverse_threads) {
    const std::int32_t token = p.index(b, i);
    next[i] = -1;
    if (token >= 0 && token < p.tokens) atomicMin(first + token, static_cast<std::uint32_t>(i));
  }
  __syncthreads();
  bool repeats = false;
  for (int i = threadIdx.x; i < p.size; i += inverse_threads) {
    const std::int32_t token = p.index(b, i);
    repeats = repeats || (token >= 0 && token < p.tokens && __ldcg(first + token) != static_cast<std::uint32_t>(i));
  }
  if (!__syncthreads_or(repeats)) return;
  for (int i = threadIdx.x; i < p.size; i += inverse_threads)
    for (int j = i + 1; j < p.size; ++j)
      if (p.index(b, j) == p.index(b, i)) {
        next[i] = j;
        break;
      }
}

// The workspace of an inverse: the tokens' first places, then the places' next ones.
inline std::size_t inverse_bytes(std::int64_t batch, std::int64_t tokens, std::int64_t size) {
  return static_cast<std::size_t>(batch * (tokens + size) * 4 + 255) / 256 * 256;
}

inline InverseParams invert(const TensorView& index, std::int64_t tokens, void* workspace, const char* function,
                            cudaStream_t stream) {
  InverseParams p{list_of(index), static_cast<std::int32_t*>(workspace), nullptr, static_cast<int>(tokens),
                  static_cast<int>(index.size[1])};
  p.next = p.first + index.size[0] * tokens;
  launch(function, inverse_kernel, grid(index.size[0], function), inverse_threads, 0, stream, p);
  return p;
}

}  // namespace effcore::cuda::routing
