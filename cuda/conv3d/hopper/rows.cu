// Boxes, tensor maps and launches of the kernels for sm_90a.
#include <algorithm>
#include <limits>

#include "common/error.h"
#include "common/tensor_map.h"
#include "conv3d/hopper/rows.cuh"
#include "conv3d/hopper/rows.h"

namespace effcore::cuda::conv3d::hopper {
namespace {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

struct Box {
  int w = -1, t = 0, b = 0, h = 0;  // logarithms; they add up to 7

  int line() const { return 1 << (w + t + b); }
};

// What a box reads from the second-level cache for 64 channels, and what it multiplies, in cycles of a multiprocessor.
struct Cost {
  double groups, groups_with_halo, taps, columns;

  double operator()(double rows, double rows_with_halo) const {
    constexpr double bytes_a_cycle = 24, flops_a_cycle = 4096;
    const double bytes = 128 * (groups * rows + groups_with_halo * rows_with_halo + taps * columns);
    return std::max(bytes / bytes_a_cycle, taps * rows * columns * 128 / flops_a_cycle);
  }
};

Box choose_box(const std::int64_t grid[3], std::int64_t batch, int halo, const Cost& cost) {
  constexpr int most_rows = 256;  // two blocks then share a multiprocessor
  Box best;
  double least = std::numeric_limits<double>::infinity();
  for (int h = 0; h <= 4; ++h)
    for (int b = 0; b + h <= 7; ++b)
      for (int t = 0; t + b + h <= 7; ++t) {
        Box box;
        box.w = 7 - t - b - h, box.t = t, box.b = b, box.h = h;
        const int rows = box.line() * ((1 << h) + halo);
        if (rows > most_rows || box.line() % 8 != 0) continue;
        const double tiles = static_cast<double>(ceil_div(grid[2], 1 << box.w) * ceil_div(grid[0], 1 << t) *
                                                 ceil_div(batch, 1 << b) * ceil_div(grid[1], 1 << h));
        const double cycles = tiles * cost(rows_of_block, rows);
        if (cycles < least) least = cycles, best = box;
      }
  return best;
}

template <class T, int Columns>
bool run(const char* function, const TiledRowsParams& p, unsigned tiles, const Launch& launch) {
  const int bytes = rows_shared_bytes<Columns>(p.voxel_bytes);
  if (bytes > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, function)) return false;
  check(cudaFuncSetAttribute(conv3d_rows_kernel<T, Columns>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), function);
  const dim3 grid(tiles, static_cast<unsigned>(ceil_div(p.columns, Columns)));
  conv3d_rows_kernel<T, Columns><<<grid, rows_threads, bytes, static_cast<cudaStream_t>(launch.stream)>>>(p);
  check_launch(function);
  return true;
}

}  // namespace

bool rows(const char* function, const RowsProblem& problem, const Launch& launch) {
  const TensorView &from = problem.from, &to = problem.to;
  constexpr int order[5] = {1, 4, 2, 0, 3};  // channels, w, t, b, h: the box's lines of one h are outermost
  if (from.dtype != DType::bfloat16 && from.dtype != DType::float16) return false;
  if (reinterpret_cast<std::uintptr_t>(from.data) % 16 != 0 || problem.taps.empty()) return false;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, function) != 9) return false;

  TiledRowsParams p{};
  int halo = 0, numbers = 0;
  std::vector<std::vector<std::int64_t>> members;
  for (const auto& tap : problem.taps) {
    int i = 0;
    for (; i < p.groups; ++i)
      if (p.group[i].t == tap.place[0] && p.group[i].w == tap.place[2] && p.group[i].h + p.group[i].taps == tap.place[1]) break;
    if (i == max_groups) return false;
    if (i == p.groups) {
      p.group[p.groups++] = {static_cast<std::int16_t>(tap.place[0]), static_cast<std::int16_t>(tap.place[1]),
                             static_cast<std::int16_t>(tap.place[2]), 0, 0};
      members.emplace_back();
    }
    halo = std::max<int>(halo, p.group[i].taps);
    ++p.group[i].taps;
    members[i].push_back(tap.number);
  }
  for (int i = 0; i < p.groups; ++i) {
    // A box with a halo holds exactly the lines of the longest group.
    if (p.group[i].taps != 1 && p.group[i].taps != halo + 1) return false;
    p.group[i].first = static_cast<std::int16_t>(numbers);
    for (const std::int64_t number : members[i]) p.number[numbers++] = static_cast<std::int16_t>(number);
  }

  const bool wide = problem.padded_columns % 128 == 0;
  Cost cost{0, 0, static_cast<double>(problem.taps.size()), wide ? 128.0 : 64.0};
  for (int i = 0; i < p.groups; ++i) ++(p.group[i].taps > 1 ? cost.groups_with_halo : cost.groups);
  const Box box = choose_box(to.size + 2, to.size[0], halo, cost);
  if (box.w < 0) return false;
  cuuint64_t size[5], stride[4];
  for (int d = 0; d < 5; ++d) size[d] = static_cast<cuuint64_t>(from.size[order[d]]);
  for (int d = 1; d < 5; ++d) {
    const std::int64_t bytes = from.stride[order[d]] * 2;
    if (size[d] == 1) {
      stride[d - 1] = static_cast<cuuint64_t>(ceil_div(static_cast<std::int64_t>(size[0]), 8) * 16);
    } else {
      if (bytes <= 0 || bytes % 16 != 0) return false;
      stride[d - 1] = static_cast<cuuint64_t>(bytes);
    }
  }
  const cuuint32_t plain[5] = {64, 1u << box.w, 1u << box.t, 1u << box.b, 1u << box.h};
  const cuuint32_t with_halo[5] = {64, 1u << box.w, 1u << box.t, 1u << box.b, (1u << box.h) + static_cast<cuuint32_t>(halo)};
  if (!encode_tensor_map(&p.box, from.dtype, from.data, size, stride, plain) ||
      !encode_tensor_map(&p.box_with_halo, from.dtype, from.data, size, stride, with_halo))
    return false;
  const cuuint64_t weight_size[2] = {static_cast<cuuint64_t>(problem.padded_channels),
                                     static_cast<cuuint64_t>(problem.padded_columns * problem.packed_taps)};
  const cuuint64_t weight_stride[1] = {weight_size[0] * 2};
  const cuuint32_t weight_box[2] = {64, wide ? 128u : 64u};
  if (!encode_tensor_map(&p.weights, from.dtype, problem.packed, weight_size, weight_stride, weight_box)) return false;

  p.log_w = box.w, p.log_t = box.t, p.log_b = box.b, p.log_h = box.h;
  p.line = box.line();
  p.box_bytes = rows_of_block * 128;
  p.halo_bytes = p.line * ((1 << box.h) + halo) * 128;
  p.voxel_bytes = std::max(p.box_bytes, p.halo_bytes);
  p.tiles_w = static_cast<int>(ceil_div(to.size[4], 1 << box.w));
  p.tiles_t = static_cast<int>(ceil_div(to.size[2], 1 << box.t));
  p.tiles_b = static_cast<int>(ceil_div(to.size[0], 1 << box.b));
  const std::int64_t tiles = ceil_div(to.size[3], 1 << box.h) * p.tiles_w * static_cast<std::int64_t>(p.tiles_t) * p.tiles_b;
  if (tiles == 0) return true;
  p.blocks = static_cast<int>(problem.padded_channels / 64);
  p.padded_columns = static_cast<int>(problem.padded_columns);
  p.columns = static_cast<int>(to.size[1]);
  p.batch = static_cast<int>(to.size[0]);
  for (int d = 0; d < 3; ++d) p.grid[d] = static_cast<int>(to.size[2 + d]);
  p.out = to.data;
  constexpr int out_order[4] = {0, 2, 3, 4};
  p.out_aligned = reinterpret_cast<std::uintptr_t>(to.data) % 16 == 0 && to.size[1] % 8 == 0;
  for (int d = 0; d < 4; ++d) {
    p.out_stride[d] = to.stride[out_order[d]];
    p.out_aligned = p.out_aligned && p.out_stride[d] % 8 == 0;
  }
  if (problem.bias != nullptr) p.bias = problem.bias->data, p.bias_stride = problem.bias->stride[0];
  const auto blocks = static_cast<unsigned>(tiles);
  if (from.dtype == DType::bfloat16)
    return wide ? run<bf16, 128>(function, p, blocks, launch) : run<bf16, 64>(function, p, blocks, launch);
#if !defined(EFFCORE_CUDA_SET_CI)
  return wide ? run<fp16, 128>(function, p, blocks, launch) : run<fp16, 64>(function, p, blocks, launch);
#else
  return false;
#endif
}

}  // namespace effcore::cuda::conv3d::hopper
