// Launchers of the forward kernels.
#pragma once
#include "attention/forward.cuh"
#include "attention/forward_probs.cuh"
#include "attention/launch.h"
#include "attention/probs.cuh"
#include "common/error.h"

namespace effcore::cuda::attention {

inline int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

// Heads whose `bytes_per_head` of keys and values together leave room in L2 (50 MB on an H100, 40 on an A100) for what streams
// past.
inline Schedule schedule_of(int heads, int blocks, double bytes_per_head, int heads_per_kv) {
  constexpr double room = 16 << 20;
  const double fitting = room / (bytes_per_head > 1 ? bytes_per_head : 1);
  int section = fitting >= heads ? heads : static_cast<int>(fitting);
  section = section / heads_per_kv * heads_per_kv;
  return {blocks, heads, section < heads_per_kv ? heads_per_kv : section};
}
inline unsigned blocks_of(const Schedule& s) {
  return static_cast<unsigned>(s.blocks) * static_cast<unsigned>(s.heads);
}
template <class T>
Schedule row_schedule(const Shape& s, int rows, bool reads_k) {
  const double bytes = static_cast<double>(s.keys) * ((reads_k ? s.head_dim : 0) + s.value_dim) * sizeof(T) / s.group;
  return schedule_of(s.batch * s.heads, ceil_div(s.queries, rows), bytes, s.group);
}

template <class T, int D>
void Kernels<T, D>::forward(const ForwardParams& p, bool known_lse, const char* function, cudaStream_t stream) {
  using Tiles = ForwardTiles<T, D>;
  ForwardParams params = p;
  params.schedule = row_schedule<T>(p.shape, Tiles::rows, true);
  launch(function, known_lse ? forward_kernel<T, D, true> : forward_kernel<T, D, false>, blocks_of(params.schedule),
         Tiles::threads, Tiles::shared_bytes, stream, params);
}

template <class T, int D>
void Kernels<T, D>::forward_probs(const ForwardParams& p, const char* function, cudaStream_t stream) {
  using Tiles = ForwardProbsTiles<T, D>;
  ForwardParams params = p;
  params.schedule = row_schedule<T>(p.shape, Tiles::rows, false);
  launch(function, forward_probs_kernel<T, D>, blocks_of(params.schedule), Tiles::threads, Tiles::shared_bytes, stream, params);
}

template <class T, int D>
void Kernels<T, D>::probs(const ProbsParams& p, const char* function, cudaStream_t stream) {
  using Tiles = ProbsTiles<T, D>;
  ProbsParams params = p;
  params.schedule = row_schedule<T>(p.shape, Tiles::rows, true);
  launch(function, probs_kernel<T, D>, blocks_of(params.schedule), Tiles::threads, Tiles::shared_bytes, stream, params);
}

}  // namespace effcore::cuda::attention
