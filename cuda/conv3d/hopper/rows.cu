// Boxes, tensor maps and launches of the rows of a product.
#include <algorithm>

#include "common/overlap.cuh"
#include "common/tensor_map.h"
#include "conv3d/hopper/dispatch.h"
#include "conv3d/hopper/lines.h"
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

template <class T, int RowBlocks, int Columns>
bool run(const char* function, TiledRowsParams p, const Launch& launch) {
  const dim3 grid(static_cast<unsigned>(p.tiling.tiles), static_cast<unsigned>(ceil_div(p.columns, Columns)));
  // As many stages as there is memory for: of the multiprocessor, or of the share of it.
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, function);
  const bool shared = static_cast<int>(grid.x * grid.y) > device_attribute(cudaDevAttrMultiProcessorCount, function);
  const int memory = shared ? (most + 1024) / 2 - 1024 : most;
  const auto bytes = [&](int voxels, int weights) {
    return voxels * p.voxel_bytes + weights * Columns * 128 + static_cast<int>(sizeof(RowsRings));
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
  launch_overlapping(function, conv3d_rows_kernel<T, RowBlocks, Columns>, grid, rows_threads,
                     static_cast<std::size_t>(bytes(p.voxel_stages, p.weight_stages)), static_cast<cudaStream_t>(launch.stream),
                     p);
  return true;
}

}  // namespace

bool rows(const char* function, const RowsProblem& problem, const Launch& launch) {
  const TensorView &from = problem.from, &to = problem.to;
  if (problem.taps.empty() || !readable(from)) return false;
  if (lines(function, problem, launch)) return true;
  if (problem.packed == nullptr) return false;

  const std::vector<Column> columns = columns_of(problem.taps, problem.step[1], max_taps);
  if (columns.size() > max_groups) return false;
  TiledRowsParams p{};
  int halo = 0, numbers = 0;
  for (const Column& c : columns) {
    const auto taps = static_cast<std::int16_t>(c.numbers.size());
    p.group[p.groups++] = {static_cast<std::int16_t>(c.t), static_cast<std::int16_t>(c.h), static_cast<std::int16_t>(c.w),
                           static_cast<std::int16_t>(numbers), taps};
    for (const std::int64_t number : c.numbers) p.number[numbers++] = static_cast<std::int16_t>(number);
    halo = std::max(halo, taps - 1);
  }

  const bool wide = problem.padded_columns % 128 == 0;
  const int columns_of_block = wide ? 128 : 64;
  // Blocks of 256 positions where two of them fit on a multiprocessor and there are enough (91 us instead of 112 at
  // [8, 64, 16, 56²], which lines.cuh takes now). With 128 columns they would be alone on it, which loses more than reading
  // less weights gains.
  const std::int64_t positions = to.size[0] * to.size[2] * to.size[3] * to.size[4];
  const bool tall = !wide && ceil_div(positions, 256) > device_attribute(cudaDevAttrMultiProcessorCount, function);
  const int rows_of_block = tall ? 256 : 128;
  Cost cost{0, 0, static_cast<double>(rows_of_block), static_cast<double>(numbers * columns_of_block)};
  for (int i = 0; i < p.groups; ++i) ++(p.group[i].taps > 1 ? cost.groups_with_halo : cost.groups);
  const int most_rows = tall ? 2 * rows_of_block - 96 : 2 * rows_of_block;
  const Box box = choose_box(rows_of_block, most_rows, to.size + 2, to.size[0], halo, cost);
  if (box.w == 0 || !encode_boxes(&p.box, from, box, box.h, problem.step) ||
      !encode_boxes(&p.box_with_halo, from, box, box.h + halo, problem.step))
    return false;
  const cuuint64_t weight_size[2] = {static_cast<cuuint64_t>(problem.padded_channels),
                                     static_cast<cuuint64_t>(problem.padded_columns * problem.packed_taps)};
  const cuuint64_t weight_stride[1] = {weight_size[0] * 2};
  const cuuint32_t weight_box[2] = {64, static_cast<cuuint32_t>(columns_of_block)};
  if (!encode_tensor_map(&p.weights, from.dtype, problem.packed, weight_size, weight_stride, weight_box)) return false;

  p.tiling = Tiling(box, to.size + 2, to.size[0], problem.step);
  if (p.tiling.tiles == 0) return true;
  p.line = box.line();
  p.box_bytes = rows_of_block * 128;
  p.halo_bytes = box.line() * (box.h + halo) * 128;
  p.voxel_bytes = p.halo_bytes;
  p.blocks = static_cast<int>(problem.padded_channels / 64);
  p.padded_columns = static_cast<int>(problem.padded_columns);
  set_results(p, problem);
  p.out_aligned = reinterpret_cast<std::uintptr_t>(to.data) % 16 == 0 && to.size[1] % 8 == 0;
  for (const std::int64_t stride : p.out_stride) p.out_aligned = p.out_aligned && stride % 8 == 0;
  return run_16bit(from.dtype, [&](auto zero) {
    using T = decltype(zero);
    return wide   ? run<T, 1, 128>(function, p, launch)
           : tall ? run<T, 2, 64>(function, p, launch)
                  : run<T, 1, 64>(function, p, launch);
  });
}

}  // namespace effcore::cuda::conv3d::hopper
