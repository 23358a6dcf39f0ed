// Boxes, tensor maps and launches of the rows of a product.
#include <algorithm>

#include "common/overlap.cuh"
#include "common/tensor_map.h"
#include "conv3d/hopper/rows.cuh"
#include "conv3d/hopper/rows.h"

namespace effcore::cuda::conv3d::hopper {
namespace {

// Cycles of a multiprocessor for 64 channels of a block: what it reads from the second-level cache, and what it multiplies.
struct Cost {
  double groups, groups_with_halo, taps, columns, cluster_tiles, cluster_columns;

  double operator()(double boxes, double rows_with_halo) const {
    constexpr double bytes_a_cycle = 24, flops_a_cycle = 4096;
    const double voxels = groups * rows_of_block + groups_with_halo * rows_with_halo;
    const double bytes = 128 * (voxels / cluster_columns + taps * columns / cluster_tiles);
    return boxes * std::max(bytes / bytes_a_cycle, taps * rows_of_block * columns * 128 / flops_a_cycle);
  }
};

template <class T, int Columns>
bool run(const char* function, const TiledRowsParams& p, unsigned cluster_tiles, unsigned cluster_columns,
         const Launch& launch) {
  const int bytes = rows_shared_bytes<Columns>(p.voxel_bytes);
  if (bytes > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, function)) return false;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.tiling.tiles, cluster_tiles)) * cluster_tiles,
                  static_cast<unsigned>(ceil_div(p.columns, Columns)));
  launch_overlapping(function, conv3d_rows_kernel<T, Columns>, grid, rows_threads, static_cast<std::size_t>(bytes),
                     static_cast<cudaStream_t>(launch.stream), p, dim3(cluster_tiles, cluster_columns));
  return true;
}

}  // namespace

bool rows(const char* function, const RowsProblem& problem, const Launch& launch) {
  const TensorView &from = problem.from, &to = problem.to;
  if (problem.taps.empty() || !readable(from)) return false;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, function) != 9) return false;

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
  const unsigned cluster_columns = ceil_div(to.size[1], columns_of_block) % 2 == 0 ? 2 : 1;
  const unsigned cluster_tiles = to.size[0] * to.size[2] * to.size[3] * to.size[4] > rows_of_block ? 2 : 1;
  Cost cost{0,
            0,
            static_cast<double>(numbers),
            static_cast<double>(columns_of_block),
            static_cast<double>(cluster_tiles),
            static_cast<double>(cluster_columns)};
  for (int i = 0; i < p.groups; ++i) ++(p.group[i].taps > 1 ? cost.groups_with_halo : cost.groups);
  constexpr int most_rows = 256;  // two blocks then share a multiprocessor
  const Box box = choose_box(7, most_rows, to.size + 2, to.size[0], halo, cost);
  if (box.w < 0 || !encode_boxes(&p.box, from, box, box.lines(), problem.step) ||
      !encode_boxes(&p.box_with_halo, from, box, box.lines() + halo, problem.step))
    return false;
  const cuuint64_t weight_size[2] = {static_cast<cuuint64_t>(problem.padded_channels),
                                     static_cast<cuuint64_t>(problem.padded_columns * problem.packed_taps)};
  const cuuint64_t weight_stride[1] = {weight_size[0] * 2};
  const cuuint32_t weight_box[2] = {64, static_cast<cuuint32_t>(columns_of_block)};
  if (!encode_tensor_map(&p.weights, from.dtype, problem.packed, weight_size, weight_stride, weight_box)) return false;

  p.tiling = Tiling(box, to.size + 2, to.size[0], problem.step);
  if (p.tiling.tiles == 0) return true;
  p.box_bytes = rows_of_block * 128;
  p.halo_bytes = box.line() * (box.lines() + halo) * 128;
  p.voxel_bytes = p.halo_bytes;
  p.blocks = static_cast<int>(problem.padded_channels / 64);
  p.padded_columns = static_cast<int>(problem.padded_columns);
  p.columns = static_cast<int>(to.size[1]);
  p.out = to.data;
  constexpr int out_order[4] = {0, 2, 3, 4};
  p.out_aligned = reinterpret_cast<std::uintptr_t>(to.data) % 16 == 0 && to.size[1] % 8 == 0;
  for (int d = 0; d < 4; ++d) {
    p.out_stride[d] = to.stride[out_order[d]];
    p.out_aligned = p.out_aligned && p.out_stride[d] % 8 == 0;
  }
  if (problem.bias != nullptr) p.bias = problem.bias->data, p.bias_stride = problem.bias->stride[0];
  const auto run_as = [&](auto zero) {
    using T = decltype(zero);
    return wide ? run<T, 128>(function, p, cluster_tiles, cluster_columns, launch)
                : run<T, 64>(function, p, cluster_tiles, cluster_columns, launch);
  };
  if (from.dtype == DType::bfloat16) return run_as(bf16{});
#if !defined(EFFCORE_CUDA_SET_CI)
  return run_as(fp16{});
#else
  return false;
#endif
}

}  // namespace effcore::cuda::conv3d::hopper
