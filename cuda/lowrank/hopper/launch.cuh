// The fused kernel's launch: which instantiation, its tensor maps, and how many clusters share the columns of one tile of rows.
#pragma once
#include "common/error.h"
#include "common/tensor_map.h"
#include "lowrank/hopper/fused.cuh"
#include "lowrank/hopper/fused.h"

namespace effcore::cuda::lowrank::hopper {

constexpr const char* function = "lowrank_linear";

// With few tiles of rows several clusters each take a part of the columns, and all of them compute H.
inline int splits(std::int64_t tiles, std::int64_t clusters, std::int64_t depth, std::int64_t columns) {
  int best = 1;
  double least = 1e300;
  for (int s = 1; s <= 16 && (s == 1 || columns / s >= 256); ++s) {
    const double waves = static_cast<double>((tiles * s + clusters - 1) / clusters);
    const double time = waves * (static_cast<double>(depth) + static_cast<double>(columns) / s);
    if (time < 0.97 * least) least = time, best = s;
  }
  return best;
}

inline bool encode(CUtensorMap* map, DType dtype, const void* data, std::int64_t rows, std::int64_t columns,
                   std::int64_t row_stride) {
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(rows > 1 ? row_stride : (columns + 7) / 8 * 8) * 2};
  const cuuint32_t boxes[2] = {box, box};
  return encode_tensor_map(map, dtype, data, size, stride, boxes);
}
inline bool encode(CUtensorMap* map, const TensorView& t) {
  return encode(map, t.dtype, t.data, t.size[0], t.size[1], t.stride[0]);
}

template <class T, int Rank, bool transposed>
bool run(const FusedProblem& problem, const Launch& launch) {
  const auto kernel = lowrank_fused_kernel<T, Rank, transposed>;
  constexpr int shared_bytes = static_cast<int>(sizeof(FusedShared<T, Rank>));
  static_assert(shared_bytes <= 227 * 1024);
  const DType dtype = problem.x.dtype;
  const std::int64_t rows = problem.out.size[0], columns = problem.out.size[1], depth = problem.x.size[1];
  const std::int64_t rank = problem.first.size[transposed ? 1 : 0];
  FusedParams p{};
  if (!encode(&p.x, problem.x) || !encode(&p.first, problem.first) || !encode(&p.second, problem.second) ||
      !encode(&p.out, problem.out) ||
      (problem.hidden != nullptr && !encode(&p.hidden, dtype, problem.hidden, rows, rank, rank)) ||
      (problem.before != nullptr && !encode(&p.before, dtype, problem.before, rows, columns, columns)))
    return false;
  p.bias = problem.bias;
  p.rows = static_cast<int>(rows), p.rank = static_cast<int>(rank), p.columns = static_cast<int>(columns);
  p.first_steps = static_cast<int>((depth + box - 1) / box);
  p.activation = problem.activation;
  p.keeps_hidden = problem.hidden != nullptr, p.keeps_before = problem.before != nullptr;

  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), function);
  // More than fit at a time would wait for the first to end all of its work.
  static const int most_clusters = [&] {
    cudaLaunchConfig_t config{};
    config.gridDim = cluster_blocks, config.blockDim = threads, config.dynamicSmemBytes = shared_bytes;
    cudaLaunchAttribute dimension{};
    dimension.id = cudaLaunchAttributeClusterDimension;
    dimension.val.clusterDim = {cluster_blocks, 1, 1};
    config.attrs = &dimension, config.numAttrs = 1;
    int count = 0;
    check(cudaOccupancyMaxActiveClusters(&count, kernel, &config), function);
    return count;
  }();
  const std::int64_t tiles = (rows + cluster_rows - 1) / cluster_rows;
  const std::int64_t parts = splits(tiles, most_clusters, depth, columns), whole = (columns + tile_columns - 1) / tile_columns;
  p.split_columns = static_cast<int>((whole + parts - 1) / parts * tile_columns);
  p.splits = static_cast<int>((columns + p.split_columns - 1) / p.split_columns);
  p.pieces = static_cast<int>(tiles * p.splits);
  const int clusters = p.pieces < most_clusters ? p.pieces : most_clusters;
  kernel<<<static_cast<unsigned>(clusters * cluster_blocks), threads, shared_bytes, static_cast<cudaStream_t>(launch.stream)>>>(
      p);
  check_launch(function);
  return true;
}

template <class T, bool transposed>
bool run_rank(const FusedProblem& problem, const Launch& launch) {
  const std::int64_t rank = problem.first.size[transposed ? 1 : 0];
#ifndef EFFCORE_CUDA_SET_CI
  if (rank <= 64) return run<T, 64, transposed>(problem, launch);
  if (rank <= 128) return run<T, 128, transposed>(problem, launch);
  if (rank <= 192) return run<T, 192, transposed>(problem, launch);
#endif
  return rank <= most_rank && run<T, 256, transposed>(problem, launch);
}

template <class T>
bool fused_instance(const FusedProblem& problem, const Launch& launch) {
  return problem.transposed ? run_rank<T, true>(problem, launch) : run_rank<T, false>(problem, launch);
}

}  // namespace effcore::cuda::lowrank::hopper
