// Plans, tensor maps and launches of the products that read one box for all taps.
#include "conv3d/hopper/boxed.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/overlap.cuh"
#include "common/tensor_map.h"
#include "conv3d/hopper/boxed.cuh"
#include "conv3d/hopper/boxes.h"

namespace effcore::cuda::conv3d::hopper {
namespace {

constexpr int dimension[4] = {2, 4, 3, 0};  // t, w, h, b among B, C, T, H, W
constexpr int tap_dimension[3] = {0, 2, 1};  // t, w, h among t, h, w

// A box of voxels around a sub-tile: its rows in t, w, h, b, and where it begins from the sub-tile's corner in t, w, h.
struct Halo {
  std::int64_t low[3], high[3];

  explicit Halo(const RowsProblem& problem) {
    for (int d = 0; d < 3; ++d) {
      low[d] = std::numeric_limits<std::int64_t>::max(), high[d] = std::numeric_limits<std::int64_t>::min();
      for (const auto& tap : problem.taps) {
        low[d] = std::min(low[d], tap.place[tap_dimension[d]]);
        high[d] = std::max(high[d], tap.place[tap_dimension[d]]);
      }
    }
  }
  // All frames where the sub-tile has all of them (and no more than it makes): taps beyond read zeros.
  static bool whole(const RowsProblem& problem, int side) {
    return side >= problem.to.size[2] && problem.from.size[2] <= problem.to.size[2];
  }
  std::int64_t extent(const RowsProblem& problem, const int side[4], int d) const {
    if (d == 0 && whole(problem, side[0])) return problem.from.size[2];
    return side[d] + (d < 3 ? high[d] - low[d] : 0);
  }
  std::int64_t rows(const RowsProblem& problem, const int side[4]) const {
    std::int64_t rows = 1;
    for (int d = 0; d < 4; ++d) rows *= extent(problem, side, d);
    return rows;
  }
};

int columns_of_block(const RowsProblem& problem) {
  return problem.padded_columns % 128 == 0 ? 128 : 64;
}

int shared_bytes(int box_stages, int tile_stages, int subtiles, std::int64_t box_rows, int columns) {
  const auto box_bytes = static_cast<int>(ceil_div(box_rows * 128, 1024) * 1024);
  return zero_bytes + box_stages * subtiles * box_bytes + tile_stages * columns * 128 + static_cast<int>(sizeof(BoxedRings));
}

constexpr int least_tile_stages = 3;

template <class T, int Subtiles, int Columns, int Split = 1>
bool run(const char* function, BoxedRowsParams p, int tiles, const Launch& launch) {
  const dim3 grid(static_cast<unsigned>(ceil_div(tiles, Subtiles)), static_cast<unsigned>(ceil_div(p.columns, Columns)), Split);
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, function);
  const auto bytes = [&](int boxes, int weights) { return shared_bytes(boxes, weights, Subtiles, p.box_rows, Columns); };
  p.box_stages = 1, p.tile_stages = least_tile_stages;
  if (bytes(p.box_stages, p.tile_stages) > most) return false;
  while (p.box_stages < std::min<int>(most_box_stages, static_cast<int>(ceil_div(p.blocks, Split))) &&
         bytes(p.box_stages + 1, least_tile_stages + 1) <= most)
    ++p.box_stages;
  while (p.tile_stages < most_tile_stages && bytes(p.box_stages, p.tile_stages + 1) <= most) ++p.tile_stages;
  // The results, and the sums that a pair exchanges, take the place of voxels and weights.
  constexpr int results = zero_bytes + (Split > 1 ? 1 : Subtiles) * rows_of_subtile * Columns * 2 + (Split > 1 ? 2 * rows_of_subtile * Columns * 2 : 0);
  launch_overlapping(function, conv3d_boxed_kernel<T, Subtiles, Columns, Split>, grid, boxed_threads,
                     static_cast<std::size_t>(std::max(bytes(p.box_stages, p.tile_stages), results)),
                     static_cast<cudaStream_t>(launch.stream), p, dim3(1, 1, Split));
  return true;
}

template <class T>
bool run(const char* function, const BoxedRowsParams& p, int tiles, int columns, const BoxedPlan& plan, const Launch& launch) {
  if (columns == 128) {
    if (plan.split == 2) return run<T, 2, 128, 2>(function, p, tiles, launch);
    switch (plan.subtiles) {
      case 1: return run<T, 1, 128>(function, p, tiles, launch);
      case 2: return run<T, 2, 128>(function, p, tiles, launch);
      default: return run<T, 3, 128>(function, p, tiles, launch);
    }
  }
  switch (plan.subtiles) {
    case 2: return run<T, 2, 64>(function, p, tiles, launch);
    case 3: return run<T, 3, 64>(function, p, tiles, launch);
    default: return run<T, 4, 64>(function, p, tiles, launch);
  }
}

}  // namespace

BoxedPlan plan_boxes(const RowsProblem& problem) {
  constexpr double multiprocessors = 132, flops = 4096, bytes_a_cycle = 24, most_bytes_a_cycle = 48, begin_and_end = 5000;
  const Halo halo(problem);
  const int columns = columns_of_block(problem);
  const auto taps = static_cast<double>(problem.taps.size()), blocks = static_cast<double>(problem.padded_channels / 64);
  const double product = taps * 2 * rows_of_subtile * columns * 64 / flops;  // cycles of a sub-tile and 64 channels
  const double weights = taps * columns * 128;                               // bytes of 64 channels
  const TensorView& to = problem.to;
  BoxedPlan plan{{}, 0, 1};
  // The box: what all sub-tiles take, as if two shared the weights.
  double least = std::numeric_limits<double>::infinity(), tiles = 0;
  constexpr int sides[] = {1, 2, 4, 7, 8, 14, 16};
  const auto useful = [](int side, std::int64_t size) { return side == 1 || side < 2 * size; };
  for (const int t : {1, 2, 4, 8, 16})
    for (const int w : sides)
      for (const int h : sides)
        for (int b = 1; b * t * w * h <= rows_of_subtile; b *= 2) {
          if (!useful(t, to.size[2]) || !useful(w, to.size[4]) || !useful(h, to.size[3]) || !useful(b, to.size[0])) continue;
          const int side[4] = {t, w, h, b};
          const std::int64_t rows = halo.rows(problem, side);
          if (shared_bytes(1, least_tile_stages, 2, rows, columns) > 227 * 1024) continue;
          double count = 1;
          for (int d = 0; d < 4; ++d) count *= static_cast<double>(ceil_div(to.size[dimension[d]], side[d]));
          const double cost = count * std::max(product, (static_cast<double>(rows) * 128 + weights / 2) / bytes_a_cycle);
          if (cost < least) least = cost, tiles = count, std::copy(side, side + 4, plan.side);
        }
  if (tiles == 0) return plan;
  // Sub-tiles of a block and splits: waves of blocks.
  const std::int64_t rows = halo.rows(problem, plan.side);
  const double column_blocks = std::ceil(static_cast<double>(to.size[1]) / columns);
  least = std::numeric_limits<double>::infinity();
  for (int subtiles = columns == 128 ? 1 : 2; subtiles <= (columns == 128 ? 3 : 4); ++subtiles)
    for (int split = 1; split <= (columns == 128 && subtiles == 2 && blocks >= 2 ? 2 : 1); ++split) {
      if (shared_bytes(1, least_tile_stages, subtiles, rows, columns) > 227 * 1024) continue;
      const double count = std::ceil(tiles / subtiles) * column_blocks * split, own = std::ceil(blocks / split);
      const double box = subtiles * static_cast<double>(rows) * 128;
      const double speed = std::min(most_bytes_a_cycle, bytes_a_cycle * std::max(1.0, multiprocessors / count));
      const bool waits = own > 1 && shared_bytes(2, least_tile_stages + 1, subtiles, rows, columns) > 227 * 1024;
      const double exposed = (waits ? own : 1) * box / most_bytes_a_cycle;
      const double cycles = begin_and_end + (split > 1 ? 3000 : 0) + exposed +
                            own * std::max(subtiles * product, (box + weights) / speed);
      const double time = std::ceil(count / multiprocessors) * cycles;
      if (time < least) least = time, plan.subtiles = subtiles, plan.split = split;
    }
  return plan;
}

bool boxed_rows(const char* function, const RowsProblem& problem, const BoxedPlan& plan, const Launch& launch) {
  const TensorView &from = problem.from, &to = problem.to;
  if (plan.subtiles == 0 || problem.taps.empty() || problem.taps.size() > max_taps || !readable(from)) return false;
  const Halo halo(problem);
  BoxedRowsParams p{};
  int tiles = 1;
  cuuint64_t size[5] = {static_cast<cuuint64_t>(from.size[1])}, stride[4];
  cuuint32_t box[5] = {64};
  for (int d = 0; d < 4; ++d) {
    p.side[d] = plan.side[d];
    p.grid[d] = static_cast<int>(to.size[dimension[d]]);
    p.out_stride[d] = to.stride[dimension[d]];
    const auto count = static_cast<int>(ceil_div(p.grid[d], p.side[d]));
    if (d < 3) p.tiles[d] = count, p.first[d] = static_cast<int>(halo.low[d]);
    tiles *= count;
    const std::int64_t extent = halo.extent(problem, plan.side, d);
    if (extent > 256) return false;
    box[d + 1] = static_cast<cuuint32_t>(extent);
    size[d + 1] = static_cast<cuuint64_t>(from.size[dimension[d]]);
    // A dimension of size 1 has no stride of its own.
    stride[d] = size[d + 1] == 1 ? static_cast<cuuint64_t>(ceil_div(from.size[1], 8) * 16)
                                 : static_cast<cuuint64_t>(from.stride[dimension[d]] * 2);
  }
  if (tiles == 0) return true;
  if (Halo::whole(problem, plan.side[0])) p.first[0] = 0;
  p.side_t = Divider(p.side[0]), p.side_w = Divider(p.side[1]), p.side_h = Divider(p.side[2]);
  p.frames = static_cast<int>(box[1]);
  p.pitch_w = p.frames, p.pitch_h = p.pitch_w * static_cast<int>(box[2]), p.pitch_b = p.pitch_h * static_cast<int>(box[3]);
  p.box_rows = p.pitch_b * static_cast<int>(box[4]);
  p.box_bytes = static_cast<int>(ceil_div(p.box_rows * 128, 1024) * 1024);
  for (const auto& tap : problem.taps) {
    const std::int64_t t = tap.place[0] - p.first[0], h = tap.place[1] - halo.low[2], w = tap.place[2] - halo.low[1];
    p.tap[p.taps++] = {static_cast<std::int16_t>(t + w * p.pitch_w + h * p.pitch_h), static_cast<std::int16_t>(t),
                       static_cast<std::int16_t>(tap.number)};
  }
  if (!encode_tensor_map(&p.box, from.dtype, from.data, size, stride, box)) return false;
  const int columns = columns_of_block(problem);
  const cuuint64_t weight_size[2] = {static_cast<cuuint64_t>(problem.padded_channels),
                                     static_cast<cuuint64_t>(problem.padded_columns * problem.packed_taps)};
  const cuuint64_t weight_stride[1] = {weight_size[0] * 2};
  const cuuint32_t weight_box[2] = {64, static_cast<cuuint32_t>(columns)};
  if (!encode_tensor_map(&p.weights, from.dtype, problem.packed, weight_size, weight_stride, weight_box)) return false;
  p.blocks = static_cast<int>(problem.padded_channels / 64);
  p.padded_columns = static_cast<int>(problem.padded_columns);
  p.columns = static_cast<int>(to.size[1]);
  p.out = to.data;
  p.out_aligned = reinterpret_cast<std::uintptr_t>(to.data) % 16 == 0 && to.size[1] % 8 == 0;
  for (int d = 0; d < 4; ++d) p.out_aligned = p.out_aligned && p.out_stride[d] % 8 == 0;
  if (problem.bias != nullptr) p.bias = problem.bias->data, p.bias_stride = problem.bias->stride[0];
  if (from.dtype == DType::bfloat16) return run<bf16>(function, p, tiles, columns, plan, launch);
#if !defined(EFFCORE_CUDA_SET_CI)
  return run<fp16>(function, p, tiles, columns, plan, launch);
#else
  return false;
#endif
}

}  // namespace effcore::cuda::conv3d::hopper
