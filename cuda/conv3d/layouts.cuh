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
  let_next_kernel_begin();  // only behind the wait: it reads voxels before it waits for these blocks
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

constexpr int reduce_threads = 256;

// Which four sums stand at float4 i of the partial sums: of one tap and column, and of neighbouring channels from `channel` on.
struct SumPlace {
  int tap, column, channel;
};

__device__ __forceinline__ SumPlace place_of_sums(const ReduceParams& p, int i) {
  if (!p.tiles) {
    const int quads = p.padded_depth / 4, depth = i % quads * 4;
    return {depth / p.padded_channels, i / quads, depth % p.padded_channels};
  }
  const int tile = i / 1024, panels = p.padded_channels / 64, thread = i % 64 * 2, rows = i % 1024 / 64;
  const int row = thread / 32 * 16 + rows % 2 * 8 + thread % 32 / 4;
  return {tile / panels % p.taps, tile / panels / p.taps * 64 + row, tile % panels * 64 + rows / 2 * 8 + thread % 4 * 2};
}

// Adds the partial sums up, four a thread, in the same order whatever the device; `parts` rows of threads take every parts-th
// split each.
template <class T>
__global__ void __launch_bounds__(reduce_threads) reduce_kernel(const __grid_constant__ ReduceParams p) {
  __shared__ float4 shares[reduce_threads];
  const int width = reduce_threads / p.parts, part = threadIdx.x / width;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * width + threadIdx.x % width;
  const std::int64_t size = static_cast<std::int64_t>(p.padded_columns) * p.padded_depth;
  float4 sum{};
  wait_for_kernel_before();
  const bool exists = 4 * i < size;
  if (exists) {
    const float* const from = p.partial + 4 * i;
#pragma unroll 8
    for (int split = part; split < p.splits; split += p.parts) {
      const float4 x = *reinterpret_cast<const float4*>(from + split * size);
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
  }
  if (p.parts > 1) {
    shares[threadIdx.x] = sum;
    __syncthreads();
    if (part != 0) return;
    for (int k = 1; k < p.parts; ++k) {
      const float4 x = shares[k * width + threadIdx.x];
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
  }
  if (!exists) return;
  const auto [tap, n, c] = place_of_sums(p, static_cast<int>(i));
  if (tap >= p.taps || n >= p.columns || c >= p.channels) return;
  const auto store = [&, n = n, c = c](void* kernels, std::int64_t column_stride, std::int64_t channel_stride, int at) {
    if (at < 0) return;
    T* const to = static_cast<T*>(kernels) + n * column_stride + c * channel_stride + at;
    if (channel_stride == 1) {
      const bool paired = reinterpret_cast<std::uintptr_t>(to) % (2 * sizeof(T)) == 0;
      store_pair(to, 0, p.channels - c, paired, sum.x, sum.y);
      store_pair(to, 2, p.channels - c, paired, sum.z, sum.w);
    } else {
      const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (c + e < p.channels) to[e * channel_stride] = from_float<T>(sums[e]);
    }
  };
  store(p.dspatial, p.spatial_column, p.spatial_channel, p.spatial_tap[tap]);
  store(p.dtemporal, p.temporal_column, p.temporal_channel, p.temporal_tap[tap]);
}

}  // namespace effcore::cuda::conv3d
