// What the kernels of grouped_gram share: their arguments, the tiles of the upper triangle, and how results are written.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "kronecker/segments.cuh"

namespace effcore::cuda::kronecker {

constexpr int block = 128;  // rows and columns of a tile of the triangle

struct GramParams {
  Groups groups;
  const void* x;
  std::int64_t stride;
  int dim, tiles;  // tiles of the triangle
  bool aligned;
  float alpha, beta;
  float* result;
  const float* previous;  // or null
  float* partial;         // [slots, tiles, block, block]
};

// Tile number -> (row, column) of the upper triangle with n columns, row by row.
__device__ __forceinline__ int2 triangle(int tile, int n) {
  int row = 0;
  for (int length = n; tile >= length; ++row, --length) tile -= length;
  return {row, row + tile};
}

// And back.
__device__ __forceinline__ int triangle_number(int row, int column, int n) {
  return row * n - row * (row - 1) / 2 + column - row;
}

// Writes the element and its mirror. Previous values come from the upper triangle alone, which no other thread writes.
__device__ __forceinline__ void store_element(const GramParams& p, int expert, int i, int j, float sum) {
  if (i > j || j >= p.dim) return;
  const std::int64_t matrix = static_cast<std::int64_t>(expert) * p.dim * p.dim;
  const std::int64_t upper = matrix + static_cast<std::int64_t>(i) * p.dim + j;
  float value = p.alpha * sum;
  if (p.previous != nullptr) value = fmaf(p.beta, p.previous[upper], value);
  p.result[upper] = value;
  if (i != j) p.result[matrix + static_cast<std::int64_t>(j) * p.dim + i] = value;
}

}  // namespace effcore::cuda::kronecker
