// The gradient of a gather: dx[b, n] = sum of rows[b, i] over index[b, i] == n.
//
// Bound: memory; each row of dx is written once, as zeros, as a copy, or (where the list repeats a token) as a sum in float32.
// A warp takes a row of dx.
#include "effcore/cuda/routing.h"
#include "routing/inverse.cuh"
#include "routing/rows.cuh"

namespace effcore::cuda::routing {
namespace {

constexpr int threads = 256, warps = threads / 32;

struct ScatterParams {
  Rows rows, dx;
  const std::int32_t *first, *next;
  std::int64_t items;  // batch * tokens
  int tokens, size, bytes;
};

__device__ __forceinline__ void zero_row(char* to, int bytes, int lane) {
  const int head = min(static_cast<int>(-reinterpret_cast<std::uintptr_t>(to) & 15), bytes), chunks = (bytes - head) / 16;
  const int tail = head + chunks * 16;
  if (2 * lane < head) *reinterpret_cast<std::uint16_t*>(to + 2 * lane) = 0;
  if (tail + 2 * lane < bytes) *reinterpret_cast<std::uint16_t*>(to + tail + 2 * lane) = 0;
  for (int chunk = lane; chunk < chunks; chunk += 32) *reinterpret_cast<uint4*>(to + head + chunk * 16) = uint4{};
}

template <class T>
__global__ void __launch_bounds__(threads) scatter_kernel(const __grid_constant__ ScatterParams p) {
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * warps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (item >= p.items) return;
  const std::int64_t b = item / p.tokens;
  char* const to = p.dx(b, item - b * p.tokens);
  const std::int32_t i = p.first[item];
  if (i < 0) return zero_row(to, p.bytes, lane);
  const std::int32_t* next = p.next + b * p.size;
  if (next[i] < 0) return copy_row(to, source_of(p.rows, b, i), p.bytes, lane);
  for (int c = lane; c < p.bytes / static_cast<int>(sizeof(T)); c += 32) {
    float sum = 0.0f;
    for (std::int32_t j = i; j >= 0; j = next[j]) sum += to_float(reinterpret_cast<const T*>(p.rows(b, j))[c]);
    reinterpret_cast<T*>(to)[c] = from_float<T>(sum);
  }
}

}  // namespace

std::size_t workspace_bytes(const Scatter& args) {
  return inverse_bytes(args.dx.size[0], args.dx.size[1], args.list.index.size[1]);
}

void scatter(const Scatter& args, const Launch& to) {
  const char* f = "gather_tokens_bwd";
  const auto stream = static_cast<cudaStream_t>(to.stream);
  refuse_float64(args.dx.dtype, f);
  if (args.dx.size[0] * args.dx.size[1] * args.dx.size[2] == 0) return;
  const InverseParams inverse = invert(args.list.index, args.dx.size[1], to.workspace, f, stream);
  ScatterParams p{rows_of(args.list.rows), rows_of(args.dx), inverse.first, inverse.next};
  p.items = args.dx.size[0] * args.dx.size[1];
  p.tokens = inverse.tokens, p.size = inverse.size;
  p.bytes = static_cast<int>(args.dx.size[2] * element_bytes(args.dx.dtype));
  with_type(args.dx.dtype, f,
            [&]<class T>(T) { launch(f, scatter_kernel<T>, grid((p.items + warps - 1) / warps, f), threads, 0, stream, p); });
}

}  // namespace effcore::cuda::routing
