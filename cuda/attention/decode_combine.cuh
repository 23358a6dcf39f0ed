// Puts the splits of a decoding step together and turns the chunks' maxima into scales:
//
//   out = sum_s 2^(m_s - m) out_s / sum_s 2^(m_s - m) l_s,   scale of a chunk = 2^(its maximum - m) / sum,
//
// always in the order of the splits; zeros where no key is seen, and where all scores are -inf NaN, as 0 / 0 gives. On sm_90 up
// to max_cluster splits are a cluster of blocks, which read each other's results from shared memory: one launch, and no partial
// results in device memory. More splits, and older GPUs, take combine_kernel.
#pragma once
#include "attention/visibility.cuh"
#include "common/cluster.cuh"
#include "common/element.cuh"
#include "common/overlap.cuh"

namespace effcore::cuda::attention {

constexpr int max_cluster = 2;  // four are slower than two launches (H200: 269 against 253 us, 8192 keys, batch 32)

__device__ __forceinline__ float inverse_sum(const Shape& s, int batch, float sum) {
  return sum == 0.0f && !Visibility(s, batch).sees_keys(0) ? 0.0f : 1.0f / sum;
}

// By all blocks of a cluster, each a split: `out` [heads, D], `maxima` (in units of log2) and `sums` [heads] are its own, of
// its chunks [chunk0, chunk1). Each writes its share of the result, and its own chunks' scales. `factors` [splits, heads] is
// room.
template <class T, int D, bool from_probs>
__device__ __forceinline__ void combine_cluster(const DecodeParams& p, const float* out, const float* maxima, const float* sums,
                                                float* factors, int batch, int head0, int heads, int split, int chunk0,
                                                int chunk1) {
  const Shape& s = p.shape;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  float* const shifts = factors + max_cluster * decode_heads;  // [heads] the maximum, [heads] 1 / sum
  cluster_sync();
  if (!from_probs && thread < heads) {
    float maximum = -INFINITY, sum = 0.0f;
    for (int i = 0; i < p.splits; ++i) maximum = fmaxf(maximum, load_of_block(maxima + thread, i));
    if (maximum == -INFINITY) maximum = 0.0f;
    for (int i = 0; i < p.splits; ++i) {
      const float factor = exp2_approx(load_of_block(maxima + thread, i) - maximum);
      sum = fmaf(load_of_block(sums + thread, i), factor, sum);
      factors[i * decode_heads + thread] = factor;
    }
    shifts[thread] = maximum, shifts[decode_heads + thread] = inverse_sum(s, batch, sum);
  }
  __syncthreads();
  for (int i = split * threads + thread; i < heads * s.value_dim; i += p.splits * threads) {
    const int head = i / s.value_dim, column = i % s.value_dim;
    float x = 0.0f;
    for (int other = 0; other < p.splits; ++other)
      x = fmaf(load_of_block(out + head * D + column, other), from_probs ? 1.0f : factors[other * decode_heads + head], x);
    row_of<T>(p.out, batch, head0 + head, 0)[column] = from_float<T>(from_probs ? x : x * shifts[decode_heads + head]);
  }
  if (!from_probs && p.weights != nullptr) {
    const int chunks = chunk1 - chunk0, all_chunks = (s.keys + decode_chunk - 1) / decode_chunk;
    float* const scales = p.scales + (static_cast<std::int64_t>(batch) * s.heads + head0) * all_chunks + chunk0;
    for (int i = thread; i < heads * chunks; i += threads) {
      float& scale = scales[static_cast<std::int64_t>(i / chunks) * all_chunks + i % chunks];
      scale = exp2_approx(scale - shifts[i / chunks]) * shifts[decode_heads + i / chunks];
    }
  }
  if (p.splits > 1) cluster_sync();  // nobody leaves while others read what it has
}

// A block puts a row's splits together. Its warps take every fourth split each, lanes take columns; the warps' sums are added
// in their order. So a few loads of all lanes are on their way at once, and not a row of them one behind the other.
constexpr int combine_warps = 4, combine_threads = 32 * combine_warps;

template <class T, int D, bool from_probs>
__global__ void __launch_bounds__(combine_threads) combine_kernel(const __grid_constant__ DecodeParams p) {
  constexpr float infinity = INFINITY;
  extern __shared__ float factors[];  // [splits]
  __shared__ float sums[combine_warps][D];
  const Shape& s = p.shape;
  const std::int64_t row = blockIdx.x;
  const int batch = blockIdx.x / s.heads, head = blockIdx.x % s.heads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float maximum = -infinity, sum = 0.0f;
  wait_for_kernel_before();  // its launch overlaps the end of decode_kernel
  if constexpr (!from_probs) {
    const float2* statistics = p.statistics + row * p.splits;
    for (int i = lane; i < p.splits; i += 32) maximum = fmaxf(maximum, statistics[i].x);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, offset));
    if (maximum == -infinity) maximum = 0.0f;
    for (int i = lane; i < p.splits; i += 32) {
      const float2 split = statistics[i];
      const float factor = exp2_approx(split.x - maximum);
      sum = fmaf(split.y, factor, sum);
      if (warp == 0) factors[i] = factor;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    __syncthreads();
  }
  const float inverse = from_probs ? 1.0f : inverse_sum(s, batch, sum);
  float x[D / 32] = {};
#pragma unroll 4
  for (int i = warp; i < p.splits; i += combine_warps) {
    const float* partial = p.partial + (row * p.splits + i) * s.value_dim;
    const float factor = from_probs ? 1.0f : factors[i];
#pragma unroll
    for (int n = 0; n < D / 32; ++n) {
      const int column = 32 * n + lane;
      if (column < s.value_dim) x[n] = fmaf(partial[column], factor, x[n]);
    }
  }
#pragma unroll
  for (int n = 0; n < D / 32; ++n) sums[warp][32 * n + lane] = x[n];
  __syncthreads();
  for (int column = threadIdx.x; column < s.value_dim; column += combine_threads) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < combine_warps; ++w) total += sums[w][column];
    row_of<T>(p.out, batch, head, 0)[column] = from_float<T>(total * inverse);
  }
  if (!from_probs && p.weights != nullptr) {
    const int chunks = (s.keys + decode_chunk - 1) / decode_chunk;
    for (int i = threadIdx.x; i < chunks; i += combine_threads) {
      float& scale = p.scales[row * chunks + i];
      scale = exp2_approx(scale - maximum) * inverse;
    }
  }
}

}  // namespace effcore::cuda::attention
