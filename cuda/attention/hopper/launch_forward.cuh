// Launchers of the forward kernels for sm_90a.
#pragma once

#include "attention/hopper/forward_consumer.cuh"
#include "attention/hopper/forward_probs.cuh"
#include "attention/hopper/launch.h"
#include "attention/schedule.h"
#include "common/error.h"

namespace effcore::cuda::attention::hopper {

namespace tiled = effcore::cuda::hopper;

template <class T>
constexpr DType dtype_of = std::is_same<T, bf16>::value ? DType::bfloat16 : DType::float16;

// Kept tiles of all heads.
inline std::int64_t probs_tiles_of(const Shape& s) {
  return probs_elements_of(s) / (probs_tile * probs_tile) * s.batch * s.heads;
}

template <class T, int D>
bool Kernels<T, D>::forward(const ForwardParams& p, bool known_lse, void* probs, const char* function, cudaStream_t stream) {
  using Tiles = tiled::ForwardTiles<D>;
  using tiled::Forward;
  const Shape& s = p.shape;
  tiled::TiledForwardParams params{p, p.ticket, {}, {}, {}, {}, {}};
  if (!p.out.aligned || !tiled::make_tensor_map(&params.q, p.q, dtype_of<T>, s.batch, s.heads, s.queries, 64) ||
      !tiled::make_tensor_map(&params.k, p.k, dtype_of<T>, s.batch, s.kv_heads, s.keys, Tiles::keys) ||
      !tiled::make_tensor_map(&params.v, p.v, dtype_of<T>, s.batch, s.kv_heads, s.keys, Tiles::keys))
    return false;
  params.args.schedule = row_schedule<T>(s, Tiles::rows, true);
  const unsigned pieces = blocks_of(params.args.schedule);
  const auto run = [&]<Forward forward>(unsigned blocks) {
    static_assert(sizeof(tiled::ForwardShared<T, D, forward>) <= 227 * 1024 && Tiles::rows >= fewest_forward_rows);
    launch(function, tiled::forward_kernel<T, D, forward>, blocks, Tiles::threads, sizeof(tiled::ForwardShared<T, D, forward>),
           stream, params);
    return true;
  };
  const auto blocks = [&](std::int64_t behind = 0) {
    return tiled::staying_blocks(pieces, params.ticket, function, stream, behind);
  };
  if (known_lse) return run.template operator()<Forward::from_lse>(blocks());
  if (probs != nullptr && !tiled::make_probs_map(&params.probs, probs, dtype_of<T>, probs_tiles_of(s), 16)) return false;
  const auto owner = [&]<Forward anchored, Forward any_range>() {
    // float16 ends at 2^16, which a row that grows leaves too soon.
    if (std::is_same<T, fp16>::value || p.ticket == nullptr) return run.template operator()<any_range>(blocks());
    params.again = {p.ticket + 2, static_cast<int>(pieces)};
    const unsigned staying = blocks(1 + tiled::Again::zeroed(pieces));
    if constexpr (!std::is_same<T, fp16>::value) run.template operator()<anchored>(staying);
    if (params.ticket != nullptr) params.ticket = p.ticket + 1;
    return run.template operator()<any_range>(staying);
  };
  return probs == nullptr ? owner.template operator()<Forward::anchored, Forward::online>()
                          : owner.template operator()<Forward::anchored_kept, Forward::normalised_kept>();
}

template <class T, int D>
bool Kernels<T, D>::forward_probs(const ForwardParams& p, float factor, const char* function, cudaStream_t stream) {
  using Tiles = tiled::ForwardProbsTiles<D>;
  const Shape& s = p.shape;
  tiled::TiledForwardProbsParams params{p, factor, p.ticket, {}, {}};
  if (!p.out.aligned || !tiled::make_tensor_map(&params.v, p.v, dtype_of<T>, s.batch, s.kv_heads, s.keys, Tiles::keys) ||
      !tiled::make_probs_map(&params.probs, p.probs, dtype_of<T>, probs_tiles_of(s), probs_tile))
    return false;
  static_assert(sizeof(tiled::ForwardProbsShared<T, D>) <= 227 * 1024);
  params.args.schedule = row_schedule<T>(s, Tiles::rows, false);
  const unsigned blocks = tiled::staying_blocks(blocks_of(params.args.schedule), params.ticket, function, stream);
  launch(function, tiled::forward_probs_kernel<T, D>, blocks, Tiles::threads, sizeof(tiled::ForwardProbsShared<T, D>), stream,
         params);
  return true;
}

}  // namespace effcore::cuda::attention::hopper
