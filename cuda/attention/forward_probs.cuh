// Forward of a consumer layer from kept probabilities: O = P V, a block matrix product.
//
// Bound: P is read once from device memory, queries * keys elements (half of them causal) of 2 bytes; with 2 * D FLOPs an
// element it is bound by bandwidth up to D = 64 and by the tensor cores' mma.sync rate at D = 256. So the loads matter: a ring
// of `stages` tiles of P and V, all but one of them on their way.
//
// Shared memory, a stage: P [rows x keys], V [keys x D]. A warp owns 16 * row_tiles whole rows.
#pragma once
#include "attention/visibility.cuh"

namespace effcore::cuda::attention {

template <class T, int D>
struct ForwardProbsTiles {
  static constexpr int row_tiles = is_16bit<T> && D <= 128 ? 2 : 1;  // as in forward.cuh
  static constexpr int warps = 4;
  static constexpr int rows = 16 * row_tiles * warps;
  static constexpr int keys = is_16bit<T> ? 64 : 32;
  static constexpr int threads = 32 * warps;
  static constexpr int stages = D <= 128 ? 3 : 2;
  static constexpr int probs_bytes = rows * keys * static_cast<int>(sizeof(T));
  static constexpr int stage_bytes = probs_bytes + keys * D * static_cast<int>(sizeof(T));
  static constexpr int shared_bytes = stages * stage_bytes;
};

template <class T, int D>
__global__ void __launch_bounds__(ForwardProbsTiles<T, D>::threads)
    forward_probs_kernel(const __grid_constant__ ForwardParams p) {
  using Tiles = ForwardProbsTiles<T, D>;
  constexpr int row_tiles = Tiles::row_tiles, keys = Tiles::keys, threads = Tiles::threads;
  extern __shared__ __align__(1024) char shared[];

  const Shape& s = p.shape;
  const Work work(p.schedule, blockIdx.x, s.causal);
  const int batch = work.head / s.heads, head = work.head % s.heads, kv_head = head / s.group;
  const int row0 = work.block * Tiles::rows, last_row = min(row0 + Tiles::rows, s.queries) - 1;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * row_tiles;
  const Visibility seen(s, batch);
  const KeyRange range(seen, row0, last_row);
  const Matrix<T> v = matrix<T>(p.v, batch, kv_head);
  const T* probs = static_cast<const T*>(p.probs) + work.head * probs_elements_of(s);

  const int first_block = range.begin / keys, end_block = range.empty() ? first_block : (range.end + keys - 1) / keys;
  const auto load = [&](int block) {
    if (block < end_block) {
      char* stage = shared + (block - first_block) % Tiles::stages * Tiles::stage_bytes;
      load_probs<Tiles::rows, threads>(Tile<T, keys>(stage), probs, s, row0, block * keys);
      load_tile<keys, threads>(Tile<T, D>(stage + Tiles::probs_bytes), v, block * keys, range.begin, range.end);
    }
    async_commit();
  };

  float out[row_tiles][D / 8][4];
#pragma unroll
  for (int m = 0; m < row_tiles; ++m) clear(out[m]);
#pragma unroll
  for (int i = 0; i < Tiles::stages - 1; ++i) load(first_block + i);
  for (int block = first_block; block < end_block; ++block) {
    async_wait<Tiles::stages - 2>();
    __syncthreads();
    load(block + Tiles::stages - 1);  // into the stage that everyone has just left
    char* stage = shared + (block - first_block) % Tiles::stages * Tiles::stage_bytes;
    const Tile<T, keys> p_tile(stage);
    const Tile<T, D> v_tile(stage + Tiles::probs_bytes);
    product<T, row_tiles, keys / 16, D / 16>(
        out, [&](int m, int j) { return p_tile.a(warp_row + 16 * m, 16 * j); },
        [&](int j, int n) { return v_tile.b_transposed(16 * j, 16 * n); });
  }
#pragma unroll
  for (int m = 0; m < row_tiles; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + warp_row + 16 * m + lane / 4 + 8 * i;
      if (row >= s.queries) continue;
      T* to = row_of<T>(p.out, batch, head, row);
      const float factor = p.factors[static_cast<std::int64_t>(work.head) * s.queries + row];
      const bool sees = seen.sees_keys(row);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        store_pair(to, 8 * n + 2 * (lane % 4), s.value_dim, p.out.paired, sees ? out[m][n][2 * i] * factor : 0.0f,
                   sees ? out[m][n][2 * i + 1] * factor : 0.0f);
    }
}

}  // namespace effcore::cuda::attention
