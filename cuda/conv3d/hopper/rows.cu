// Boxes, tensor maps and launches of the rows of a product.
#include <algorithm>
#include <cstdlib>

#include "common/overlap.cuh"
#include "common/tensor_map.h"
#include "conv3d/hopper/rows.cuh"
#include "conv3d/hopper/rows.h"

namespace effcore::cuda::conv3d::hopper {
namespace {

// Bytes that a block reads from the second-level cache for 64 channels.
struct Cost {
  double groups, groups_with_halo, rows, weights;

  double operator()(double boxes, double rows_with_halo) const {
    return boxes * (groups * rows + groups_with_halo * rows_with_halo + weights);
  }
};

template <class T, class Shape>
bool run(const char* function, TiledRowsParams p, const Launch& launch) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.tiling.tiles, Shape::boxes)),
                  static_cast<unsigned>(ceil_div(p.columns, Shape::columns)), Shape::blocks);
  // As many stages as there is memory for: of the multiprocessor, or of the share of it.
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, function);
  const bool two = static_cast<int>(grid.x * grid.y) > device_attribute(cudaDevAttrMultiProcessorCount, function);
  const int memory = two && !Shape::shared ? (most + 1024) / 2 - 1024 : most;
  p.voxel_bytes = Shape::boxes * p.halo_bytes;
  const auto bytes = [&](int voxels, int weights) {
    return voxels * p.voxel_bytes + weights * Shape::columns * 128 + static_cast<int>(sizeof(RowsRings));
  };
  p.voxel_stages = 2, p.weight_stages = 3;
  if (bytes(p.voxel_stages, p.weight_stages) > most) return false;
  for (;;) {
    const bool weights = p.weight_stages < most_weight_stages && bytes(p.voxel_stages, p.weight_stages + 1) <= memory;
    const bool voxels = p.voxel_stages < most_voxel_stages && bytes(p.voxel_stages + 1, p.weight_stages) <= memory;
    if (voxels && (!weights || p.weight_stages >= 2 * p.voxel_stages))
      ++p.voxel_stages;
    else if (weights)
      ++p.weight_stages;
    else
      break;
  }
  launch_overlapping(function, conv3d_rows_kernel<T, Shape>, grid, Shape::threads,
                     static_cast<std::size_t>(bytes(p.voxel_stages, p.weight_stages)), static_cast<cudaStream_t>(launch.stream),
                     p, dim3(1, 1, Shape::blocks));
  return true;
}

bool share_wanted() {
  static const char* const text = std::getenv("EFFCORE_C3D_SHARED");
  return text != nullptr && text[0] == '1';
}

// A map of [O, rows, columns, C] whose tile is `channels` x 1 x 1 x `outputs`; strides of O, rows, columns in elements.
bool encode_weights(CUtensorMap* map, DType dtype, const void* data, const std::int64_t (&sizes)[4],
                    const std::int64_t (&strides)[3], int channels, int outputs) {
  const cuuint64_t size[4] = {static_cast<cuuint64_t>(sizes[3]), static_cast<cuuint64_t>(sizes[2]),
                              static_cast<cuuint64_t>(sizes[1]), static_cast<cuuint64_t>(sizes[0])};
  cuuint64_t stride[3];
  for (int d = 0; d < 3; ++d)  // a dimension of size 1 has no stride of its own
    stride[d] =
        size[d + 1] == 1 ? static_cast<cuuint64_t>(ceil_div(sizes[3], 8) * 16) : static_cast<cuuint64_t>(strides[2 - d] * 2);
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(channels), 1, 1, static_cast<cuuint32_t>(outputs)};
  return encode_tensor_map(map, dtype, data, size, stride, box);
}

// The maps, and where each tap's weights lie.
bool place_weights(TiledRowsParams& p, const RowsProblem& problem, const std::vector<std::int64_t>& numbers,
                   int columns_of_block) {
  const DType dtype = problem.from.dtype;
  if (problem.in_place == nullptr) {
    for (std::size_t i = 0; i < numbers.size(); ++i) p.tap[i] = {packed_map, static_cast<std::int16_t>(numbers[i]), 0};
    const std::int64_t tap = problem.padded_columns * problem.padded_channels;
    return encode_weights(&p.weights[packed_map], dtype, problem.packed,
                          {problem.padded_columns, problem.packed_taps, 1, problem.padded_channels},
                          {problem.padded_channels, tap, tap}, 64, columns_of_block);
  }
  const KernelsInPlace& kernels = *problem.in_place;
  const TensorView &spatial = kernels.spatial, &temporal = kernels.temporal;
  const std::int64_t kt = temporal.size[2], kh = spatial.size[2], kw = spatial.size[3];
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const std::int64_t in_frame = numbers[i] - kt / 2;  // see `cross`: the frames before the middle one, it, those behind
    const auto row = static_cast<std::int16_t>(in_frame / kw), column = static_cast<std::int16_t>(in_frame % kw);
    if (in_frame < 0)
      p.tap[i] = {temporal_map, static_cast<std::int16_t>(numbers[i]), 0};
    else if (in_frame >= kh * kw)
      p.tap[i] = {temporal_map, static_cast<std::int16_t>(numbers[i] - kh * kw + 1), 0};
    else if (row == kh / 2 && column == kw / 2)
      p.tap[i] = {packed_map, 0, 0};
    else
      p.tap[i] = {spatial_map, row, column};
  }
  const std::int64_t o = spatial.size[0], c = spatial.size[1], padded_o = ceil_div(o, 64) * 64, padded_c = ceil_div(c, 64) * 64;
  const int outputs = kernels.transposed ? 64 : columns_of_block;
  return encode_weights(&p.weights[packed_map], dtype, kernels.middle, {padded_o, 1, 1, padded_c}, {padded_c, 0, 0}, 64,
                        outputs) &&
         encode_weights(&p.weights[spatial_map], dtype, spatial.data, {o, kh, kw, c},
                        {spatial.stride[0], spatial.stride[2], spatial.stride[3]}, 64, outputs) &&
         encode_weights(&p.weights[temporal_map], dtype, temporal.data, {o, kt, 1, c},
                        {temporal.stride[0], temporal.stride[2], 0}, 64, outputs);
}

}  // namespace

bool readable(const TensorView& from, const TensorView& spatial, const TensorView& temporal) {
  const auto contiguous = [](const TensorView& kernel) {
    bool fits = reinterpret_cast<std::uintptr_t>(kernel.data) % 16 == 0 && kernel.stride[1] == 1;
    for (int d = 0; d < kernel.rank; ++d)
      fits = fits && (d == 1 || kernel.size[d] == 1 || (kernel.stride[d] > 0 && kernel.stride[d] % 8 == 0));
    return fits;
  };
  return readable(from) && contiguous(spatial) && contiguous(temporal);
}

bool rows(const char* function, const RowsProblem& problem, const Launch& launch) {
  const TensorView &from = problem.from, &to = problem.to;
  if (problem.taps.empty() || !readable(from)) return false;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, function) != 9) return false;

  std::vector<Column> columns = columns_of(problem.taps, problem.step[1], max_taps);
  if (columns.size() > max_groups) return false;
  if (problem.in_place != nullptr) {  // the middle last: its sum is made by the kernel before, which this one overlaps
    const TensorView &spatial = problem.in_place->spatial, &temporal = problem.in_place->temporal;
    const std::int64_t middle = temporal.size[2] / 2 + spatial.size[2] * spatial.size[3] / 2;
    std::stable_partition(columns.begin(), columns.end(), [&](const Column& c) {
      return std::find(c.numbers.begin(), c.numbers.end(), middle) == c.numbers.end();
    });
  }
  TiledRowsParams p{};
  int halo = 0;
  std::vector<std::int64_t> numbers;
  for (const Column& c : columns) {
    const auto taps = static_cast<std::int16_t>(c.numbers.size());
    p.group[p.groups++] = {static_cast<std::int16_t>(c.t), static_cast<std::int16_t>(c.h), static_cast<std::int16_t>(c.w),
                           static_cast<std::int16_t>(numbers.size()), taps};
    numbers.insert(numbers.end(), c.numbers.begin(), c.numbers.end());
    halo = std::max(halo, taps - 1);
  }

  const bool wide = problem.padded_columns % 128 == 0;
  const int columns_of_block = wide ? 128 : 64;
  // Blocks of 256 positions where two of them fit on a multiprocessor and there are enough: [8, 64, 16, 56²] takes 91 us
  // instead of 112. With 128 columns they would be alone on it, which loses more than reading less weights gains.
  const std::int64_t positions = to.size[0] * to.size[2] * to.size[3] * to.size[4];
  const bool tall = !wide && ceil_div(positions, 256) > device_attribute(cudaDevAttrMultiProcessorCount, function);
  // Blocks that would leave multiprocessors without work share the channels in pairs, with 3 x 64 positions each.
  const std::int64_t at_once = device_attribute(cudaDevAttrMultiProcessorCount, function);
  const std::int64_t column_blocks = ceil_div(to.size[1], 128);
  const bool shared =
      wide && problem.padded_channels >= 128 && ceil_div(positions, 192) * column_blocks * 2 <= at_once && share_wanted();
  const int log_rows = tall ? 8 : shared ? 6 : 7, rows_of_block = 1 << log_rows;
  Cost cost{0, 0, static_cast<double>(rows_of_block), static_cast<double>(numbers.size()) * columns_of_block};
  for (int i = 0; i < p.groups; ++i) ++(p.group[i].taps > 1 ? cost.groups_with_halo : cost.groups);
  const int most_rows = tall ? 2 * rows_of_block - 96 : 2 * rows_of_block;
  const Box box = choose_box(log_rows, most_rows, to.size + 2, to.size[0], halo, cost);
  if (box.w < 0 || !encode_boxes(&p.box, from, box, box.lines(), problem.step) ||
      !encode_boxes(&p.box_with_halo, from, box, box.lines() + halo, problem.step))
    return false;
  if (!place_weights(p, problem, numbers, columns_of_block)) return false;

  p.tiling = Tiling(box, to.size + 2, to.size[0], problem.step);
  if (p.tiling.tiles == 0) return true;
  p.box_bytes = rows_of_block * 128;
  p.halo_bytes = box.line() * (box.lines() + halo) * 128;
  p.blocks = static_cast<int>(problem.padded_channels / 64);
  p.columns = static_cast<int>(to.size[1]);
  p.out = to.data;
  constexpr int out_order[4] = {0, 2, 3, 4};
  p.out_aligned = reinterpret_cast<std::uintptr_t>(to.data) % 16 == 0 && to.size[1] % 8 == 0;
  for (int d = 0; d < 4; ++d) {
    p.out_stride[d] = to.stride[out_order[d]];
    p.out_aligned = p.out_aligned && p.out_stride[d] % 8 == 0;
  }
  if (problem.bias != nullptr) p.bias = problem.bias->data, p.bias_stride = problem.bias->stride[0];
  const auto run_as = [&]<class T, bool transposed>(T, std::bool_constant<transposed>) {
    return shared ? run<T, RowsShape<1, 128, transposed, true>>(function, p, launch)
           : wide ? run<T, RowsShape<1, 128, transposed, false>>(function, p, launch)
           : tall ? run<T, RowsShape<2, 64, transposed, false>>(function, p, launch)
                  : run<T, RowsShape<1, 64, transposed, false>>(function, p, launch);
  };
  const auto run_with = [&](auto zero) {
    const bool transposed = problem.in_place != nullptr && problem.in_place->transposed;
    return transposed ? run_as(zero, std::true_type{}) : run_as(zero, std::false_type{});
  };
  if (from.dtype == DType::bfloat16) return run_with(bf16{});
#if !defined(EFFCORE_CUDA_SET_CI)
  return run_with(fp16{});
#else
  return false;
#endif
}

}  // namespace effcore::cuda::conv3d::hopper
