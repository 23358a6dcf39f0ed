// Boxes of positions, the unit in which the kernels for sm_90a cut a tensor: 2^w x 2^t x 2^b x 2^h positions, in this order in
// shared memory (w fastest), one row of 64 channels (128 bytes) a position, fetched by one TMA instruction with zeros outside
// the tensor. A box with a halo holds more lines (positions that share h), so that the taps of one column of the kernel read it
// at steps of one line: a line is a multiple of 8 rows, 1024 bytes, so that the swizzle stays.
#pragma once
#include <cuda.h>

#include <limits>
#include <vector>

#include "conv3d/params.h"
#include "effcore/conv3d_taps.h"

namespace effcore::cuda::conv3d::hopper {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

struct Box {
  int w = -1, t = 0, b = 0, h = 0;  // logarithms

  int line() const { return 1 << (w + t + b); }
  int lines() const { return 1 << h; }
};

// The box of 2^log_rows positions that covers a grid at the least cost(boxes, rows with halo), w = -1 where none has at most
// `most_rows` with the halo.
template <class Cost>
Box choose_box(int log_rows, int most_rows, const std::int64_t grid[3], std::int64_t batch, int halo, const Cost& cost) {
  Box best;
  double least = std::numeric_limits<double>::infinity();
  for (int h = 0; h <= 4; ++h)
    for (int b = 0; b + h <= log_rows; ++b)
      for (int t = 0; t + b + h <= log_rows; ++t) {
        Box box;
        box.w = log_rows - t - b - h, box.t = t, box.b = b, box.h = h;
        const int rows = box.line() * (box.lines() + halo);
        if (rows > most_rows || box.line() % 8 != 0) continue;
        const double boxes = static_cast<double>(ceil_div(grid[2], 1 << box.w) * ceil_div(grid[0], 1 << t) *
                                                 ceil_div(batch, 1 << b) * ceil_div(grid[1], 1 << h));
        const double cycles = cost(boxes, rows);
        if (cycles < least) least = cycles, best = box;
      }
  return best;
}

struct Corner {
  int w, t, b, h;
};

// A grid [batch, t, h, w] cut into boxes, h outermost.
struct Tiling {
  int log_w, log_t, log_b, log_h;
  int tiles_w, tiles_t, tiles_b, tiles;
  int line;
  int batch, grid[3], step[3];  // step: of the tensor that the boxes read, a position

  Tiling() = default;
  Tiling(const Box& box, const std::int64_t size[3], std::int64_t batch_size, const std::int64_t steps[3])
      : log_w(box.w), log_t(box.t), log_b(box.b), log_h(box.h), line(box.line()), batch(static_cast<int>(batch_size)) {
    for (int d = 0; d < 3; ++d) grid[d] = static_cast<int>(size[d]), step[d] = static_cast<int>(steps[d]);
    tiles_w = static_cast<int>(ceil_div(size[2], 1 << box.w));
    tiles_t = static_cast<int>(ceil_div(size[0], 1 << box.t));
    tiles_b = static_cast<int>(ceil_div(batch_size, 1 << box.b));
    tiles = static_cast<int>(ceil_div(size[1], 1 << box.h) * tiles_w * tiles_t * tiles_b);
  }
#if defined(__CUDACC__)
  // Beyond the last tile: outside of the grid.
  __device__ __forceinline__ Corner corner(int tile) const {
    Corner at;
    at.w = tile % tiles_w << log_w;
    tile /= tiles_w;
    at.t = tile % tiles_t << log_t;
    tile /= tiles_t;
    at.b = tile % tiles_b << log_b;
    at.h = tile / tiles_b << log_h;
    return at;
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

// Boxes of 64 channels with this many lines out of a tensor [B, C, T, H, W], of which positions `step` apart are read. False
// where TMA cannot do it (see `readable`, and steps beyond 8).
bool encode_boxes(CUtensorMap* map, const TensorView& voxels, const Box& box, int lines, const std::int64_t step[3]);

// bfloat16 or float16 of which TMA can fetch rows: everything is a multiple of 16 bytes.
bool readable(const TensorView& voxels);

}  // namespace effcore::cuda::conv3d::hopper
