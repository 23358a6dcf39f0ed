// Tiles, boxes and launches of whole lines.
#include <algorithm>
#include <limits>

#include "common/overlap.cuh"
#include "common/tensor_map.h"
#include "conv3d/hopper/dispatch.h"
#include "conv3d/hopper/frames.cuh"
#include "conv3d/hopper/lines.cuh"
#include "conv3d/hopper/lines.h"

namespace effcore::cuda::conv3d::hopper {
namespace {

template <class T, int Columns, int First, int Second, bool Transposed>
bool run(const char* function, LinesParams p, const Launch& launch) {
  const int memory = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, function);
  constexpr int positions = positions_of_lines<Columns, First, Second>;
  const auto bytes = [&](int voxels, int weights) {
    return voxels * p.stage_bytes + weights * Columns * 128 + static_cast<int>(sizeof(LinesMemory<positions>));
  };
  p.voxel_stages = 2, p.weight_stages = 3;
  if (bytes(p.voxel_stages, p.weight_stages) > memory) return false;
  while (p.voxel_stages < most_line_voxel_stages && bytes(p.voxel_stages + 1, p.weight_stages) <= memory) ++p.voxel_stages;
  while (p.weight_stages < most_line_weight_stages && bytes(p.voxel_stages, p.weight_stages + 1) <= memory) ++p.weight_stages;
  const int device = device_attribute(cudaDevAttrMultiProcessorCount, function);
  // The middle's two kernels take two stages at once, for which a block of three waits: with 128 channels at [32, 16, 28, 28]
  // about as long as for another tap. There packing them pays.
  if (!p.packed && p.weight_stages < 4 && p.items > 2 * device) return false;
  launch_overlapping(function, conv3d_lines_kernel<T, Columns, First, Second, Transposed>,
                     dim3(static_cast<unsigned>(std::min(p.items, device))), line_threads,
                     static_cast<std::size_t>(bytes(p.voxel_stages, p.weight_stages)), static_cast<cudaStream_t>(launch.stream),
                     p);
  return true;
}

}  // namespace

bool lines(const char* function, const RowsProblem& problem, const Launch& launch) {
  const TensorView &from = problem.from, &to = problem.to;
  if (problem.taps.empty()) return false;
  if (problem.step[1] != 1 || problem.step[2] != 1 || !readable(from) || !readable(to) || to.size[1] % 8 != 0) return false;
  if (to.size[0] * to.stride[0] >= std::int64_t{1} << 33) return false;  // offsets of 8 elements in 32 bits
  const std::int64_t* const grid = to.size + 2;
  const std::vector<Column> columns = columns_of(problem.taps, 1, max_taps);
  const std::vector<FrameOfTaps> frames = frames_of(columns);
  const Lines lines(frames, grid[2], from.size[4]);
  if (frames.size() > most_frames || lines.pitch > 256) return false;

  struct Choice {
    int columns, positions;
  };
  constexpr Choice choices[] = {{128, 408}, {128, 224}, {128, 216}, {64, 416}};
  Box box;
  Choice choice{};
  std::int64_t items = 0;
  double least = std::numeric_limits<double>::infinity();
  const int columns_of_block = problem.padded_columns % 128 == 0 ? 128 : 64;
  const std::int64_t column_blocks = problem.padded_columns / columns_of_block;
  const std::int64_t device = device_attribute(cudaDevAttrMultiProcessorCount, function);
  const std::int64_t products = problem.padded_channels / 64 * static_cast<std::int64_t>(problem.taps.size());
  for (const Choice& c : choices) {
    if (c.columns != columns_of_block) continue;
    std::int64_t tiles = 0;
    const Box b = choose_lines(c.positions, grid[0], lines, grid, to.size[0], tiles);
    const std::int64_t count = tiles * column_blocks;
    if (count == 0) continue;
    // Steps of one tap and 64 channels; the beginning and the end of a tile cost as much as some.
    const double time = static_cast<double>(ceil_div(count, device) * c.columns * c.positions * (products + 2));
    if (time < least) least = time, box = b, choice = c, items = count;
  }
  const double time_of_frames = static_cast<double>(frame_columns * frame_positions * (products + 4));
  if (time_of_frames < least && conv3d::hopper::frames(function, problem, lines, frames, launch)) return true;
  if (choice.positions == 0) return false;

  LinesParams p{};
  const auto box_lines = [&](CUtensorMap* map, std::int64_t h) {
    return encode_boxes(map, from, box, static_cast<int>(h), problem.step);
  };
  if (!box_lines(&p.box, box.h) || !box_lines(&p.box_with_halo, box.h + lines.halo)) return false;
  if (!encode_weights(p.weights, problem, transposed(problem) ? 64 : columns_of_block)) return false;

  int numbers = 0;
  for (const FrameOfTaps& f : frames) {
    LoadedFrame& frame = p.frame[p.frames_of_taps++];
    frame = {static_cast<std::int16_t>(f.t), static_cast<std::int16_t>(f.h.first), static_cast<std::int16_t>(numbers), 0,
             lines.needs_halo(f)};
    for (const auto& tap : problem.taps) {
      if (tap.place[0] != f.t) continue;
      ++frame.taps;
      const PlaceOfWeights weights = place_of_weights(problem, tap);
      p.tap[numbers++] = {weights.map, weights.number, weights.added,
                          static_cast<std::int16_t>((tap.place[1] - f.h.first) * box.line() + tap.place[2] - lines.first_w)};
    }
  }
  const std::int64_t halo_rows = box.line() * (box.h + lines.halo);
  p.tiling = Tiling(box, grid, to.size[0], problem.step);
  p.first_w = static_cast<int>(lines.first_w);
  p.column_blocks = Divider(column_blocks);
  p.items = static_cast<int>(items);
  p.box_bytes = box.rows() * 128, p.halo_bytes = static_cast<int>(halo_rows * 128);
  p.zero_from = p.halo_bytes, p.stage_bytes = static_cast<int>(ceil_div(halo_rows + lines.margin, 8) * 1024);
  p.blocks = static_cast<int>(problem.padded_channels / 64);
  p.half_blocks = (from.size[1] - 1) % 64 < 32 ? 1 : 0;
  p.packed = problem.packed != nullptr;
  p.taps = numbers;
  set_results(p, problem);
  const auto run_as = [&]<bool Transposed>(auto zero, std::bool_constant<Transposed>) {
    using T = decltype(zero);
    if (choice.columns == 64) return run<T, 64, 208, 0, Transposed>(function, p, launch);
    if (choice.positions == 408) return run<T, 128, 208, 200, Transposed>(function, p, launch);
    if (choice.positions == 224) return run<T, 128, 224, 0, Transposed>(function, p, launch);
    return run<T, 128, 216, 0, Transposed>(function, p, launch);
  };
  return run_16bit(from.dtype, [&](auto zero) {
    return transposed(problem) ? run_as(zero, std::true_type{}) : run_as(zero, std::false_type{});
  });
}

}  // namespace effcore::cuda::conv3d::hopper
