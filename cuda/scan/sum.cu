// Sums of the blocks' parts of a parameter's gradient, in order and in double precision: to[c, k] = sum over rows of
// partial[row][k][c].
// Bound: bytes, each part read once. A warp reads neighbouring channels; a block's warps take every eighth row.
#include "scan/common.cuh"

namespace effcore::cuda::scan {
namespace {

constexpr int warps = 8;

struct SumParams {
  float* to;
  const float* partial;
  int rows, columns;
  std::int64_t row_stride, channels;
};

__global__ void __launch_bounds__(32 * warps) sum_kernel(const __grid_constant__ SumParams p) {
  __shared__ double parts[warps][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t k = blockIdx.x % p.columns, c = std::int64_t{blockIdx.x / p.columns} * 32 + lane;
  double sum = 0.0;
  if (c < p.channels)
    for (int r = warp; r < p.rows; r += warps) sum += p.partial[r * p.row_stride + k * p.channels + c];
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= p.channels) return;
  for (int w = 1; w < warps; ++w) sum += parts[w][lane];
  p.to[c * p.columns + k] = static_cast<float>(sum);
}

}  // namespace

void sum_parameters(const char* function, float* to, const float* partial, int rows, std::int64_t row_stride,
                    std::int64_t channels, int columns, cudaStream_t stream) {
  if (to == nullptr || channels == 0) return;
  launch(function, sum_kernel, grid(ceil_div(channels, 32) * columns, function), 32 * warps, 0, stream,
         SumParams{to, partial, rows, columns, row_stride, channels});
}

}  // namespace effcore::cuda::scan
