// Tiles, boxes and launches of whole lines.
#include <algorithm>
#include <limits>

#include "common/overlap.cuh"
#include "common/tensor_map.h"
#include "conv3d/hopper/lines.cuh"
#include "conv3d/hopper/lines.h"

namespace effcore::cuda::conv3d::hopper {
namespace {

// The box of whole lines, as few as cover a grid and the least halo among equals, whose positions fit; w = 0 where none does.
Box choose_lines(std::int64_t positions, const Lines& lines, const std::int64_t grid[3], std::int64_t batch,
                 std::int64_t& tiles) {
  Box best;
  for (std::int64_t t = 1; t <= grid[0]; ++t)
    for (std::int64_t b = 1; b <= (t == grid[0] ? batch : 1); ++b)
      for (std::int64_t h = 1; h <= grid[1] && (h * t * b - 1) * lines.pitch + lines.width <= positions; ++h) {
        const std::int64_t count = ceil_div(grid[0], t) * ceil_div(batch, b) * ceil_div(grid[1], h);
        if (best.w != 0 && count >= tiles) continue;
        tiles = count;
        best = Box{static_cast<int>(lines.pitch), static_cast<int>(t), static_cast<int>(b), static_cast<int>(h)};
      }
  return best;
}

// Kernels [rows, inside, taps] whose second dimension lies inside, as the copy engine sees them: boxes of 64 x 1 x `rows`.
bool encode_kernels(CUtensorMap* map, DType dtype, const void* data, std::int64_t inside, std::int64_t taps, std::int64_t rows,
                    std::int64_t tap_stride, std::int64_t row_stride, int box_rows) {
  if (reinterpret_cast<std::uintptr_t>(data) % 16 != 0 || tap_stride % 8 != 0 || row_stride % 8 != 0) return false;
  const cuuint64_t size[3] = {static_cast<cuuint64_t>(inside), static_cast<cuuint64_t>(taps), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[2] = {static_cast<cuuint64_t>(tap_stride * 2), static_cast<cuuint64_t>(row_stride * 2)};
  const cuuint32_t box[3] = {64, 1, static_cast<cuuint32_t>(box_rows)};
  return encode_tensor_map(map, dtype, data, size, stride, box);
}

// Between the taps of a kernel [O, C, ...] with channels inside; 0 where it has another layout.
std::int64_t tap_stride(const TensorView& kernel, int dims) {
  const std::int64_t height = dims == 4 ? kernel.size[2] : 1, width = kernel.size[dims - 1];
  if (kernel.stride[1] != 1) return 0;
  if (width == 1) return height == 1 ? kernel.size[1] : kernel.stride[2];
  return height == 1 || kernel.stride[2] == width * kernel.stride[dims - 1] ? kernel.stride[dims - 1] : 0;
}

template <class T, int Columns, int First, int Second, bool Split, bool Transposed>
bool run(const char* function, LinesParams p, const Launch& launch) {
  const int memory = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, function);
  constexpr int positions = positions_of_lines<Columns, First, Second>;
  const auto bytes = [&](int voxels, int weights) {
    const int rings = voxels * p.stage_bytes + weights * Columns * 128;  // room for the other parts of the other block's sums
    const int all = (Split ? first_part_bytes : 0) + rings + static_cast<int>(sizeof(LinesMemory<positions>));
    return static_cast<int>(ceil_div(all, 16)) * 16;
  };
  p.voxel_stages = 2, p.weight_stages = 3;
  if (bytes(p.voxel_stages, p.weight_stages) > memory) return false;
  while (p.voxel_stages < most_line_voxel_stages && bytes(p.voxel_stages + 1, p.weight_stages) <= memory) ++p.voxel_stages;
  while (p.weight_stages < most_line_weight_stages && bytes(p.voxel_stages, p.weight_stages + 1) <= memory) ++p.weight_stages;
  const int shared_bytes = bytes(p.voxel_stages, p.weight_stages);
  const int device = device_attribute(cudaDevAttrMultiProcessorCount, function);
  // The middle's two kernels take two stages at once, for which a block of three waits: with 128 channels at [32, 16, 28, 28]
  // about as long as for another tap. There packing them pays.
  if (!p.packed && p.weight_stages < 4 && p.items > 2 * device) return false;
  const auto kernel = conv3d_lines_kernel<T, Columns, First, Second, Split, Transposed>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), function);
  cudaLaunchAttribute attribute[2];
  attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[0].val.programmaticStreamSerializationAllowed = 1;
  attribute[1].id = cudaLaunchAttributeClusterDimension;
  attribute[1].val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(Split ? 2 * p.items : std::min(p.items, device)));
  config.blockDim = line_threads, config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = attribute, config.numAttrs = Split ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, p), function);
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
    bool split;
  };
  constexpr Choice choices[] = {{128, 408, false}, {128, 224, false}, {128, 216, false}, {128, 216, true}, {64, 416, false}};
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
    const Box b = choose_lines(c.positions, lines, grid, to.size[0], tiles);
    const std::int64_t count = tiles * column_blocks;
    if (count == 0 || (c.split && (2 * count > device || problem.padded_channels < 128))) continue;
    // Steps of one tap and 64 channels; the beginning and the end of a tile cost as much as some.
    const double time =
        static_cast<double>(ceil_div(count, device) * (c.positions * (c.split ? (products + 1) / 2 + 3 : products + 2)));
    if (time < least) least = time, box = b, choice = c, items = count;
  }
  if (choice.positions == 0) return false;

  LinesParams p{};
  const auto box_lines = [&](CUtensorMap* map, std::int64_t h) {
    return encode_boxes(map, from, box, static_cast<int>(h), problem.step);
  };
  if (!box_lines(&p.box, box.h) || !box_lines(&p.box_with_halo, box.h + lines.halo)) return false;
  const bool in_place = problem.packed == nullptr, transposed = in_place && problem.channel == 0;
  const TensorView &spatial = problem.spatial, &temporal = problem.temporal;
  const std::int64_t between[2] = {tap_stride(spatial, 4), tap_stride(temporal, 3)};
  if (in_place) {
    const int box_rows = transposed ? 64 : columns_of_block;
    if (between[0] == 0 || between[1] == 0) return false;
    if (!encode_kernels(&p.weights[0], from.dtype, spatial.data, spatial.size[1], spatial.size[2] * spatial.size[3],
                        spatial.size[0], between[0], spatial.stride[0], box_rows) ||
        !encode_kernels(&p.weights[1], from.dtype, temporal.data, temporal.size[1], temporal.size[2], temporal.size[0],
                        between[1], temporal.stride[0], box_rows))
      return false;
  } else if (!encode_kernels(&p.weights[0], from.dtype, problem.packed, problem.padded_channels, problem.packed_taps,
                             problem.padded_columns, problem.padded_columns * problem.padded_channels, problem.padded_channels,
                             columns_of_block)) {
    return false;
  }

  int numbers = 0;
  for (const FrameOfTaps& f : frames) {
    LoadedFrame& frame = p.frame[p.frames_of_taps++];
    frame = {static_cast<std::int16_t>(f.t), static_cast<std::int16_t>(f.h.first), static_cast<std::int16_t>(numbers), 0,
             lines.needs_halo(f)};
    for (const auto& tap : problem.taps) {
      if (tap.place[0] != f.t) continue;
      ++frame.taps;
      LoadedTap& loaded = p.tap[numbers++];
      const std::int64_t across = tap.tap.spatial, along = tap.tap.temporal;
      if (!in_place)
        loaded = {0, static_cast<std::int16_t>(tap.number), -1, 0};
      else if (across < 0)
        loaded = {1, static_cast<std::int16_t>(along / between[1]), -1, 0};
      else
        loaded = {0, static_cast<std::int16_t>(across / between[0]),
                  static_cast<std::int16_t>(along < 0 ? -1 : along / between[1]), 0};
      loaded.shift = static_cast<std::int16_t>((tap.place[1] - f.h.first) * box.line() + tap.place[2] - lines.first_w);
    }
  }
  const std::int64_t halo_rows = box.line() * (box.h + lines.halo);
  p.tiling = Tiling(box, grid, to.size[0], problem.step);
  p.first_w = static_cast<int>(lines.first_w);
  p.column_blocks = static_cast<int>(column_blocks);
  p.items = static_cast<int>(items);
  p.box_bytes = box.rows() * 128, p.halo_bytes = static_cast<int>(halo_rows * 128);
  p.zero_from = p.halo_bytes, p.stage_bytes = static_cast<int>(ceil_div(halo_rows + lines.margin, 8) * 1024);
  p.blocks = static_cast<int>(problem.padded_channels / 64);
  p.half_blocks = (from.size[1] - 1) % 64 < 32 ? 1 : 0;
  p.packed = !in_place;
  p.columns = static_cast<int>(to.size[1]);
  p.out = to.data;
  constexpr int out_order[4] = {0, 2, 3, 4};
  for (int d = 0; d < 4; ++d) p.out_stride[d] = to.stride[out_order[d]];
  if (problem.bias != nullptr) p.bias = problem.bias->data, p.bias_stride = problem.bias->stride[0];
  const auto run_as = [&]<bool Transposed>(auto zero, std::bool_constant<Transposed>) {
    using T = decltype(zero);
    if (choice.columns == 64) return run<T, 64, 208, 0, false, Transposed>(function, p, launch);
    if (choice.positions == 408) return run<T, 128, 208, 200, false, Transposed>(function, p, launch);
    if (choice.positions == 224) return run<T, 128, 224, 0, false, Transposed>(function, p, launch);
    return choice.split ? run<T, 128, 216, 0, true, Transposed>(function, p, launch)
                        : run<T, 128, 216, 0, false, Transposed>(function, p, launch);
  };
  const auto run_typed = [&](auto zero) {
    return transposed ? run_as(zero, std::true_type{}) : run_as(zero, std::false_type{});
  };
  if (from.dtype == DType::bfloat16) return run_typed(bf16{});
#if !defined(EFFCORE_CUDA_SET_CI)
  return run_typed(fp16{});
#else
  return false;
#endif
}

}  // namespace effcore::cuda::conv3d::hopper
