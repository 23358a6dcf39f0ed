// Between the layout of the kernels and that of the products: weights on the way in, partial sums of their gradient on the way
// out. Bound: bytes, of which both move few; they are built for short chains of loads and for whole lines.
#pragma once
#include "common/element.cuh"
#include "common/overlap.cuh"
#include "conv3d/params.h"

namespace effcore::cuda::conv3d {

constexpr int pack_side = 32, pack_rows = 8, pack_taps = 4;

// The kernels as [taps][columns][channels]: a block moves 32 columns x 32 channels of four taps, read along whichever lies
// closer in memory. The middle of the cross is added in float32 and rounded once.
template <class T>
__global__ void __launch_bounds__(pack_side* pack_rows) pack_kernel(const __grid_constant__ PackParams p) {
  __shared__ T tile[pack_taps][pack_side][pack_side + 1];
  const int tiles = p.padded_channels / pack_side, first_tap = blockIdx.y * pack_taps;
  const int column0 = blockIdx.x / tiles * pack_side, channel0 = blockIdx.x % tiles * pack_side;
  const bool along_columns = p.spatial_column < p.spatial_channel;
  const int lane = threadIdx.x;
  wait_for_kernel_before();
#pragma unroll
  for (int i = 0; i < pack_side; i += pack_rows) {
    const int other = i + threadIdx.y, column = along_columns ? lane : other, channel = along_columns ? other : lane;
    const std::int64_t n = column0 + column, c = channel0 + channel;
    const bool exists = n < p.columns && c < p.channels;
#pragma unroll
    for (int t = 0; t < pack_taps; ++t) {
      const int tap = first_tap + t;
      float x = 0.0f;
      if (exists && tap < p.taps) {
        if (p.spatial_tap[tap] >= 0)
          x = to_float(static_cast<const T*>(p.spatial)[n * p.spatial_column + c * p.spatial_channel + p.spatial_tap[tap]]);
        if (p.temporal_tap[tap] >= 0)
          x +=
              to_float(static_cast<const T*>(p.temporal)[n * p.temporal_column + c * p.temporal_channel + p.temporal_tap[tap]]);
      }
      tile[t][column][channel] = from_float<T>(x);
    }
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < pack_taps; ++t)
#pragma unroll
    for (int i = 0; i < pack_side; i += pack_rows) {
      const int tap = first_tap + t, column = i + threadIdx.y;
      if (tap < p.taps)
        static_cast<T*>(p.packed)[(static_cast<std::int64_t>(tap) * p.padded_columns + column0 + column) * p.padded_channels +
                                  channel0 + lane] = tile[t][column][lane];
    }
}

constexpr int reduce_channels = 32, reduce_threads = 256, reduce_rows = reduce_threads / (reduce_channels / 4);

// Adds the partial sums of 32 channels of one column, in the same order whatever the device. 32 rows of threads, four channels
// each, take `parts` shares of the splits for 32 / parts taps at a time.
template <class T>
__global__ void __launch_bounds__(reduce_threads) reduce_kernel(const __grid_constant__ ReduceParams p) {
  __shared__ __align__(16) float shares[reduce_rows][reduce_channels], sums[max_taps][reduce_channels + 1];
  const int lane = threadIdx.x % (reduce_channels / 4) * 4, row = threadIdx.x / (reduce_channels / 4);
  const int part = row % p.parts, slot = row / p.parts, slots = reduce_rows / p.parts;
  const int c0 = blockIdx.x * reduce_channels, n = blockIdx.y;
  const std::int64_t size = static_cast<std::int64_t>(p.padded_columns) * p.padded_depth;
  const float* const from = p.partial + static_cast<std::int64_t>(n) * p.padded_depth + c0 + lane;
  wait_for_kernel_before();
  for (int first_tap = 0; first_tap < p.taps; first_tap += slots) {
    float4 sum{};
    if (first_tap + slot < p.taps) {
      const float* const of_tap = from + static_cast<std::int64_t>(first_tap + slot) * p.padded_channels;
#pragma unroll 8
      for (int split = part; split < p.splits; split += p.parts) {
        const float4 x = *reinterpret_cast<const float4*>(of_tap + split * size);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
    }
    *reinterpret_cast<float4*>(&shares[row][lane]) = sum;
    __syncthreads();
    for (int i = threadIdx.x; i < slots * reduce_channels; i += reduce_threads) {
      const int s = i / reduce_channels, c = i % reduce_channels;
      if (first_tap + s >= p.taps) break;
      float whole = 0.0f;
      for (int k = 0; k < p.parts; ++k) whole += shares[s * p.parts + k][c];
      sums[first_tap + s][c] = whole;
    }
    __syncthreads();
  }
  // The taps of a channel lie side by side.
  for (int i = threadIdx.x; i < reduce_channels * p.taps; i += reduce_threads) {
    const std::int64_t c = c0 + i / p.taps;
    const int tap = i % p.taps;
    if (c >= p.channels) break;
    const T rounded = from_float<T>(sums[tap][c - c0]);
    if (p.spatial_tap[tap] >= 0)
      static_cast<T*>(p.dspatial)[n * p.spatial_column + c * p.spatial_channel + p.spatial_tap[tap]] = rounded;
    if (p.temporal_tap[tap] >= 0)
      static_cast<T*>(p.dtemporal)[n * p.temporal_column + c * p.temporal_channel + p.temporal_tap[tap]] = rounded;
  }
}

}  // namespace effcore::cuda::conv3d
