// Launchers of the forward kernels.
#pragma once
#include "attention/forward.cuh"
#include "attention/forward_probs.cuh"
#include "attention/launch.h"
#include "attention/probs.cuh"
#include "attention/schedule.h"
#include "common/error.h"

namespace effcore::cuda::attention {

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
