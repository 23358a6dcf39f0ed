// Launchers of the decoding kernels.
#pragma once
#include "attention/decode.cuh"
#include "attention/launch.h"
#include "attention/schedule.h"
#include "common/cluster.cuh"
#include "common/overlap.cuh"

namespace effcore::cuda::attention {

template <class T, int D, bool from_probs>
void launch_decode(const DecodeParams& p, const char* function, cudaStream_t stream) {
  using Tiles = DecodeTiles<T, D, from_probs, false>;
  using Compact = DecodeTiles<T, D, from_probs, true>;
  const auto run = [&](auto* kernel, int threads, int shared_bytes) {
    const unsigned blocks = static_cast<unsigned>(p.shape.batch) * p.shape.kv_heads * p.head_tiles * p.splits;
    if (p.statistics == nullptr && p.splits > 1)
      launch_clusters(function, kernel, blocks, threads, shared_bytes, stream, p, static_cast<unsigned>(p.splits));
    else
      launch(function, kernel, blocks, threads, shared_bytes, stream, p);
  };
  if (Tiles::shared_bytes == Compact::shared_bytes || Tiles::shared_bytes <= shared_memory_limit(function))
    run(decode_kernel<T, D, from_probs, false>, Tiles::threads, Tiles::shared_bytes);
  else if constexpr (Tiles::shared_bytes != Compact::shared_bytes)
    run(decode_kernel<T, D, from_probs, true>, Compact::threads, Compact::shared_bytes);
}

template <class T, int D>
void Kernels<T, D>::decode(const DecodeParams& p, bool from_probs, const char* function, cudaStream_t stream) {
  const Shape& s = p.shape;
  DecodeParams params = p;
  params.head_tiles = ceil_div(s.group, decode_heads);
  const bool clustered = p.splits == 1 || (p.splits <= max_cluster && has_clusters(function));
  if (clustered) params.partial = nullptr, params.statistics = nullptr;
  from_probs ? launch_decode<T, D, true>(params, function, stream) : launch_decode<T, D, false>(params, function, stream);
  if (!clustered)
    launch_overlapping(function, from_probs ? combine_kernel<T, D, true> : combine_kernel<T, D, false>,
                       dim3(static_cast<unsigned>(s.batch) * s.heads), dim3(combine_threads), p.splits * sizeof(float), stream,
                       params);
}

}  // namespace effcore::cuda::attention
