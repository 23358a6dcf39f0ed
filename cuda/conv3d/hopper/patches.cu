// Tiles and launches of patches.
#include <algorithm>

#include "common/tensor_map.h"
#include "conv3d/hopper/dispatch.h"
#include "conv3d/hopper/patches.cuh"
#include "conv3d/hopper/patches.h"

namespace effcore::cuda::conv3d::hopper {
namespace {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

template <class T, int Columns>
void run(const char* function, const PatchesParams& p, const Launch& launch) {
  const auto kernel = conv3d_patches_kernel<T, Columns>;
  constexpr int bytes = sizeof(PatchesMemory<Columns>);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), function);
  const int clusters = device_attribute(cudaDevAttrMultiProcessorCount, function) / patch_blocks;
  launch_overlapping(function, kernel, static_cast<unsigned>(std::min(p.pairs * p.panels, clusters) * patch_blocks),
                     patch_threads, bytes, static_cast<cudaStream_t>(launch.stream), p);
}

// From the first voxel of a group of patches to its last, in elements of the clip. Coordinates of the copy engine are 32 bits
// wide.
std::int64_t voxels_of(const TensorView& x, const std::int64_t* kernel, std::int64_t group) {
  std::int64_t voxels = 1 + (group - 1) * kernel[2];
  for (int d = 1; d < 5; ++d) voxels += (d == 1 ? x.size[1] - 1 : kernel[d - 2] - 1) * x.stride[d];
  return voxels;
}

// Pieces of lines of groups of patches. "Channels" are all voxels of a group.
bool encode_patches(CUtensorMap* map, const TensorView& x, const std::int64_t* kernel, const std::int64_t* grid, int group,
                    int piece) {
  const cuuint64_t size[5] = {static_cast<cuuint64_t>(voxels_of(x, kernel, group)), static_cast<cuuint64_t>(grid[2] / group),
                              static_cast<cuuint64_t>(grid[1]), static_cast<cuuint64_t>(grid[0]),
                              static_cast<cuuint64_t>(x.size[0])};
  const std::int64_t elements[4] = {group * kernel[2], kernel[1] * x.stride[3], kernel[0] * x.stride[2], x.stride[0]};
  cuuint64_t stride[4];  // bytes; where there is one position it may be anything, but the encoder takes multiples of 16 alone
  for (int d = 0; d < 4; ++d) stride[d] = size[d + 1] > 1 ? static_cast<cuuint64_t>(2 * elements[d]) : 16;
  return encode_im2col_map(map, x.dtype, x.data, size, stride, group * piece, patch_rows / group);
}

// Steps of panels of weights.
bool encode_weight(CUtensorMap* map, const TensorView& weight, std::int64_t depth, int panel) {
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(depth), static_cast<cuuint64_t>(weight.size[0])},
                   stride[1] = {size[0] * 2};
  const cuuint32_t box[2] = {patch_depth, static_cast<cuuint32_t>(panel)};
  return encode_tensor_map(map, weight.dtype, weight.data, size, stride, box);
}

}  // namespace

bool patches(const char* function, const Patches& args, const Launch& launch) {
  const TensorView &x = args.x, &out = args.out;
  if (x.dtype != DType::bfloat16 && x.dtype != DType::float16) return false;
  const std::int64_t *kernel = args.weight.size + 2, *grid = out.size + 2, columns = out.size[1];
  const std::int64_t depth = x.size[1] * kernel[0] * kernel[1] * kernel[2];
  if (kernel[2] % 16 != 0 || columns % 8 != 0) return false;
  const std::int64_t rows = x.size[0] * grid[0] * grid[1] * grid[2];
  if (x.stride[4] != 1 || rows >= std::int64_t{1} << 30 || columns >= 1 << 20) return false;
  for (int d = 0; d < 4; ++d)
    if (x.size[d] > 1 && (x.stride[d] <= 0 || x.stride[d] % 8 != 0)) return false;
  const int piece = kernel[2] % 64 == 0 ? 64 : kernel[2] % 32 == 0 ? 32 : 16;
  int group = 4;
  while (group > 1 && (grid[2] % group != 0 || kernel[2] != piece || group * piece > 64)) group /= 2;
  if (reinterpret_cast<std::uintptr_t>(x.data) % 16 != 0 || voxels_of(x, kernel, group) >= std::int64_t{1} << 31) return false;
  if (args.bias != nullptr && (args.bias->stride[0] != 1 || reinterpret_cast<std::uintptr_t>(args.bias->data) % 4 != 0))
    return false;
  if (rows == 0) return true;

  // The fewer columns beyond the last one; among equals the wider panels, which read the patches less often.
  const auto panels = [&](std::int64_t panel) { return ceil_div(columns, panel); };
  const int panel = panels(192) * 192 <= panels(128) * 128 ? 192 : 128;
  PatchesParams p{};
  const cuuint64_t size[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(group),
                              static_cast<cuuint64_t>(rows / group)},
                   stride[2] = {size[0] * 2, size[0] * size[1] * 2};
  const cuuint32_t box[3] = {out_box, 1, out_box};
  if (!encode_weight(&p.weight, args.weight, depth, panel / patch_blocks) ||
      !encode_tensor_map(&p.out, x.dtype, out.data, size, stride, box) || !encode_patches(&p.x, x, kernel, grid, group, piece))
    return false;
  const std::int64_t line = grid[2] / group;
  p.line = Divider(line), p.frame = Divider(grid[1] * line), p.volume = Divider(grid[0] * grid[1] * line);
  p.columns = static_cast<int>(columns);
  p.pairs = static_cast<int>(ceil_div(rows, patch_rows * patch_blocks)), p.panels = static_cast<int>(panels(panel));
  p.steps = static_cast<int>(ceil_div(depth, patch_depth)), p.group = group, p.piece = piece;
  for (int d = 0; d < 3; ++d) p.kernel[d] = static_cast<int>(d < 2 ? kernel[d] : kernel[2] / piece);
  p.step_c = static_cast<int>(x.stride[1]), p.step_t = static_cast<int>(x.stride[2]), p.step_h = static_cast<int>(x.stride[3]);
  p.channels = static_cast<int>(x.size[1]), p.end = static_cast<int>(voxels_of(x, kernel, group));
  if (args.bias != nullptr) p.bias = args.bias->data;
  return run_16bit(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    panel == 192 ? run<T, 192>(function, p, launch) : run<T, 128>(function, p, launch);
    return true;
  });
}

}  // namespace effcore::cuda::conv3d::hopper
