// out[position, n] = bias[n] + sum over taps and channels of G[position, (tap, c)] W[(tap, c), n]: the forward, and with
// mirrored taps and exchanged kernels the gradient of the data.
//
// Bound: FLOPs from 128 columns on; at 64 the second-level cache, from which each tap reads its voxels (64 FLOPs a byte).
// A block computes Rows x Columns outputs. For each tap that some row of the block sees, and each 128 bytes of channels, a tile
// of voxels [Rows, 128 bytes] and one of weights [Columns, 128 bytes] go through a ring of Stages in shared memory (cp.async,
// zeros outside the tensor). The results leave through shared memory, so that whole lines are written.
#pragma once
#include "conv3d/gather.cuh"

namespace effcore::cuda::conv3d {

template <class T, int Rows_, int Columns_, int WarpsDown, int WarpsAcross, int Stages_>
struct RowsConfig {
  static constexpr int Rows = Rows_, Columns = Columns_, Stages = Stages_;
  static constexpr int warps_across = WarpsAcross, threads = 32 * WarpsDown * WarpsAcross;
  static constexpr int warp_rows = Rows / WarpsDown, warp_columns = Columns / WarpsAcross;
  static constexpr int stage_bytes = (Rows + Columns) * 128;
  static constexpr int result_bytes = Rows * Columns * static_cast<int>(sizeof(T));
  static constexpr int tile_bytes = Stages * stage_bytes > result_bytes ? Stages * stage_bytes : result_bytes;
  struct Shared {
    std::int64_t out[Rows];  // where the row goes, -1: beyond the last one
    unsigned mask[max_taps / 32][Rows];
    unsigned live[max_taps / 32];
    short list[max_taps];
    int count;
  };
  static constexpr int shared_bytes = tile_bytes + static_cast<int>(sizeof(Shared)) + 1024;  // and the alignment of tiles
};

template <class T, class Config>
__global__ void __launch_bounds__(Config::threads) rows_kernel(const __grid_constant__ RowsParams p) {
  constexpr int Rows = Config::Rows, Columns = Config::Columns, Stages = Config::Stages, threads = Config::threads;
  constexpr int piece = 16 / static_cast<int>(sizeof(T)), step_rows = threads / 8, own_rows = Rows / step_rows;
  constexpr int down = Config::warp_rows / 16, across = Config::warp_columns / 16;
  using Input = Tile<T, segment<T>>;
  extern __shared__ char raw[];
  char* const memory = raw + (1024 - shared_address(raw) % 1024) % 1024;
  auto& shared = *reinterpret_cast<typename Config::Shared*>(memory + Config::tile_bytes);
  const GatherParams& g = p.gather;
  const int first_row = blockIdx.x * Rows, first_column = blockIdx.y * Columns;
  const int words = (g.taps + 31) / 32;

  // Which taps each row sees, and which of them some row of the block sees.
  if (threadIdx.x < max_taps / 32) shared.live[threadIdx.x] = 0;
  __syncthreads();
  for (int r = threadIdx.x; r < Rows; r += threads) {
    const bool exists = first_row + r < g.rows;
    const Position at = position_of(g, exists ? first_row + r : 0);
    shared.out[r] = exists ? at.b * p.out_stride[0] + (p.origin[0] + at.t * p.out_step[0]) * p.out_stride[1] +
                                 (p.origin[1] + at.h * p.out_step[1]) * p.out_stride[2] +
                                 (p.origin[2] + at.w * p.out_step[2]) * p.out_stride[3]
                           : -1;
    for (int word = 0; word < words; ++word) {
      unsigned mask = 0;
      for (int i = 0; i < 32 && word * 32 + i < g.taps; ++i)
        if (exists && sees(g, at, g.tap[word * 32 + i])) mask |= 1u << i;
      shared.mask[word][r] = mask;
      atomicOr(&shared.live[word], mask);
    }
  }
  __syncthreads();
  if (threadIdx.x < g.taps) {
    int before = __popc(shared.live[threadIdx.x / 32] & ((1u << threadIdx.x % 32) - 1));
    for (int word = 0; word < static_cast<int>(threadIdx.x) / 32; ++word) before += __popc(shared.live[word]);
    if (shared.live[threadIdx.x / 32] >> threadIdx.x % 32 & 1) shared.list[before] = static_cast<short>(threadIdx.x);
  }
  if (threadIdx.x == 0) {
    int count = 0;
    for (int word = 0; word < words; ++word) count += __popc(shared.live[word]);
    shared.count = count;
  }

  const T* const data = static_cast<const T*>(g.data);
  const int own_column = threadIdx.x % 8 * piece, own_row = threadIdx.x / 8;
  std::int64_t place[own_rows];
#pragma unroll
  for (int i = 0; i < own_rows; ++i) {
    const int row = first_row + own_row + i * step_rows;
    place[i] = place_of(g, position_of(g, row < g.rows ? row : 0));
  }
  __syncthreads();

  const int blocks = p.padded_channels / segment<T>, steps = shared.count * blocks;
  int next_tap = 0, next_block = 0;  // of the next load
  const auto load = [&](int stage) {
    const Input voxels(memory + stage * Config::stage_bytes), weights(memory + stage * Config::stage_bytes + Rows * 128);
    const int number = shared.list[next_tap], channel = next_block * segment<T> + own_column;
    const TapOffset tap = g.tap[number];
    const std::int64_t distance = distance_of(g, tap);
#pragma unroll
    for (int i = 0; i < own_rows; ++i) {
      const int r = own_row + i * step_rows;
      load_piece<T>(voxels, r, own_column, data, place[i] + distance, channel, g.channels,
                    shared.mask[number / 32][r] >> number % 32 & 1, g.aligned);
    }
    const T* from = static_cast<const T*>(p.packed) +
                    (static_cast<std::int64_t>(tap.number) * p.padded_columns + first_column) * p.padded_channels + channel;
    static_assert(Columns % step_rows == 0);
#pragma unroll
    for (int i = 0; i < Columns / step_rows; ++i) {
      const int r = own_row + i * step_rows;
      async_copy_16(shared_address(weights.at(r, own_column)), from + static_cast<std::int64_t>(r) * p.padded_channels, true);
    }
    if (++next_block == blocks) next_block = 0, ++next_tap;
  };

  float sums[down][2 * across][4];
#pragma unroll
  for (int m = 0; m < down; ++m) clear(sums[m]);
  const int warp = threadIdx.x / 32, warp_row = warp / Config::warps_across * Config::warp_rows,
            warp_column = warp % Config::warps_across * Config::warp_columns;
#pragma unroll
  for (int s = 0; s < Stages - 1; ++s) {
    if (s < steps) load(s);
    async_commit();
  }
  for (int s = 0; s < steps; ++s) {
    async_wait<Stages - 2>();
    __syncthreads();
    if (s + Stages - 1 < steps) load((s + Stages - 1) % Stages);
    async_commit();
    char* const stage = memory + s % Stages * Config::stage_bytes;
    const Input voxels(stage), weights(stage + Rows * 128);
    product<T, down, segment<T> / 16, across>(
        sums, [&](int m, int k) { return voxels.a(warp_row + 16 * m, 16 * k); },
        [&](int k, int n) { return weights.b(warp_column + 16 * n, 16 * k); });
  }
  async_wait<0>();
  __syncthreads();

  const Tile<T, Columns> result(memory);
  const int lane = threadIdx.x % 32;
  const T* const bias = static_cast<const T*>(p.bias);
#pragma unroll
  for (int n = 0; n < 2 * across; ++n) {
    const int column = warp_column + 8 * n + lane % 4 * 2;
    float add[2] = {};
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (bias != nullptr && first_column + column + e < p.columns)
        add[e] = to_float(bias[(first_column + column + e) * p.bias_stride]);
#pragma unroll
    for (int m = 0; m < down; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair(result.at(warp_row + 16 * m + 8 * half + lane / 4, column), 0, 2, true, sums[m][n][2 * half] + add[0],
                   sums[m][n][2 * half + 1] + add[1]);
  }
  __syncthreads();
  T* const out = static_cast<T*>(p.out) + first_column;
  for (int i = threadIdx.x; i < Rows * Columns / piece; i += threads) {
    const int r = i / (Columns / piece), column = i % (Columns / piece) * piece;
    if (shared.out[r] < 0) continue;
    T* const to = out + shared.out[r] + column;
    const T* const from = result.at(r, column);
    if (p.out_aligned) {
      if (first_column + column < p.columns) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < piece; ++e)
        if (first_column + column + e < p.columns) to[e] = from[e];
    }
  }
}

}  // namespace effcore::cuda::conv3d
