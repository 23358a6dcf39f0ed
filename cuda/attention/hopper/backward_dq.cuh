// dq of the owner's backward: where its sums stand, and how they become dq.
#pragma once
#include "attention/hopper/backward_tiles.cuh"

namespace effcore::cuda::hopper {

// A block's dq [queries x D] is two halves of 64 rows or, at D = 128, of 64 columns, each in the order of a warpgroup's
// accumulators: piece n of 8 stands n * 128 float4 on. This thread's first piece.
template <int dq_elements>
__device__ __forceinline__ float4* sums_of(float* dq_sums, int slot, int warpgroup) {
  return reinterpret_cast<float4*>(dq_sums + static_cast<std::int64_t>(slot) * dq_elements) + warpgroup * (dq_elements / 8) +
         threadIdx.x % 128;
}

// Scales and rounds a warpgroup's half, whose pieces piece(n) gives.
template <class T, int D, int queries, class Piece>
__device__ __forceinline__ void store_dq(const Shape& s, const Tensor4& dq, int slot, int query0, int warpgroup,
                                         Piece&& piece) {
  const float scale = s.negative ? -s.scale : s.scale;
  const int query_blocks = (s.queries + queries - 1) / queries, row = slot / query_blocks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int query = query0 + (queries == 128 ? 64 * warpgroup : 0) + 16 * warp + lane / 4;
  const int column0 = (D == 128 ? 64 * warpgroup : 0) + 2 * (lane % 4);
  T* const to = attention::row_of<T>(dq, row / s.heads, row % s.heads, query);
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float4 x = piece(n);
    if (query < s.queries) store_pair(to, column0 + 8 * n, D, dq.paired, x.x * scale, x.y * scale);
    if (query + 8 < s.queries) store_pair(to + 8 * dq.stride[2], column0 + 8 * n, D, dq.paired, x.z * scale, x.w * scale);
  }
}

struct RoundParams {
  Shape shape;
  Tensor4 dq;
  float* dq_sums;
};

constexpr int round_threads = 256;

// dq from its sums, where no consumer does it (backward.cuh): a block of threads for a block of queries. Bound: sums are read
// and dq is written once. Queries that see no key have no sums, and got their zeros before.
template <class T, int D, int queries, int keys>
__global__ void __launch_bounds__(round_threads) round_dq_kernel(const __grid_constant__ RoundParams p) {
  const Shape& s = p.shape;
  const int query_blocks = (s.queries + queries - 1) / queries;
  const int slot = static_cast<int>(blockIdx.x), row = slot / query_blocks, block = slot % query_blocks;
  const Visibility seen(s, row / s.heads);
  const attention::KeyBlocks met(seen, s.queries, block, queries, keys);
  if (met.last < met.first) return;
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  const float4* const sums = sums_of<queries * D>(p.dq_sums, slot, warpgroup);
  store_dq<T, D, queries>(s, p.dq, slot, block * queries, warpgroup, [&](int n) { return __ldcs(sums + n * 128); });
}

}  // namespace effcore::cuda::hopper
