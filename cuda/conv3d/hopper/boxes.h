// Boxes of positions, the unit in which the kernels for sm_90a cut a tensor: w x t x b x h positions, in this order in shared
// memory (w fastest), one row of 64 channels (128 bytes) a position, fetched by one TMA instruction with zeros outside the
// tensor. A box with a halo holds more lines (positions that share h), so that the taps of one column of the kernel read it at
// steps of one line. (The 128-byte swizzle is a function of the address: a product may begin at any row.)
#pragma once
#include <cuda.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "conv3d/params.h"
#include "effcore/conv3d_taps.h"

namespace effcore::cuda::conv3d::hopper {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

struct Box {
  int w = 0, t = 1, b = 1, h = 1;

  constexpr int line() const { return w * t * b; }
  constexpr int rows() const { return line() * h; }
};

// Sides of boxes: powers of two, and seven times these for the grids of 7 * 2^n that are common.
constexpr int box_sides[] = {1, 2, 4, 7, 8, 14, 16, 28, 32, 56, 64, 112, 128, 256};

// The box of `rows` positions that covers a grid at the least cost(boxes, rows with halo); w = 0 where none has at most
// `most_rows` with the halo.
template <class Cost>
Box choose_box(int rows, int most_rows, const std::int64_t grid[3], std::int64_t batch, int halo, const Cost& cost) {
  Box best;
  double least = std::numeric_limits<double>::infinity();
  for (const int h : box_sides)
    for (const int b : box_sides)
      for (const int t : box_sides) {
        if (h > 16 || rows % (t * b * h) != 0) continue;
        const Box box{rows / (t * b * h), t, b, h};
        const int with_halo = box.line() * (h + halo);
        if (with_halo > most_rows || box.line() % 8 != 0) continue;
        const double boxes =
            static_cast<double>(ceil_div(grid[2], box.w) * ceil_div(grid[0], t) * ceil_div(batch, b) * ceil_div(grid[1], h));
        const double cycles = cost(boxes, with_halo);
        if (cycles < least) least = cycles, best = box;
      }
  return best;
}

struct Corner {
  int w, t, b, h;
};

// A grid [batch, t, h, w] cut into boxes, h outermost.
struct Tiling {
  Box box;
  int tiles;
  int batch, grid[3], step[3];        // step: of the tensor that the boxes read, a position
  Divider line, frames, width;        // rows of a line, of its w and t, and of its w
  Divider tiles_w, tiles_t, tiles_b;  // along these, w innermost

  Tiling() = default;
  Tiling(const Box& size, const std::int64_t grid_size[3], std::int64_t batch_size, const std::int64_t steps[3])
      : box(size), batch(static_cast<int>(batch_size)), line(size.line()), frames(size.w * size.t), width(size.w) {
    for (int d = 0; d < 3; ++d) grid[d] = static_cast<int>(grid_size[d]), step[d] = static_cast<int>(steps[d]);
    const std::int64_t along_w = ceil_div(grid[2], box.w), along_t = ceil_div(grid[0], box.t), along_b = ceil_div(batch, box.b);
    constexpr std::int64_t one = 1;  // an empty grid is not divided
    tiles_w = Divider(std::max(along_w, one)), tiles_t = Divider(std::max(along_t, one)),
    tiles_b = Divider(std::max(along_b, one));
    tiles = static_cast<int>(ceil_div(grid[1], box.h) * along_w * along_t * along_b);
  }
#if defined(__CUDACC__)
  // Beyond the last tile: outside of the grid.
  __device__ __forceinline__ Corner corner(int tile) const {
    Corner at;
    const auto take = [&](const Divider& count) {  // the rest
      int rest = tile;
      tile = count.take(rest);
      return rest;
    };
    at.w = take(tiles_w) * box.w;
    at.t = take(tiles_t) * box.t;
    at.b = take(tiles_b) * box.b;
    at.h = tile * box.h;
    return at;
  }
  // The position of a row of the box at `from`.
  __device__ __forceinline__ Corner position(const Corner& from, int row) const {
    Corner at;
    at.h = from.h + line.take(row);
    at.b = from.b + frames.take(row);
    at.t = from.t + width.take(row);
    at.w = from.w + row;
    return at;
  }
  __device__ __forceinline__ bool holds(const Corner& at) const {
    return at.w < grid[2] && at.t < grid[0] && at.b < batch && at.h < grid[1];
  }
#endif
};

// Taps that share a box: neighbours along h, a step apart.
struct Column {
  std::int64_t t, h, w;  // of the first
  std::vector<std::int64_t> numbers;
};

// At most `most` taps each; in the order of their first taps.
std::vector<Column> columns_of(const std::vector<effcore::conv3d::PlacedTap>& taps, std::int64_t step_h, std::size_t most);

// Where neighbouring positions read neighbouring voxels (step 1 along h and w), one box serves all taps of a frame: a box of
// whole lines of `pitch` rows, from voxel first_w on. A tap reads it from row (h - the frame's first h) * line + w - first_w
// on. Lines share their margins: where voxels on the left of a line are zeros, they are those on the right of the line before
// as well. The last line's are `margin` rows of zeros behind a box.
struct Span {
  std::int64_t first = std::numeric_limits<std::int64_t>::max(), last = std::numeric_limits<std::int64_t>::min();

  void take(std::int64_t from, std::int64_t to) { first = std::min(first, from), last = std::max(last, to); }
  std::int64_t reach() const { return last - first; }
};

struct FrameOfTaps {
  std::int64_t t;
  Span h, w;
};

std::vector<FrameOfTaps> frames_of(const std::vector<Column>& columns);

struct Lines {
  std::int64_t width, first_w, pitch, margin, halo;  // halo: lines more

  Lines(const std::vector<FrameOfTaps>& frames, std::int64_t width, std::int64_t voxels_of_line);
  // Taps of more than one line, or that read the last line's margin, which stands behind the halo.
  bool needs_halo(const FrameOfTaps& f) const { return f.h.reach() > 0 || f.w.last - first_w > pitch - width; }
};

// The box of whole lines of at most `most_frames` frames, as few as cover a grid and the least halo among equals, whose
// positions fit, and their number; w = 0 where none does.
Box choose_lines(std::int64_t positions, std::int64_t most_frames, const Lines& lines, const std::int64_t grid[3],
                 std::int64_t batch, std::int64_t& tiles);

// Boxes of 64 channels with this many lines out of a tensor [B, C, T, H, W], of which positions `step` apart are read. False
// where TMA cannot do it (see `readable`, and steps beyond 8).
bool encode_boxes(CUtensorMap* map, const TensorView& voxels, const Box& box, int lines, const std::int64_t step[3]);

// bfloat16 or float16 of which TMA can fetch rows: everything is a multiple of 16 bytes.
bool readable(const TensorView& voxels);

}  // namespace effcore::cuda::conv3d::hopper
