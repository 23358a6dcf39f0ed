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
  let_next_kernel_begin();
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

constexpr int reduce_threads = 256, reduce_sums = max_taps * 65;

// Adds the partial sums up, always in the same order: a block takes 4 * lanes channels of all taps of one output channel,
// `lanes` threads a tap and part; part i has every parts-th sum from i on. They leave in the order of the kernels' memory,
// [channel][tap], through shared memory.
template <class T>
__global__ void __launch_bounds__(reduce_threads) reduce_kernel(const __grid_constant__ ReduceParams p) {
  __shared__ float sums[reduce_sums];
  const int channels = 4 * p.lanes, pitch = channels + 1, n = blockIdx.y, channel = blockIdx.x * channels;
  const int thread = threadIdx.x, c = thread % p.lanes * 4;
  const std::int64_t size = static_cast<std::int64_t>(p.padded_columns) * p.padded_depth;
  wait_for_kernel_before();
  let_next_kernel_begin();
  if (channel + c < p.padded_channels)
    for (int item = thread / p.lanes; item < p.taps * p.parts; item += reduce_threads / p.lanes) {
      const int tap = item % p.taps, part = item / p.taps;
      const float* const from =
          p.partial + static_cast<std::int64_t>(n) * p.padded_depth + tap * p.padded_channels + channel + c;
      float4 sum{};
#pragma unroll 8
      for (int split = part; split < p.splits; split += p.parts) {
        const float4 x = *reinterpret_cast<const float4*>(from + split * size);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
      float* const to = &sums[item * pitch + c];
      to[0] = sum.x, to[1] = sum.y, to[2] = sum.z, to[3] = sum.w;
    }
  __syncthreads();
  const auto store = [&](const KernelTaps& kernel) {
    T* const to = static_cast<T*>(kernel.data) + n * kernel.column + channel * kernel.channel;
    for (int i = thread; i < channels * kernel.taps; i += reduce_threads) {
      const int at = i / kernel.taps, tap = i % kernel.taps;
      if (channel + at >= p.channels) break;
      float sum = 0.0f;
      for (int part = 0; part < p.parts; ++part) sum += sums[(part * p.taps + kernel.number[tap]) * pitch + at];
      to[at * kernel.channel + kernel.place[tap]] = from_float<T>(sum);
    }
  };
  store(p.spatial);
  store(p.temporal);
}

}  // namespace effcore::cuda::conv3d
