// Launchers of the decoding kernels.
#pragma once
#include <algorithm>

#include "attention/decode.cuh"
#include "attention/launch.h"
#include "common/error.h"

namespace effcore::cuda::attention {

// Splits of the cache: about eight blocks for each place that a multiprocessor has for one, so that neither rows of different length nor
// the last wave leave it idle; no more than there are chunks.
template <class T, int D>
int Kernels<T, D>::decode_splits(const Shape& s, int processors) {
  const std::int64_t head_tiles = (s.group + DecodeTiles<T, D>::heads - 1) / DecodeTiles<T, D>::heads;
  const std::int64_t rows = std::max<std::int64_t>(1, static_cast<std::int64_t>(s.batch) * s.kv_heads * head_tiles);
  const std::int64_t chunks = (s.keys + decode_chunk - 1) / decode_chunk;
  return static_cast<int>(std::clamp<std::int64_t>(16 * processors / rows, 1, std::max<std::int64_t>(chunks, 1)));
}

template <class T, int D>
void Kernels<T, D>::decode(const DecodeParams& p, bool from_probs, const char* function, cudaStream_t stream) {
  using Tiles = DecodeTiles<T, D>;
  const Shape& s = p.shape;
  DecodeParams params = p;
  params.head_tiles = (s.group + Tiles::heads - 1) / Tiles::heads;
  const unsigned blocks = static_cast<unsigned>(s.batch) * s.kv_heads * params.head_tiles * p.splits;
  launch(function, from_probs ? decode_kernel<T, D, true> : decode_kernel<T, D, false>, blocks, Tiles::threads, Tiles::shared_bytes, stream,
         params);
  if (p.splits > 1 || (p.weights != nullptr && !from_probs))
    launch(function, from_probs ? combine_kernel<T, true> : combine_kernel<T, false>, static_cast<unsigned>(s.batch) * s.heads,
           combine_threads, 0, stream, params);
}

}  // namespace effcore::cuda::attention
