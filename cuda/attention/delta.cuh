// What the backward needs before it starts, a row of queries at a time:
//
//   delta = rowsum(dout * out) (+ the consumers' delta),   dq = 0 where no key is seen,   turns = 0
//
// and, where a product with kept probabilities takes dout from there, dout times the factors of their rows.
//
// Bound: dout and out are read once. A row is read by `lanes` neighbouring lanes, 16 bytes each.
#pragma once
#include "attention/visibility.cuh"

namespace effcore::cuda::attention {

constexpr int delta_threads = 256;
template <class T, int D>
constexpr int delta_lanes = D * static_cast<int>(sizeof(T)) / 16 < 32 ? D * static_cast<int>(sizeof(T)) / 16 : 32;
template <class T, int D>
constexpr int delta_rows = delta_threads / delta_lanes<T, D>;

template <class T, int D>
__global__ void __launch_bounds__(delta_threads) delta_kernel(const __grid_constant__ DeltaParams p) {
  constexpr int lanes = delta_lanes<T, D>, chunk = 16 / static_cast<int>(sizeof(T));
  const Shape& s = p.shape;
  if (p.turns != nullptr)
    for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(delta_threads) + threadIdx.x; i < p.turn_count;
         i += static_cast<std::int64_t>(gridDim.x) * delta_threads)
      p.turns[i] = 0;

  const std::int64_t row = blockIdx.x * static_cast<std::int64_t>(delta_rows<T, D>) + threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes;
  const bool exists = row < static_cast<std::int64_t>(s.batch) * s.heads * s.queries;
  const int query = exists ? static_cast<int>(row % s.queries) : 0;
  const int head = exists ? static_cast<int>(row / s.queries % s.heads) : 0;
  const int batch = exists ? static_cast<int>(row / s.queries / s.heads) : 0;
  float sum = 0.0f;
  const float factor = p.scaled != nullptr && exists ? p.factors[row] : 0.0f;
  if (exists) {
    T* const scaled = p.scaled != nullptr ? static_cast<T*>(p.scaled) + row * s.value_dim : nullptr;
    const T* a = row_of<T>(p.dout, batch, head, query);
    const T* b = row_of<T>(p.out, batch, head, query);
    if (p.dout.aligned && p.out.aligned) {
      for (int column = lane * chunk; column < s.value_dim; column += lanes * chunk) {
        const uint4 x = *reinterpret_cast<const uint4*>(a + column), y = *reinterpret_cast<const uint4*>(b + column);
        const T* xs = reinterpret_cast<const T*>(&x);
        const T* ys = reinterpret_cast<const T*>(&y);
#pragma unroll
        for (int i = 0; i < chunk; ++i) sum = fmaf(to_float(xs[i]), to_float(ys[i]), sum);
        if (scaled != nullptr) {
          uint4 z;
          T* const zs = reinterpret_cast<T*>(&z);
#pragma unroll
          for (int i = 0; i < chunk; ++i) zs[i] = from_float<T>(to_float(xs[i]) * factor);
          *reinterpret_cast<uint4*>(scaled + column) = z;
        }
      }
    } else {
      for (int column = lane; column < s.value_dim; column += lanes) {
        sum = fmaf(to_float(a[column]), to_float(b[column]), sum);
        if (scaled != nullptr) scaled[column] = from_float<T>(to_float(a[column]) * factor);
      }
    }
  }
#pragma unroll
  for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (!exists) return;
  if (lane == 0) p.delta[row] = sum + (p.consumers_delta != nullptr ? p.consumers_delta[row] : 0.0f);

  if (p.turns != nullptr) {  // nobody else writes dq of a block of queries that meets no block of keys
    const int first = query / p.block_q * p.block_q;
    if (KeyRange(Visibility(s, batch), first, min(first + p.block_q, s.queries) - 1).empty()) {
      T* to = row_of<T>(p.dq, batch, head, query);
      for (int column = lane; column < s.head_dim; column += lanes) to[column] = from_float<T>(0.0f);
    }
  }
}

}  // namespace effcore::cuda::attention
