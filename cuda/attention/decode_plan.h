// Into how many splits decoding cuts the cache of a row (a kv head of a batch row, with up to 16 of its query heads).
//
// A split is a block; a processor holds two. Blocks that run together share the bandwidth evenly, and one for each processor is
// enough to use it up. So waves of 2 * processors blocks take as long as their chunks, a last wave of fewer than `processors`
// as long as one of so many, and each wave one chunk's time more, in which the rings fill and run dry. The fewest splits within
// a twentieth of the least such time are taken, for what is cut has to be put together again. Where there are no more rows than
// processors that is a cluster of two at least: it costs nothing, and rows of different length share the GPU better.
#pragma once
#include <algorithm>

#include "attention/schedule.h"

namespace effcore::cuda::attention {

inline int decode_splits(const Shape& s, int head_tiles, int processors) {
  const std::int64_t rows = std::max<std::int64_t>(1, static_cast<std::int64_t>(s.batch) * s.kv_heads * head_tiles);
  const std::int64_t together = 2 * static_cast<std::int64_t>(processors);
  const int chunks = std::max(1, ceil_div(s.keys, decode_chunk));
  const auto time = [&](int splits) {  // in chunks that all blocks of a wave read
    const std::int64_t blocks = rows * splits, last = blocks % together;
    return (ceil_div(chunks, splits) + 1) * (blocks - last + (last > 0 ? std::max<std::int64_t>(last, processors) : 0));
  };
  const int fewest = rows <= processors ? std::min(2, chunks) : 1;
  const int most = static_cast<int>(std::clamp<std::int64_t>(4 * together / rows, fewest, chunks));
  std::int64_t least = time(fewest);
  for (int splits = fewest + 1; splits <= most; ++splits) least = std::min(least, time(splits));
  int splits = fewest;
  while (20 * time(splits) > 21 * least) ++splits;
  return splits;
}

}  // namespace effcore::cuda::attention
