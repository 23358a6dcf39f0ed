// What the backward needs before it starts, a row of queries at a time:
//
//   delta = rowsum(dout * out) (+ the consumers' delta),   dq = 0 where no key is seen,   turns = 0
//
// and, where a product with kept probabilities takes dout from there, dout times the factors of their rows.
//
// Bound: dout and out are read once. A row is read by `lanes` neighbouring lanes, 16 bytes each; a thread asks for all of its
// rows before it adds up the first. A block has rows of one head.
#pragma once
#include "attention/visibility.cuh"

namespace effcore::cuda::attention {

constexpr int delta_threads = 256;
template <class T, int D>
constexpr int delta_lanes = D * static_cast<int>(sizeof(T)) / 16 < 32 ? D * static_cast<int>(sizeof(T)) / 16 : 32;
constexpr int delta_rows_a_thread = 4;
template <class T, int D>
constexpr int delta_rows = delta_threads / delta_lanes<T, D> * delta_rows_a_thread;  // of a block
template <class T, int D>
__host__ __device__ unsigned delta_blocks_a_head(const Shape& s) {
  return static_cast<unsigned>((s.queries + delta_rows<T, D> - 1) / delta_rows<T, D>);
}

template <class T, int D>
__global__ void __launch_bounds__(delta_threads) delta_kernel(const __grid_constant__ DeltaParams p) {
  constexpr int lanes = delta_lanes<T, D>, chunk = 16 / static_cast<int>(sizeof(T)), count = delta_rows_a_thread;
  const Shape& s = p.shape;
  if (p.turns != nullptr)
    for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(delta_threads) + threadIdx.x; i < p.turn_count;
         i += static_cast<std::int64_t>(gridDim.x) * delta_threads)
      p.turns[i] = 0;
  if (s.queries == 0 || s.heads == 0) return;

  const unsigned blocks = delta_blocks_a_head<T, D>(s);
  const int row_of_heads = static_cast<int>(blockIdx.x / blocks), batch = row_of_heads / s.heads, head = row_of_heads % s.heads;
  if (batch >= s.batch) return;
  const int lane = threadIdx.x % lanes;
  const auto query = [&](int i) {
    return static_cast<int>(blockIdx.x % blocks) * delta_rows<T, D> +
           (i * delta_threads + static_cast<int>(threadIdx.x)) / lanes;
  };
  const std::int64_t row0 = static_cast<std::int64_t>(row_of_heads) * s.queries;
  float sum[count] = {}, factor[count] = {};
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (query(i) >= s.queries) continue;
    if (lane == 0 && p.consumers_delta != nullptr) sum[i] = p.consumers_delta[row0 + query(i)];
    if (p.scaled != nullptr) factor[i] = p.factors[row0 + query(i)];
  }
  if (p.dout.aligned && p.out.aligned) {
    for (int column = lane * chunk; column < s.value_dim; column += lanes * chunk) {
      uint4 x[count], y[count];
#pragma unroll
      for (int i = 0; i < count; ++i) {
        x[i] = y[i] = make_uint4(0, 0, 0, 0);
        if (query(i) >= s.queries) continue;
        x[i] = *reinterpret_cast<const uint4*>(row_of<T>(p.dout, batch, head, query(i)) + column);
        y[i] = *reinterpret_cast<const uint4*>(row_of<T>(p.out, batch, head, query(i)) + column);
      }
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const T* const xs = reinterpret_cast<const T*>(&x[i]);
        const T* const ys = reinterpret_cast<const T*>(&y[i]);
#pragma unroll
        for (int e = 0; e < chunk; ++e) sum[i] = fmaf(to_float(xs[e]), to_float(ys[e]), sum[i]);
        if (p.scaled == nullptr || query(i) >= s.queries) continue;
        uint4 z;
        T* const zs = reinterpret_cast<T*>(&z);
#pragma unroll
        for (int e = 0; e < chunk; ++e) zs[e] = from_float<T>(to_float(xs[e]) * factor[i]);
        *reinterpret_cast<uint4*>(static_cast<T*>(p.scaled) + (row0 + query(i)) * s.value_dim + column) = z;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (query(i) >= s.queries) continue;
      const T* const a = row_of<T>(p.dout, batch, head, query(i));
      const T* const b = row_of<T>(p.out, batch, head, query(i));
      for (int column = lane; column < s.value_dim; column += lanes)
        sum[i] = fmaf(to_float(a[column]), to_float(b[column]), sum[i]);
      if (p.scaled == nullptr) continue;
      T* const scaled = static_cast<T*>(p.scaled) + (row0 + query(i)) * s.value_dim;
      for (int column = lane; column < s.value_dim; column += lanes)
        scaled[column] = from_float<T>(to_float(a[column]) * factor[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < count; ++i)
#pragma unroll
    for (int offset = lanes / 2; offset > 0; offset /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], offset);
  const Visibility seen(s, batch);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (query(i) >= s.queries) continue;
    if (lane == 0) p.delta[row0 + query(i)] = sum[i];
    if (p.turns == nullptr) continue;
    // Nobody else writes dq of a block of queries that meets no block of keys.
    const int first = query(i) / p.block_q * p.block_q;
    if (KeyRange(seen, first, min(first + p.block_q, s.queries) - 1).empty()) {
      T* const to = row_of<T>(p.dq, batch, head, query(i));
      for (int column = lane; column < s.head_dim; column += lanes) to[column] = from_float<T>(0.0f);
    }
  }
}

}  // namespace effcore::cuda::attention
