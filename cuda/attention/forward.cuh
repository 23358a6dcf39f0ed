// Forward of attention, and of a consumer layer that recomputes P from the owner's log-sum-exp:
//
//   owner     S = scale Q K^T,  P = exp(S - max) by online softmax,  O = P V / sum P,  lse = max + log sum P
//   consumer  P = exp(S - lse),  O = P V: no maxima, no sums, no rescaling
//
// Bound: 2 products of 2 * queries * keys * dim FLOPs (half of it causal) on the tensor cores; K and V are read once a block of
// rows, from L2. FlashAttention-2's plan: a block owns `rows` queries and walks over the keys it sees, `keys` at a time; S and
// P stay in registers. While S is multiplied V arrives, while P V is multiplied the next K does.
//
// Shared memory: Q [rows x D], K [keys x D], V [keys x D], each swizzled (tile.cuh). A warp owns 16 * row_tiles whole rows.
#pragma once
#include "attention/visibility.cuh"

namespace effcore::cuda::attention {

template <class T, int D>
struct ForwardTiles {
  // 32 rows a warp reuse each operand out of shared memory twice, which the tensor cores need: 16 rows would ask for 2 cycles
  // of shared memory for each 1.4-cycle mma. At D = 256 the output alone would then be 256 registers, and float32 is bound by
  // FMAs: 16.
  static constexpr int row_tiles = is_16bit<T> && D <= 128 ? 2 : 1;
  static constexpr int warps = !is_16bit<T> && D == 256 ? 2 : 4;  // 96 KiB: sm_86 and sm_89 have 99
  static constexpr int rows = 16 * row_tiles * warps;
  static constexpr int keys = is_16bit<T> ? 64 : 32;  // 128 keys would spill S at D = 128
  static constexpr int threads = 32 * warps;
  static constexpr int shared_bytes = (rows + 2 * keys) * D * static_cast<int>(sizeof(T));
};

template <class T, int D, bool known_lse>
__global__ void __launch_bounds__(ForwardTiles<T, D>::threads) forward_kernel(const __grid_constant__ ForwardParams p) {
  using Tiles = ForwardTiles<T, D>;
  constexpr int row_tiles = Tiles::row_tiles, keys = Tiles::keys, threads = Tiles::threads;
  constexpr float infinity = INFINITY, log2e = 1.4426950408889634f, ln2 = 0.6931471805599453f;
  extern __shared__ __align__(1024) char shared[];
  const Tile<T, D> q_tile(shared), k_tile(shared + Tiles::rows * Tile<T, D>::row_bytes),
      v_tile(k_tile.data + keys * Tile<T, D>::row_bytes);

  const Shape& s = p.shape;
  const Work work(p.schedule, blockIdx.x, s.causal);
  const int batch = work.head / s.heads, head = work.head % s.heads, kv_head = head / s.group;
  const int row0 = work.block * Tiles::rows, last_row = min(row0 + Tiles::rows, s.queries) - 1;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * row_tiles;
  const Visibility seen(s, batch);
  const KeyRange range(seen, row0, last_row);
  const Matrix<T> q = matrix<T>(p.q, batch, head), k = matrix<T>(p.k, batch, kv_head), v = matrix<T>(p.v, batch, kv_head);
  const std::int64_t lse_row = static_cast<std::int64_t>(work.head) * s.queries;

  float out[row_tiles][D / 8][4];
  float maximum[row_tiles][2], sum[row_tiles][2];  // known_lse: maximum is lse in units of log2
#pragma unroll
  for (int m = 0; m < row_tiles; ++m) {
    clear(out[m]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + warp_row + 16 * m + lane / 4 + 8 * i;
      maximum[m][i] = known_lse ? (row < s.queries ? p.lse[lse_row + row] : 0.0f) * log2e : -infinity;
      if (known_lse && maximum[m][i] == -infinity) maximum[m][i] = 0.0f;  // sees no key: exp2(-inf - 0) = 0
      sum[m][i] = 0.0f;
    }
  }

  const int first_block = range.begin / keys, end_block = range.empty() ? first_block : (range.end + keys - 1) / keys;
  if (first_block < end_block) {
    load_tile<Tiles::rows, threads>(q_tile, q, row0, 0, s.queries);
    load_tile<keys, threads>(k_tile, k, first_block * keys, range.begin, range.end);
    async_commit();
  }
  for (int block = first_block; block < end_block; ++block) {
    const int key0 = block * keys;
    async_wait<0>();
    __syncthreads();  // K has arrived, and everyone is done with V
    load_tile<keys, threads>(v_tile, v, key0, range.begin, range.end);
    async_commit();

    float score[row_tiles][keys / 8][4];
#pragma unroll
    for (int m = 0; m < row_tiles; ++m) clear(score[m]);
    product<T, row_tiles, D / 16, keys / 16>(
        score, [&](int m, int d) { return q_tile.a(warp_row + 16 * m, 16 * d); },
        [&](int d, int n) { return k_tile.b(16 * n, 16 * d); });
    async_wait<0>();
    __syncthreads();  // V has arrived, and everyone is done with K
    if (block + 1 < end_block) load_tile<keys, threads>(k_tile, k, key0 + keys, range.begin, range.end);
    async_commit();

    if (s.negative) {
#pragma unroll
      for (int m = 0; m < row_tiles; ++m)
#pragma unroll
        for (int n = 0; n < keys / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) score[m][n][i] = -score[m][n][i];
    }
    // Only blocks at an edge of what the rows see are masked.
    if (key0 + keys > seen.end(row0) || key0 < seen.begin(last_row)) {
#pragma unroll
      for (int m = 0; m < row_tiles; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = min(row0 + warp_row + 16 * m + lane / 4 + 8 * i, last_row);
          const int begin = seen.begin(row), end = seen.end(row);
#pragma unroll
          for (int n = 0; n < keys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int key = key0 + 8 * n + 2 * (lane % 4) + e;
              if (key < begin || key >= end) score[m][n][2 * i + e] = -infinity;
            }
        }
    }
#pragma unroll
    for (int m = 0; m < row_tiles; ++m)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float shift = maximum[m][i];
        if constexpr (!known_lse) {
          float highest = score[m][0][2 * i];
#pragma unroll
          for (int n = 0; n < keys / 8; ++n) highest = fmaxf(highest, fmaxf(score[m][n][2 * i], score[m][n][2 * i + 1]));
          highest = fmaxf(maximum[m][i], row_max(highest));
          shift = highest == -infinity ? 0.0f : highest * s.scale_log2;
          const float rescale = exp2_approx(maximum[m][i] * s.scale_log2 - shift);
          maximum[m][i] = highest;
          sum[m][i] *= rescale;
#pragma unroll
          for (int n = 0; n < D / 8; ++n) out[m][n][2 * i] *= rescale, out[m][n][2 * i + 1] *= rescale;
        }
#pragma unroll
        for (int n = 0; n < keys / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = score[m][n][2 * i + e];
            x = exp2_approx(fmaf(x, s.scale_log2, -shift));
            if constexpr (!known_lse) sum[m][i] += x;
          }
      }
    product<T, row_tiles, keys / 16, D / 16, true>(
        out, [&](int m, int j) { return as_operand<T>(score[m][2 * j], score[m][2 * j + 1]); },
        [&](int j, int n) { return v_tile.b_transposed(16 * j, 16 * n); });
  }

#pragma unroll
  for (int m = 0; m < row_tiles; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + warp_row + 16 * m + lane / 4 + 8 * i;
      const bool sees = seen.sees_keys(min(row, last_row));
      float inverse = 1.0f;
      if constexpr (!known_lse) {
        float total = row_sum(sum[m][i]);
        if (total == 0.0f) total = NAN;  // scores that are all -inf have no softmax
        inverse = 1.0f / total;
        if (row < s.queries && lane % 4 == 0)
          p.lse[lse_row + row] = sees ? maximum[m][i] * s.scale_log2 * ln2 + logf(total) : -infinity;
      }
      if (row >= s.queries) continue;
      T* to = row_of<T>(p.out, batch, head, row);
#pragma unroll
      for (int n = 0; n < D / 8; ++n)
        store_pair(to, 8 * n + 2 * (lane % 4), s.value_dim, p.out.paired, sees ? out[m][n][2 * i] * inverse : 0.0f,
                   sees ? out[m][n][2 * i + 1] * inverse : 0.0f);
    }
}

}  // namespace effcore::cuda::attention
