// The class token's scores by one block: scores[h][n] = factor · q_h · k_n for some heads, and their softmax.
//
// Bound: each key is read once, for up to 8 heads that share it. 16-bit keys go to the tensor cores: a warp takes 16 tokens,
// their keys are the rows of A and up to 8 queries the columns of B (one query: all columns alike, as the tensor cores have
// nothing else to do). A dot product does not depend on the order of its terms, so a lane's 16 loaded bytes are its share of
// two products as they come, and keys and queries need no rearrangement:
//
//   lane (r, c) = (lane / 4, lane % 4) holds columns 8 c .. 8 c + 7 of every 32, of tokens r and r + 8 and of query r
//
// float32 runs on the FMA units, without TF32's rounding: a key row is read by `lanes` neighbouring lanes, 16 bytes each.
#pragma once
#include <cmath>

#include "common/fragment.cuh"
#include "routing/rows.cuh"

namespace effcore::cuda::routing {

struct ScoreParams {
  const void *q, *k;
  std::int64_t q_stride[2], k_stride[3];  // batch, head (, token)
  int tokens, heads, group, dim;
  int lanes;         // float32: that read a row
  bool vectors;      // k's rows are aligned
  float factor;      // scale · log2(e)
  int query_stride;  // of the queries in shared memory
};

// Elements of a query in shared memory: zeros behind its end; 16 bits: 64 bytes more than a multiple of 128, so that the eight
// lanes that read at once (two queries) find different banks.
inline int query_stride(std::int64_t dim, int element_bytes) {
  return static_cast<int>(element_bytes == 2 ? (dim + 63) / 64 * 64 + 32 : (dim + 7) / 8 * 8);
}

template <class T>
__device__ __forceinline__ void load_queries(const ScoreParams& p, std::int64_t b, int first, int count, T* queries) {
  for (int i = threadIdx.x; i < count * p.query_stride; i += blockDim.x) {
    const int h = i / p.query_stride, column = i - h * p.query_stride;
    const T* q = static_cast<const T*>(p.q) + b * p.q_stride[0] + (first + h) * p.q_stride[1];
    queries[i] = column < p.dim ? q[column] : from_float<T>(0.0f);
  }
}

// 16 bytes of a key, zeros behind its end.
template <class T>
__device__ __forceinline__ uint4 load_key(const T* row, int column, const ScoreParams& p) {
  if (p.vectors) return column < p.dim ? load_once(row + column) : uint4{};
  uint4 bits{};
  T* const x = reinterpret_cast<T*>(&bits);
#pragma unroll
  for (int i = 0; i < Vector<T>::size; ++i) x[i] = column + i < p.dim ? row[column + i] : from_float<T>(0.0f);
  return bits;
}

// ---- 16 bits

// scores[h - first][n] of the heads [h, end), at most 8 that share keys, and the tokens [n0, n0 + 16).
template <class T>
__device__ __forceinline__ void score_tile(const ScoreParams& p, const T* k, int n0, const T* queries, int h, int end,
                                           float* scores) {
  const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const T* const rows[2] = {k + min(n0 + r, p.tokens - 1) * p.k_stride[2], k + min(n0 + r + 8, p.tokens - 1) * p.k_stride[2]};
  const T* const query = queries + min(r, end - h - 1) * p.query_stride;
  float sums[4] = {};
  // All loads of 128 columns are in flight before the first product. (Two tiles at once lose 8 % on an H100, asking the L2 for
  // 256 bytes gains 3.)
  constexpr int ahead = 4;
  for (int first = 0; first < p.dim; first += 32 * ahead) {
    uint4 x[ahead], y[ahead];
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
      const int column = first + 32 * u + 8 * c;
      x[u] = load_key(rows[0], column, p), y[u] = load_key(rows[1], column, p);
    }
#pragma unroll
    for (int u = 0; u < ahead; ++u) {
      if (first + 32 * u >= p.dim) break;
      const uint4 q = *reinterpret_cast<const uint4*>(query + first + 32 * u + 8 * c);
      mma_16x8x16<T>(sums, {x[u].x, y[u].x, x[u].y, y[u].y}, q.x, q.y);
      mma_16x8x16<T>(sums, {x[u].z, y[u].z, x[u].w, y[u].w}, q.z, q.w);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * c + i % 2, n = n0 + r + i / 2 * 8;
    if (h + column < end && n < p.tokens) scores[static_cast<std::int64_t>(column) * p.tokens + n] = sums[i] * p.factor;
  }
}

// ---- float32

constexpr int tokens_at_once = 4;

// Adds up `batch` sums over `lanes` neighbouring lanes. Where there are lanes enough, each step halves the sums that a lane
// still carries (9 shuffles instead of 40 for 8 sums over a warp), and sum j ends up in the lanes from j * lanes / batch on.
// Returns the first of the sums that this lane has; `have` of them.
template <int batch>
__device__ __forceinline__ int add_lanes(float (&sums)[batch], int lanes, int lane, int& have) {
  int offset = lanes / 2;
  have = batch;
  if (lanes < batch) {
    for (; offset > 0; offset /= 2)
#pragma unroll
      for (int j = 0; j < batch; ++j) sums[j] += __shfl_xor_sync(~0u, sums[j], offset);
    return 0;
  }
  if constexpr (batch > 1)
#pragma unroll
    for (int m = batch / 2; m > 0; m /= 2, offset /= 2) {
      const bool upper = lane & offset;
#pragma unroll
      for (int j = 0; j < m; ++j) {
        const float mine = upper ? sums[j + m] : sums[j], other = upper ? sums[j] : sums[j + m];
        sums[j] = mine + __shfl_xor_sync(~0u, other, offset);
      }
    }
  for (; offset > 0; offset /= 2) sums[0] += __shfl_xor_sync(~0u, sums[0], offset);
  have = 1;
  return lane / (lanes / batch);
}

// scores[h - first][n] of the heads [h, end), at most `batch` that share keys k. A group of lanes takes `tokens_at_once` tokens
// together: so many loads in flight, and each weight read once for all of them.
template <int batch>
__device__ __forceinline__ void score_rows(const ScoreParams& p, const float* k, const float* queries, int h, int end,
                                           float* scores) {
  constexpr int size = Vector<float>::size;
  const int lane = threadIdx.x % p.lanes, part = threadIdx.x / p.lanes, parts = blockDim.x / p.lanes;
  // All lanes of a warp take part in the shuffles, so they walk together.
  for (int n0 = part; n0 - part < p.tokens; n0 += parts * tokens_at_once) {
    const float* rows[tokens_at_once];
    float sums[tokens_at_once][batch] = {};
#pragma unroll
    for (int u = 0; u < tokens_at_once; ++u) rows[u] = k + min(n0 + u * parts, p.tokens - 1) * p.k_stride[2];
    for (int column = lane * size; column < p.dim; column += p.lanes * size) {
      Vector<float> x[tokens_at_once];
#pragma unroll
      for (int u = 0; u < tokens_at_once; ++u) x[u] = Vector<float>::from(load_key(rows[u], column, p));
#pragma unroll
      for (int j = 0; j < batch; ++j) {
        const float4 w = *reinterpret_cast<const float4*>(queries + min(j, end - h - 1) * p.query_stride + column);
#pragma unroll
        for (int u = 0; u < tokens_at_once; ++u) {
          float& sum = sums[u][j];
          sum = fmaf(x[u].x[0], w.x, sum), sum = fmaf(x[u].x[1], w.y, sum);
          sum = fmaf(x[u].x[2], w.z, sum), sum = fmaf(x[u].x[3], w.w, sum);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < tokens_at_once; ++u) {
      int have;
      const int from = add_lanes(sums[u], p.lanes, lane, have), n = n0 + u * parts;
      const bool writes = have == 1 && batch > 1 ? lane % (p.lanes / batch) == 0 : lane == 0;
      if (!writes || n >= p.tokens) continue;
#pragma unroll
      for (int j = 0; j < batch; ++j)
        if (j < have && h + from + j < end) scores[static_cast<std::int64_t>(from + j) * p.tokens + n] = sums[u][j] * p.factor;
    }
  }
}

// scores[h - first][n] for the heads [first, first + count), whose queries stand in shared memory; `batch` of them at a time
// where they share keys.
template <class T, int batch>
__device__ __forceinline__ void score_heads(const ScoreParams& p, std::int64_t b, const T* queries, int first, int count,
                                            float* scores) {
  const int warps = blockDim.x / 32, tiles = (p.tokens + 15) / 16;
  int tile = threadIdx.x / 32;  // the warps go on from batch to batch without waiting
  for (int h = first; h < first + count;) {
    const int g = h / p.group, end = min(min(first + count, (g + 1) * p.group), h + batch);
    const T* const k = static_cast<const T*>(p.k) + b * p.k_stride[0] + g * p.k_stride[1];
    const T* const own = queries + (h - first) * p.query_stride;
    float* const to = scores + static_cast<std::int64_t>(h - first) * p.tokens;
    if constexpr (is_16bit<T>) {
      for (; tile < tiles; tile += warps) score_tile(p, k, tile * 16, own, h, end, to);
      tile -= tiles;
    } else {
      score_rows<batch>(p, k, own, h, end, to);
    }
    h = end;
  }
}

// softmax(h)[n] = exp2(scores[h][n] - statistics[h].x) * statistics[h].y / weight. Warps share a head's tokens out where there
// are fewer heads. `statistics` has room for most_statistics(count) and is complete behind the caller's next barrier.
__host__ __device__ constexpr int most_statistics(int count) {
  return count + (count > 32 ? count : 32);
}

__device__ __forceinline__ void softmax_statistics(const float* scores, int tokens, int count, float weight,
                                                   float2* statistics) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32, parts = max(warps / count, 1);
  for (int i = threadIdx.x / 32; i < count * parts; i += warps) {
    const int h = i / parts, begin = (i - h * parts) * 32 + lane;
    const float* const row = scores + static_cast<std::int64_t>(h) * tokens;
    float top = -INFINITY, sum = 0.0f;
    for (int n = begin; n < tokens; n += 32 * parts) top = fmaxf(top, row[n]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
    const float base = top == -INFINITY ? 0.0f : top;  // of no tokens, or of nothing but -inf
    for (int n = begin; n < tokens; n += 32 * parts) sum += exp2f(row[n] - base);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (lane == 0) statistics[count + i] = {top, sum};
  }
  __syncthreads();
  for (int h = threadIdx.x; h < count; h += blockDim.x) {
    const float2* const of_parts = statistics + count + h * parts;
    float top = -INFINITY, sum = 0.0f;
    for (int i = 0; i < parts; ++i) top = fmaxf(top, of_parts[i].x);
    for (int i = 0; i < parts; ++i) sum += of_parts[i].y * exp2f(of_parts[i].x - top);
    statistics[h] = {top, weight / sum};
  }
}

}  // namespace effcore::cuda::routing
