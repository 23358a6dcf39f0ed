// Launchers of the forward kernels for sm_90a.
#pragma once
#include "attention/hopper/forward.cuh"
#include "attention/hopper/forward_probs.cuh"
#include "attention/hopper/launch.h"
#include "attention/schedule.h"
#include "common/error.h"

namespace effcore::cuda::attention::hopper {

namespace tiled = effcore::cuda::hopper;

template <class T>
constexpr DType dtype_of = std::is_same<T, bf16>::value ? DType::bfloat16 : DType::float16;

template <class T, int D>
bool Kernels<T, D>::forward(const ForwardParams& p, bool known_lse, void* probs, const char* function, cudaStream_t stream) {
  using Tiles = tiled::ForwardTiles<D>;
  using tiled::Forward;
  const Shape& s = p.shape;
  tiled::TiledForwardParams params{p, probs, {}, {}, {}};
  if (!p.out.aligned || !tiled::make_tensor_map(&params.q, p.q, dtype_of<T>, s.batch, s.heads, s.queries, 64) ||
      !tiled::make_tensor_map(&params.k, p.k, dtype_of<T>, s.batch, s.kv_heads, s.keys, Tiles::keys) ||
      !tiled::make_tensor_map(&params.v, p.v, dtype_of<T>, s.batch, s.kv_heads, s.keys, Tiles::keys))
    return false;
  params.args.schedule = row_schedule<T>(s, Tiles::rows, true);
  const auto kernel = known_lse          ? tiled::forward_kernel<T, D, Forward::from_lse>
                      : probs != nullptr ? tiled::forward_kernel<T, D, Forward::owner_keeping_probs>
                                         : tiled::forward_kernel<T, D, Forward::owner>;
  launch(function, kernel, blocks_of(params.args.schedule), Tiles::threads, sizeof(tiled::ForwardShared<T, D>), stream, params);
  return true;
}

template <class T, int D>
bool Kernels<T, D>::forward_probs(const ForwardParams& p, const char* function, cudaStream_t stream) {
  using Tiles = tiled::ForwardProbsTiles<D>;
  const Shape& s = p.shape;
  const std::int64_t tiles = probs_elements_of(s) / (probs_tile * probs_tile) * s.batch * s.heads;
  tiled::TiledForwardProbsParams params{p, {}, {}};
  if (!p.out.aligned || !tiled::make_tensor_map(&params.v, p.v, dtype_of<T>, s.batch, s.kv_heads, s.keys, Tiles::keys) ||
      !tiled::make_probs_map(&params.probs, p.probs, dtype_of<T>, tiles))
    return false;
  params.args.schedule = row_schedule<T>(s, Tiles::rows, false);
  launch(function, tiled::forward_probs_kernel<T, D>, blocks_of(params.args.schedule), Tiles::threads,
         sizeof(tiled::ForwardProbsShared<T, D>), stream, params);
  return true;
}

}  // namespace effcore::cuda::attention::hopper
