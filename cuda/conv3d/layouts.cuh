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

constexpr int reduce_threads = 256, reduce_channels = 64;

// Adds the partial sums up, always in the same order: a block takes 64 channels of all taps of one output channel, 16 threads a
// tap. They leave in the order of the kernels' memory, [channel][tap], through shared memory.
template <class T>
__global__ void __launch_bounds__(reduce_threads) reduce_kernel(const __grid_constant__ ReduceParams p) {
  __shared__ float sums[max_taps][reduce_channels + 1];
  const int n = blockIdx.y, channel = blockIdx.x * reduce_channels, thread = threadIdx.x;
  const std::int64_t size = static_cast<std::int64_t>(p.padded_columns) * p.padded_depth;
  const int c = thread % 16 * 4;
  wait_for_kernel_before();
  if (channel + c < p.padded_channels)
    for (int tap = thread / 16; tap < p.taps; tap += reduce_threads / 16) {
      const float* const from =
          p.partial + static_cast<std::int64_t>(n) * p.padded_depth + tap * p.padded_channels + channel + c;
      float4 sum{};
#pragma unroll 8
      for (int split = 0; split < p.splits; ++split) {
        const float4 x = *reinterpret_cast<const float4*>(from + split * size);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
      float* const to = &sums[tap][c];
      to[0] = sum.x, to[1] = sum.y, to[2] = sum.z, to[3] = sum.w;
    }
  __syncthreads();
  const auto store = [&](const KernelTaps& kernel) {
    T* const to = static_cast<T*>(kernel.data) + n * kernel.column + channel * kernel.channel;
    for (int i = thread; i < reduce_channels * kernel.taps; i += reduce_threads) {
      const int at = i / kernel.taps, tap = i % kernel.taps;
      if (channel + at < p.channels) to[at * kernel.channel + kernel.place[tap]] = from_float<T>(sums[kernel.number[tap]][at]);
    }
  };
  store(p.spatial);
  store(p.temporal);
}

}  // namespace effcore::cuda::conv3d
