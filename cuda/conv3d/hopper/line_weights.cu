// Where the weights of products of whole lines lie.
#include "common/tensor_map.h"
#include "conv3d/hopper/lines.h"

namespace effcore::cuda::conv3d::hopper {
namespace {

// Kernels [rows, inside, taps] whose second dimension lies inside, as the copy engine sees them: boxes of 64 x 1 x `box_rows`.
bool encode_kernels(CUtensorMap* map, DType dtype, const void* data, std::int64_t inside, std::int64_t taps, std::int64_t rows,
                    std::int64_t tap_stride, std::int64_t row_stride, int box_rows) {
  if (reinterpret_cast<std::uintptr_t>(data) % 16 != 0 || tap_stride % 8 != 0 || row_stride % 8 != 0) return false;
  const cuuint64_t size[3] = {static_cast<cuuint64_t>(inside), static_cast<cuuint64_t>(taps), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[2] = {static_cast<cuuint64_t>(tap_stride * 2), static_cast<cuuint64_t>(row_stride * 2)};
  const cuuint32_t box[3] = {64, 1, static_cast<cuuint32_t>(box_rows)};
  return encode_tensor_map(map, dtype, data, size, stride, box);
}

// Between the taps of a kernel [O, C, ...] with channels inside; 0 where it has another layout.
std::int64_t tap_stride(const TensorView& kernel, int dims) {
  const std::int64_t height = dims == 4 ? kernel.size[2] : 1, width = kernel.size[dims - 1];
  if (kernel.stride[1] != 1) return 0;
  if (width == 1) return height == 1 ? kernel.size[1] : kernel.stride[2];
  return height == 1 || kernel.stride[2] == width * kernel.stride[dims - 1] ? kernel.stride[dims - 1] : 0;
}

}  // namespace

bool transposed(const RowsProblem& problem) {
  return problem.packed == nullptr && problem.channel == 0;
}

bool encode_weights(CUtensorMap maps[2], const RowsProblem& problem, int rows) {
  const DType dtype = problem.from.dtype;
  if (problem.packed != nullptr)
    return encode_kernels(&maps[0], dtype, problem.packed, problem.padded_channels, problem.packed_taps, problem.padded_columns,
                          problem.padded_columns * problem.padded_channels, problem.padded_channels, rows);
  const TensorView &spatial = problem.spatial, &temporal = problem.temporal;
  const std::int64_t between[2] = {tap_stride(spatial, 4), tap_stride(temporal, 3)};
  return between[0] != 0 && between[1] != 0 &&
         encode_kernels(&maps[0], dtype, spatial.data, spatial.size[1], spatial.size[2] * spatial.size[3], spatial.size[0],
                        between[0], spatial.stride[0], rows) &&
         encode_kernels(&maps[1], dtype, temporal.data, temporal.size[1], temporal.size[2], temporal.size[0], between[1],
                        temporal.stride[0], rows);
}

PlaceOfWeights place_of_weights(const RowsProblem& problem, const effcore::conv3d::PlacedTap& tap) {
  if (problem.packed != nullptr) return {0, static_cast<std::int16_t>(tap.number), -1};
  const auto number = [](std::int64_t offset, std::int64_t between) { return static_cast<std::int16_t>(offset / between); };
  const std::int16_t along =
      tap.tap.temporal < 0 ? std::int16_t{-1} : number(tap.tap.temporal, tap_stride(problem.temporal, 3));
  if (tap.tap.spatial < 0) return {1, along, -1};
  return {0, number(tap.tap.spatial, tap_stride(problem.spatial, 4)), along};
}

}  // namespace effcore::cuda::conv3d::hopper
