// dW[n, (tap, c)] = sum over positions of dout[position, n] G[position, (tap, c)], cut into `splits` ranges of positions whose
// sums a second kernel adds in order: deterministic, without atomics.
//
// Bound: the second-level cache. A block takes Columns output channels and Segments pieces of 128 bytes of (tap, channels); a
// step brings 64 positions of all of them. Both operands stand in shared memory with the positions as rows and are read
// transposed (ldmatrix.trans).
#pragma once
#include "conv3d/gather.cuh"

namespace effcore::cuda::conv3d {

template <class T, int ColumnSegments_, int Segments_, int WarpsDown, int WarpsAcross, int Stages_>
struct WeightsConfig {
  static constexpr int ColumnSegments = ColumnSegments_, Segments = Segments_, Stages = Stages_, depth = 64;
  static constexpr int Columns = ColumnSegments * segment<T>, Width = Segments * segment<T>;
  static constexpr int warps_across = WarpsAcross, threads = 32 * WarpsDown * WarpsAcross;
  static constexpr int warp_columns = Columns / WarpsDown, warp_width = Width / WarpsAcross;
  static constexpr int tile_bytes = depth * 128, stage_bytes = (ColumnSegments + Segments) * tile_bytes;
  static constexpr int shared_bytes = Stages * stage_bytes + 1024;
};

template <class T, class Config>
__global__ void __launch_bounds__(Config::threads) weights_kernel(const __grid_constant__ WeightsParams p) {
  constexpr int threads = Config::threads, Stages = Config::Stages, depth = Config::depth;
  constexpr int piece = 16 / static_cast<int>(sizeof(T)), step_rows = threads / 8, own_rows = depth / step_rows;
  constexpr int down = Config::warp_columns / 16, across = Config::warp_width / 16;
  static_assert(depth % step_rows == 0 && segment<T> % Config::warp_columns == 0 | Config::warp_columns % segment<T> == 0);
  using Input = Tile<T, segment<T>>;
  extern __shared__ char raw[];
  char* const memory = raw + (1024 - shared_address(raw) % 1024) % 1024;
  const GatherParams& g = p.gather;
  const int column_block = blockIdx.x % p.column_blocks, segment_block = blockIdx.x / p.column_blocks;
  const int first_column = column_block * Config::Columns, first_segment = segment_block * Config::Segments;
  const int blocks = (g.channels + segment<T> - 1) / segment<T>;
  const int begin = static_cast<int>(static_cast<std::int64_t>(blockIdx.y) * p.steps / p.splits);
  const int steps = static_cast<int>(static_cast<std::int64_t>(blockIdx.y + 1) * p.steps / p.splits) - begin;
  const T *const data = static_cast<const T*>(g.data), *const dout = static_cast<const T*>(p.dout);
  const int own_column = threadIdx.x % 8 * piece, own_row = threadIdx.x / 8;

  const auto load = [&](int s) {
    char* const stage = memory + s % Stages * Config::stage_bytes;
#pragma unroll
    for (int i = 0; i < own_rows; ++i) {
      const int r = own_row + i * step_rows, row = (begin + s) * depth + r;
      const bool exists = row < g.rows;
      const Position at = position_of(g, exists ? row : 0);
      const std::int64_t out =
          at.b * p.dout_stride[0] + at.t * p.dout_stride[1] + at.h * p.dout_stride[2] + at.w * p.dout_stride[3];
#pragma unroll
      for (int j = 0; j < Config::ColumnSegments; ++j)
        load_piece<T>(Input(stage + j * Config::tile_bytes), r, own_column, dout, out,
                      first_column + j * segment<T> + own_column, p.columns, exists, p.dout_aligned);
      const std::int64_t place = place_of(g, at);
#pragma unroll
      for (int j = 0; j < Config::Segments; ++j) {
        const int number = (first_segment + j) / blocks, block = (first_segment + j) % blocks;
        const bool wanted = first_segment + j < p.segments;
        const TapOffset tap = g.tap[wanted ? number : 0];
        load_piece<T>(Input(stage + (Config::ColumnSegments + j) * Config::tile_bytes), r, own_column, data,
                      place + distance_of(g, tap), block * segment<T> + own_column, g.channels,
                      exists && wanted && sees(g, at, tap), g.aligned);
      }
    }
  };

  float sums[down][2 * across][4];
#pragma unroll
  for (int m = 0; m < down; ++m) clear(sums[m]);
  const int warp = threadIdx.x / 32, warp_row = warp / Config::warps_across * Config::warp_columns,
            warp_column = warp % Config::warps_across * Config::warp_width;
#pragma unroll
  for (int s = 0; s < Stages - 1; ++s) {
    if (s < steps) load(s);
    async_commit();
  }
  for (int s = 0; s < steps; ++s) {
    async_wait<Stages - 2>();
    __syncthreads();
    if (s + Stages - 1 < steps) load(s + Stages - 1);
    async_commit();
    char* const stage = memory + s % Stages * Config::stage_bytes;
    const auto tile = [&](int first, int column) { return Input(stage + (first + column / segment<T>)*Config::tile_bytes); };
    product<T, down, depth / 16, across>(
        sums,
        [&](int m, int k) {
          const int column = warp_row + 16 * m;
          return tile(0, column).a_transposed(16 * k, column % segment<T>);
        },
        [&](int k, int n) {
          const int column = warp_column + 16 * n;
          return tile(Config::ColumnSegments, column).b_transposed(16 * k, column % segment<T>);
        });
  }
  async_wait<0>();

  const int lane = threadIdx.x % 32;
  const std::int64_t width = static_cast<std::int64_t>(gridDim.x / p.column_blocks) * Config::Width;
  float* const partial =
      p.partial +
      (static_cast<std::int64_t>(blockIdx.y) * p.column_blocks * Config::Columns + first_column + warp_row) * width +
      segment_block * Config::Width + warp_column;
#pragma unroll
  for (int m = 0; m < down; ++m)
#pragma unroll
    for (int n = 0; n < 2 * across; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(partial + (16 * m + 8 * half + lane / 4) * width + 8 * n + lane % 4 * 2) =
            make_float2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
}

}  // namespace effcore::cuda::conv3d
