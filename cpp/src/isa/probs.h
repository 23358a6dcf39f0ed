// Kept probabilities: tiles of probs_tile x probs_tile in the dtype of the tensors (effcore/attention.h gives their order).
#pragma once
#include "simd.h"

namespace effcore::attention::EFFCORE_ISA {
namespace {

// The first tile of the block of rows that begins with row `first` of the given head.
template <class Storage>
inline Storage* tiles_of(const Problem& p, void* probs, std::int64_t head_number, std::int64_t first) {
  std::int64_t all = 0, before = 0;
  for (std::int64_t block = 0; block * probs_tile < p.queries; ++block) {
    const std::int64_t tiles = probs_tiles(p, block);
    if (block * probs_tile < first) before += tiles;
    all += tiles;
  }
  return static_cast<Storage*>(probs) + (head_number * all + before) * probs_tile * probs_tile;
}

// Keeps factor[r] * rows[r] for rows [first, first + count) and keys [begin, end), and 0 wherever that does not reach.
template <class Storage, class T>
inline void keep_probs(const Problem& p, void* probs, std::int64_t head_number, std::int64_t first, std::int64_t count,
                       std::int64_t begin, std::int64_t end, const T* rows, std::int64_t row_stride, const T* factor) {
  Storage* to = tiles_of<Storage>(p, probs, head_number, first);
  for (std::int64_t r0 = 0; r0 < count; r0 += probs_tile) {
    const std::int64_t tiles = probs_tiles(p, (first + r0) / probs_tile);
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      const std::int64_t column = tile * probs_tile - begin;
      const bool reached = column >= 0 && column < end - begin;
      for (std::int64_t r = r0; r < r0 + probs_tile; ++r, to += probs_tile) {
        if (reached && r < count)
          store_row(to, rows + r * row_stride + column, probs_tile, factor[r]);
        else
          std::memset(static_cast<void*>(to), 0, probs_tile * sizeof(Storage));
      }
    }
  }
}

// The reverse, for keys [key, key + keys), both multiples of probs_tile.
template <class Storage, class T>
inline void load_probs(const Problem& p, const void* probs, std::int64_t head_number, std::int64_t first, std::int64_t count,
                       std::int64_t key, std::int64_t keys, T* rows, std::int64_t row_stride) {
  const Storage* from = tiles_of<Storage>(p, const_cast<void*>(probs), head_number, first);
  for (std::int64_t r0 = 0; r0 < count; r0 += probs_tile) {
    const std::int64_t tiles = probs_tiles(p, (first + r0) / probs_tile);
    for (std::int64_t r = r0; r < least(r0 + probs_tile, count); ++r)
      for (std::int64_t j = 0; j < keys; j += probs_tile) {
        const std::int64_t tile = (key + j) / probs_tile;
        T* to = rows + r * row_stride + j;
        if (tile < tiles)
          load_row(to, from + (tile * probs_tile + r - r0) * probs_tile, probs_tile, probs_tile);
        else
          fill(to, probs_tile, T(0));
      }
    from += tiles * probs_tile * probs_tile;
  }
}

}  // namespace
}  // namespace effcore::attention::EFFCORE_ISA
