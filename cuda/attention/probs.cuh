// The probabilities that a layer group keeps: P = exp(scale Q K^T - lse), normalised, in the inputs' dtype, packed by tiles.
//
// A pass of its own behind the forward, rather than a part of it: the forward knows the maximum and the sum of a row only at
// its end, so it would have to write unnormalised values and read, rescale and round all of them again (three times the bytes,
// two roundings), or to walk over the keys twice anyway. Bound: one write of P; the product costs 2 * D FLOPs an element, less
// than the write up to D = 64.
//
// Shared memory: Q [rows x D], two K tiles [64 x D], P [rows x 64] on its way from registers to rows of 16 bytes a lane.
// A block owns one or two rows of tiles, a warp 16 * row_tiles rows of one of them. All tiles that are stored are written,
// zeros where nothing is seen.
#pragma once
#include "attention/visibility.cuh"

namespace effcore::cuda::attention {

template <class T, int D>
struct ProbsTiles {
  static constexpr int row_tiles = is_16bit<T> && D <= 128 ? 2 : 1;  // as in forward.cuh
  static constexpr int warps = 4, threads = 32 * warps, rows = 16 * row_tiles * warps;
  static constexpr int keys = is_16bit<T> || D < 256 ? 64 : 32;
  static constexpr int stages = is_16bit<T> && D <= 128 ? 2 : 1;
  static constexpr int shared_bytes = ((rows + stages * keys) * D + rows * keys) * static_cast<int>(sizeof(T));
};

template <class T, int D>
__global__ void __launch_bounds__(ProbsTiles<T, D>::threads) probs_kernel(const __grid_constant__ ProbsParams p) {
  using Tiles = ProbsTiles<T, D>;
  constexpr int keys = Tiles::keys, threads = Tiles::threads, rows = Tiles::rows;
  constexpr float infinity = INFINITY, log2e = 1.4426950408889634f;
  extern __shared__ __align__(1024) char shared[];
  const Tile<T, D> q_tile(shared);
  char* const k_tiles = shared + rows * Tile<T, D>::row_bytes;
  const Tile<T, keys> p_tile(k_tiles + Tiles::stages * keys * Tile<T, D>::row_bytes);

  const Shape& s = p.shape;
  const Work work(p.schedule, blockIdx.x, s.causal);
  const int batch = work.head / s.heads, head = work.head % s.heads;
  const int row0 = work.block * rows, last_row = min(row0 + rows, s.queries) - 1;
  constexpr int row_tiles = Tiles::row_tiles;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * row_tiles;
  const int tile_row = (row0 + warp_row) / probs_tile, tile_rows = (s.queries + probs_tile - 1) / probs_tile;
  const Visibility seen(s, batch);
  const KeyRange range(seen, row0, last_row);
  const Matrix<T> q = matrix<T>(p.q, batch, head), k = matrix<T>(p.k, batch, head / s.group);
  T* const packed = static_cast<T*>(p.probs) + work.head * probs_elements_of(s) +
                    probs_tiles_before(s, tile_row) * (probs_tile * probs_tile) + (row0 + warp_row) % probs_tile * probs_tile;
  const int stored = tile_row < tile_rows ? probs_tiles(s, tile_row) * probs_tile : 0;  // keys that this warp's rows store

  float shift[row_tiles][2];
  int begin[row_tiles][2], end[row_tiles][2];
#pragma unroll
  for (int m = 0; m < row_tiles; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + warp_row + 16 * m + lane / 4 + 8 * i;
      shift[m][i] = row < s.queries ? p.lse[static_cast<std::int64_t>(work.head) * s.queries + row] * log2e : -infinity;
      if (row < s.queries && lane % 4 == 0) {
        float* const factor = p.factors + static_cast<std::int64_t>(work.head) * s.queries + row;
        *factor = 1.0f;
        if constexpr (!is_16bit<T>)
          factor[static_cast<std::int64_t>(s.batch) * s.heads * s.queries] = 0.0f;  // the rest of their room
      }
      begin[m][i] = row < s.queries ? seen.begin(row) : 0;
      end[m][i] = row < s.queries && shift[m][i] != -infinity ? seen.end(row) : 0;
    }

  const auto load = [&](int block) {
    const Tile<T, D> tile(k_tiles + block % Tiles::stages * keys * Tile<T, D>::row_bytes);
    load_tile<keys, threads>(tile, k, block * keys, range.begin, range.end);
    async_commit();
  };
  const int blocks = probs_tiles(s, min((row0 + rows) / probs_tile, tile_rows) - 1) * (probs_tile / keys);
  load_tile<rows, threads>(q_tile, q, row0, 0, s.queries);
  if (blocks > 0) load(0);
  for (int block = 0; block < blocks; ++block) {
    async_wait<0>();
    __syncthreads();
    if (Tiles::stages == 2 && block + 1 < blocks) load(block + 1);
    const Tile<T, D> k_tile(k_tiles + block % Tiles::stages * keys * Tile<T, D>::row_bytes);
    const int key0 = block * keys;
    float score[row_tiles][keys / 8][4];
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) clear(score[m]);
    if (key0 < range.end && key0 + keys > range.begin) {
      product<T, row_tiles, D / 16, keys / 16>(
          score, [&](int m, int d) { return q_tile.a(warp_row + 16 * m, 16 * d); },
          [&](int d, int n) { return k_tile.b(16 * n, 16 * d); });
    }
    if (Tiles::stages == 1) {
      __syncthreads();
      if (block + 1 < blocks) load(block + 1);
    }
    if (key0 >= stored) continue;
    const float scale = s.negative ? -s.scale_log2 : s.scale_log2;
#pragma unroll
    for (int m = 0; m < row_tiles; ++m)
#pragma unroll
      for (int n = 0; n < keys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * n + 2 * (lane % 4);
          float x[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int key = key0 + column + e;
            x[e] =
                key >= begin[m][i] && key < end[m][i] ? exp2_approx(fmaf(score[m][n][2 * i + e], scale, -shift[m][i])) : 0.0f;
          }
          store_pair(p_tile.at(warp_row + 16 * m + lane / 4 + 8 * i, column), 0, 2, true, x[0], x[1]);
        }
    __syncwarp();
    // The warp's rows, 16 bytes a lane.
    constexpr int chunk = Tile<T, keys>::chunk, chunks = keys / chunk;
    T* const to = packed + static_cast<std::int64_t>(key0 / probs_tile) * (probs_tile * probs_tile) + key0 % probs_tile;
#pragma unroll
    for (int i = lane; i < 16 * row_tiles * chunks; i += 32) {
      const int row = i / chunks, column = i % chunks * chunk;
      *reinterpret_cast<uint4*>(to + row * probs_tile + column) =
          *reinterpret_cast<const uint4*>(p_tile.at(warp_row + row, column));
    }
    __syncwarp();
  }
  async_wait<0>();
}

}  // namespace effcore::cuda::attention
