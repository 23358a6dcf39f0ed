// Tiles, boxes and launches of whole lines.
#include <algorithm>
#include <limits>

#include "common/overlap.cuh"
#include "common/tensor_map.h"
#include "conv3d/hopper/lines.cuh"
#include "conv3d/hopper/lines.h"

namespace effcore::cuda::conv3d::hopper {
namespace {

struct Extent {
  std::int64_t first = std::numeric_limits<std::int64_t>::max(), last = std::numeric_limits<std::int64_t>::min();
  void take(std::int64_t n) { first = std::min(first, n), last = std::max(last, n); }
  std::int64_t reach() const { return last - first; }
};

struct Frame {
  std::int64_t t;
  Extent h, w;
  std::vector<effcore::conv3d::PlacedTap> taps;
};

std::vector<Frame> frames_of(const std::vector<effcore::conv3d::PlacedTap>& taps) {
  std::vector<Frame> frames;
  for (const auto& tap : taps) {
    auto frame = std::find_if(frames.begin(), frames.end(), [&](const Frame& f) { return f.t == tap.place[0]; });
    if (frame == frames.end()) frame = frames.insert(frames.end(), Frame{tap.place[0], {}, {}, {}});
    frame->h.take(tap.place[1]), frame->w.take(tap.place[2]);
    frame->taps.push_back(tap);
  }
  return frames;
}

// t x b frames' h lines at a time.
struct TileOfLines {
  std::int64_t h = 0, t = 0, b = 0, tiles = 0;
};

TileOfLines choose_tile(std::int64_t positions, std::int64_t pitch, const std::int64_t grid[3], std::int64_t batch) {
  TileOfLines best;
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (std::int64_t t = 1; t <= grid[0]; ++t)
    for (std::int64_t b = 1; b <= (t == grid[0] ? batch : 1); ++b)
      for (std::int64_t h = 1; h <= grid[1]; ++h) {
        const std::int64_t rows = (h * t * b - 1) * pitch + grid[2];
        if (rows > positions) break;
        const std::int64_t tiles = ceil_div(grid[0], t) * ceil_div(batch, b) * ceil_div(grid[1], h);
        // Among equals the one with the least halo.
        const std::int64_t cost = tiles * 1024 + t * b;
        if (cost < least) least = cost, best = {h, t, b, tiles};
      }
  return best;
}

template <class T, int First, int Second, bool Split>
bool run(const char* function, LinesParams p, const Launch& launch) {
  const int memory = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, function);
  constexpr int received = Split ? (First + Second) / 4 * line_consumers * 4 : 0;
  const auto bytes = [&](int voxels, int weights) {
    const int rings = voxels * p.stage_bytes + weights * columns_of_lines * 128;
    return static_cast<int>(ceil_div(rings + static_cast<int>(sizeof(LinesMemory<First + Second>)), 16)) * 16;
  };
  const int most = memory - received;
  p.voxel_stages = 2, p.weight_stages = 3;
  if (bytes(p.voxel_stages, p.weight_stages) > most) return false;
  while (p.voxel_stages < 3 && bytes(p.voxel_stages + 1, p.weight_stages) <= most) ++p.voxel_stages;
  while (p.weight_stages < most_line_weight_stages && bytes(p.voxel_stages, p.weight_stages + 1) <= most) ++p.weight_stages;
  p.received_from = bytes(p.voxel_stages, p.weight_stages);
  const int device = device_attribute(cudaDevAttrMultiProcessorCount, function);
  const auto kernel = conv3d_lines_kernel<T, First, Second, Split>;
  const std::size_t shared_bytes = static_cast<std::size_t>(p.received_from + received);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), function);
  cudaLaunchAttribute attribute[2];
  attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[0].val.programmaticStreamSerializationAllowed = 1;
  attribute[1].id = cudaLaunchAttributeClusterDimension;
  attribute[1].val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(Split ? 2 * p.items : std::min(p.items, device)));
  config.blockDim = line_threads, config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = attribute, config.numAttrs = Split ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, p), function);
  return true;
}

}  // namespace

bool lines(const char* function, const RowsProblem& problem, const Launch& launch) {
  const TensorView &from = problem.from, &to = problem.to;
  if (problem.taps.empty() || problem.padded_columns % columns_of_lines != 0) return false;
  if (problem.step[1] != 1 || problem.step[2] != 1 || !readable(from) || !readable(to) || to.size[1] % 8 != 0) return false;
  const std::int64_t* const grid = to.size + 2;
  const std::vector<Frame> frames = frames_of(problem.taps);
  if (frames.size() > most_frames) return false;
  Extent w;
  std::int64_t halo = 0;
  for (const Frame& f : frames) w.take(f.w.first), w.take(f.w.last), halo = std::max(halo, f.h.reach());

  // Rows of a line: all that its taps read, or up to where only zeros follow that stand before the next line as well.
  const std::int64_t width = grid[2];
  const std::int64_t pitch = std::min(width + w.reach(), std::max(from.size[4] - w.first, width + w.last));
  if (pitch > 256) return false;
  struct Choice {
    int positions;
    bool split;
  };
  constexpr Choice choices[3] = {{408, false}, {224, false}, {224, true}};
  TileOfLines tile;
  Choice choice{};
  double least = std::numeric_limits<double>::infinity();
  const std::int64_t column_blocks = problem.padded_columns / columns_of_lines;
  const std::int64_t device = device_attribute(cudaDevAttrMultiProcessorCount, function);
  const std::int64_t products = problem.padded_channels / 64 * static_cast<std::int64_t>(problem.taps.size());
  for (const Choice& c : choices) {
    const TileOfLines t = choose_tile(c.positions, pitch, grid, to.size[0]);
    const std::int64_t items = t.tiles * column_blocks;
    if (t.tiles == 0 || (c.split && (2 * items > device || problem.padded_channels < 128))) continue;
    // Steps of one tap and 64 channels; the beginning and the end of a tile cost as much as some.
    const double time = static_cast<double>(ceil_div(items, device) * (c.positions * (c.split ? (products + 1) / 2 + 3 : products + 2)));
    if (time < least) least = time, tile = t, choice = c;
  }
  if (choice.positions == 0) return false;

  LinesParams p{};
  const std::int64_t line = pitch * tile.t * tile.b;
  constexpr int order[5] = {1, 4, 2, 0, 3};
  const auto encode = [&](CUtensorMap* map, std::int64_t lines) {
    const std::int64_t sides[5] = {64, pitch, tile.t, tile.b, lines}, steps[5] = {1, 1, problem.step[0], 1, 1};
    cuuint64_t size[5], stride[4];
    cuuint32_t side[5], traversal[5];
    for (int d = 0; d < 5; ++d) {
      if (steps[d] > 8 || sides[d] * steps[d] > 256) return false;
      size[d] = static_cast<cuuint64_t>(from.size[order[d]]);
      side[d] = static_cast<cuuint32_t>(sides[d] * steps[d]);
      traversal[d] = static_cast<cuuint32_t>(steps[d]);
    }
    for (int d = 1; d < 5; ++d)
      stride[d - 1] = size[d] == 1 ? static_cast<cuuint64_t>(ceil_div(from.size[1], 8) * 16)
                                   : static_cast<cuuint64_t>(from.stride[order[d]] * 2);
    return encode_tensor_map(map, from.dtype, from.data, size, stride, side, traversal);
  };
  if (!encode(&p.box, tile.h) || !encode(&p.box_with_halo, tile.h + halo)) return false;
  const cuuint64_t weight_size[2] = {static_cast<cuuint64_t>(problem.padded_channels),
                                     static_cast<cuuint64_t>(problem.padded_columns * problem.packed_taps)};
  const cuuint64_t weight_stride[1] = {weight_size[0] * 2};
  const cuuint32_t weight_box[2] = {64, columns_of_lines};
  if (!encode_tensor_map(&p.weights, from.dtype, problem.packed, weight_size, weight_stride, weight_box)) return false;

  int numbers = 0;
  for (const Frame& f : frames) {
    // Taps that leave a line to the right read on in the next: with the last line's margin, which stands in the halo's box.
    const bool with_halo = f.h.reach() > 0 || f.w.last - w.first > pitch - width;
    FrameOfTaps& frame = p.frame[p.frames_of_taps++];
    frame = {static_cast<std::int16_t>(f.t), static_cast<std::int16_t>(f.h.first), static_cast<std::int16_t>(numbers),
             static_cast<std::int16_t>(f.taps.size()), with_halo};
    for (const auto& tap : f.taps) {
      p.number[numbers] = static_cast<std::int16_t>(tap.number);
      p.shift[numbers++] = static_cast<std::int16_t>((tap.place[1] - f.h.first) * line + tap.place[2] - w.first);
    }
  }
  const std::int64_t halo_rows = line * (tile.h + halo), margin = std::max<std::int64_t>(w.reach() - (pitch - width), 0);
  p.side[0] = static_cast<int>(width), p.side[1] = static_cast<int>(tile.t), p.side[2] = static_cast<int>(tile.b);
  p.side[3] = static_cast<int>(tile.h);
  p.tiles[0] = static_cast<int>(ceil_div(grid[0], tile.t)), p.tiles[1] = static_cast<int>(ceil_div(to.size[0], tile.b));
  p.tiles[2] = static_cast<int>(ceil_div(grid[1], tile.h));
  p.batch = static_cast<int>(to.size[0]);
  for (int d = 0; d < 3; ++d) p.grid[d] = static_cast<int>(grid[d]);
  p.step_t = static_cast<int>(problem.step[0]), p.first_w = static_cast<int>(w.first);
  p.line = Divider(line), p.pitch = Divider(pitch), p.frames = Divider(tile.t);
  p.column_blocks = static_cast<int>(column_blocks);
  p.items = static_cast<int>(tile.tiles * column_blocks);
  if (p.items == 0) return true;
  p.box_bytes = static_cast<int>(line * tile.h * 128), p.halo_bytes = static_cast<int>(halo_rows * 128);
  p.zero_from = p.halo_bytes, p.stage_bytes = static_cast<int>(ceil_div(halo_rows + margin, 8) * 1024);
  p.blocks = static_cast<int>(problem.padded_channels / 64);
  p.padded_columns = static_cast<int>(problem.padded_columns);
  p.columns = static_cast<int>(to.size[1]);
  p.out = to.data;
  constexpr int out_order[4] = {0, 2, 3, 4};
  for (int d = 0; d < 4; ++d) p.out_stride[d] = to.stride[out_order[d]];
  if (problem.bias != nullptr) p.bias = problem.bias->data, p.bias_stride = problem.bias->stride[0];
  const auto run_as = [&](auto zero) {
    using T = decltype(zero);
    return choice.positions == 408 ? run<T, 208, 200, false>(function, p, launch)
           : choice.split          ? run<T, 224, 0, true>(function, p, launch)
                                   : run<T, 224, 0, false>(function, p, launch);
  };
  if (from.dtype == DType::bfloat16) return run_as(bf16{});
#if !defined(EFFCORE_CUDA_SET_CI)
  return run_as(fp16{});
#else
  return false;
#endif
}

}  // namespace effcore::cuda::conv3d::hopper
