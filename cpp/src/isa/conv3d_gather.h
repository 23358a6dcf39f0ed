// The gathered operand of the cross-shaped convolution, block by block: G[row, tap * channels + c] is channel c of the voxel
// that a tap sees from a row's position, or 0 outside the tensor.
//
// Bound: the caches. Each element is copied once for each of the taps, 11 loads and stores of a vector beside 11 * columns
// multiply-adds: a few percent from 64 columns on. Taps that are neighbours along w are copied in one piece.
#pragma once
#include "../conv3d_kernels.h"
#include "../scratch.h"
#include "engines.h"

namespace effcore::conv3d::EFFCORE_ISA {
namespace {

namespace simd = effcore::attention::EFFCORE_ISA;
using simd::least, simd::most;

// Goes through the rows of a plane.
struct Position {
  std::int64_t b, h, w, height, width;

  Position(const std::int64_t grid[3], std::int64_t row)
      : b(row / (grid[1] * grid[2])), h(row / grid[2] % grid[1]), w(row % grid[2]), height(grid[1]), width(grid[2]) {}
  void next() {
    if (++w < width) return;
    w = 0;
    if (++h < height) return;
    h = 0;
    ++b;
  }
};

inline std::int64_t plane_rows(const Gather& g) {
  return g.from.size[0] * g.grid[1] * g.grid[2];
}
inline bool frame_exists(const Gather& g, const Run& run, std::int64_t plane) {
  const std::int64_t t = plane * g.step[0] + run.offset[0];
  return t >= 0 && t < g.from.size[2];
}

// The depth that lies in frames which exist: all of it but some at either end, for runs ascend with time.
struct Depth {
  std::int64_t begin, end;
};
inline Depth live_depth(const Gather& g, std::int64_t plane) {
  std::int64_t first = 0, last = g.run_count;
  Depth taps{0, g.taps};
  for (; first < last && !frame_exists(g, g.runs[first], plane); ++first) taps.begin += g.runs[first].taps;
  for (; first < last && !frame_exists(g, g.runs[last - 1], plane); --last) taps.end -= g.runs[last - 1].taps;
  return {taps.begin * g.from.size[1], taps.end * g.from.size[1]};
}

// to[r * pitch + k - begin] = G[first + r, k] for begin <= k < end; beyond the taps there are zeros.
template <class Storage, class Operand>
void gather(const Gather& g, std::int64_t plane, std::int64_t first, std::int64_t rows, std::int64_t begin, std::int64_t end,
            Operand* to, std::int64_t pitch) {
  const std::int64_t channels = g.from.size[1], height = g.from.size[3], width = g.from.size[4];
  const std::int64_t* stride = g.from.stride;
  std::int64_t run_begin = 0;
  for (std::int64_t i = 0; i < g.run_count && run_begin < end; ++i) {
    const Run& run = g.runs[i];
    const std::int64_t run_end = run_begin + run.taps * channels, from = most(begin, run_begin), until = least(end, run_end);
    if (from < until) {
      const bool frame = frame_exists(g, run, plane);
      const Storage* voxels =
          static_cast<const Storage*>(g.from.data) + (plane * g.step[0] + run.offset[0]) * stride[2] - run_begin;
      Operand* row = to + from - begin;
      Position p(g.grid, first);
      for (std::int64_t r = 0; r < rows; ++r, row += pitch, p.next()) {
        const std::int64_t y = p.h * g.step[1] + run.offset[1], x = p.w * g.step[2] + run.offset[2];
        if (!frame || y < 0 || y >= height) {
          simd::zero(row, until - from);
          continue;
        }
        // Taps -x .. width - x of the run see a voxel; all of them, but at the borders.
        const std::int64_t low = least(until, most(from, run_begin - x * channels));
        const std::int64_t high = most(low, least(until, run_begin + (width - x) * channels));
        simd::zero(row, low - from);
        simd::load_row(row + low - from, voxels + p.b * stride[0] + y * stride[3] + x * stride[4] + low, high - low,
                       high - low);
        simd::zero(row + high - from, until - high);
      }
    }
    run_begin = run_end;
  }
  if (end > run_begin)
    for (std::int64_t r = 0, from = most(begin, run_begin); r < rows; ++r)
      simd::zero(to + r * pitch + from - begin, end - from);
}

}  // namespace
}  // namespace effcore::conv3d::EFFCORE_ISA
