// Tiles and launches of patches.
#include <algorithm>

#include "common/tensor_map.h"
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
  launch_overlapping(function, kernel, static_cast<unsigned>(std::min(p.tiles * p.pairs, clusters) * patch_blocks),
                     patch_threads, bytes, static_cast<cudaStream_t>(launch.stream), p);
}

CUtensorMapDataType element_of(const TensorView& t) {
  return t.dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}
CUtensorMapSwizzle swizzle_of(int elements) {
  return elements == 16 ? CU_TENSOR_MAP_SWIZZLE_32B : CU_TENSOR_MAP_SWIZZLE_64B;
}

// From the driver, as tensor_map_encoder().
auto im2col_map_encoder() {
  using Encode = decltype(&cuTensorMapEncodeIm2col);
  static const Encode function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeIm2col", &entry, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  return function;
}

// From a patch's first voxel to its last, in elements of the clip. Coordinates of the copy engine are 32 bits wide.
std::int64_t voxels_of(const TensorView& x, const std::int64_t* kernel) {
  std::int64_t voxels = 1;
  for (int d = 1; d < 5; ++d) voxels += (d == 1 ? x.size[1] - 1 : kernel[d - 2] - 1) * x.stride[d];
  return voxels;
}

// Pieces of patches' lines. "Channels" are all voxels from a patch's first to its last.
bool encode_patches(CUtensorMap* map, const TensorView& x, const std::int64_t* kernel, const std::int64_t* grid, int piece,
                    int rows) {
  const auto encode = im2col_map_encoder();
  if (encode == nullptr) return false;
  const auto bytes = [&](std::int64_t elements) { return static_cast<cuuint64_t>(2 * elements); };
  const cuuint64_t size[5] = {static_cast<cuuint64_t>(voxels_of(x, kernel)), static_cast<cuuint64_t>(grid[2]),
                              static_cast<cuuint64_t>(grid[1]), static_cast<cuuint64_t>(grid[0]),
                              static_cast<cuuint64_t>(x.size[0])};
  const cuuint64_t stride[4] = {bytes(kernel[2]), bytes(kernel[1] * x.stride[3]), bytes(kernel[0] * x.stride[2]),
                                bytes(x.stride[0])};
  constexpr int corner[3] = {};
  constexpr cuuint32_t step[5] = {1, 1, 1, 1, 1};
  return encode(map, element_of(x), 5, const_cast<void*>(x.data), size, stride, corner, corner, static_cast<cuuint32_t>(piece),
                static_cast<cuuint32_t>(rows), step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(piece),
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Steps of panels of weights.
bool encode_weight(CUtensorMap* map, const TensorView& weight, std::int64_t depth, int panel) {
  const auto encode = tensor_map_encoder();
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(depth), static_cast<cuuint64_t>(weight.size[0])};
  const cuuint64_t stride[1] = {size[0] * 2};
  const cuuint32_t box[2] = {patch_depth, static_cast<cuuint32_t>(panel)};
  constexpr cuuint32_t step[2] = {1, 1};
  return encode != nullptr && encode(map, element_of(weight), 2, const_cast<void*>(weight.data), size, stride, box, step,
                                     CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(patch_depth), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

bool patches(const char* function, const Patches& args, const Launch& launch) {
  const TensorView &x = args.x, &out = args.out;
  if (x.dtype != DType::bfloat16 && x.dtype != DType::float16) return false;
  const std::int64_t *kernel = args.weight.size + 2, *grid = out.size + 2, columns = out.size[1];
  const std::int64_t depth = x.size[1] * kernel[0] * kernel[1] * kernel[2];
  if (kernel[2] % 16 != 0 || depth % patch_depth != 0 || columns % 8 != 0) return false;
  const std::int64_t rows = x.size[0] * grid[0] * grid[1] * grid[2];
  if (x.stride[4] != 1 || rows >= std::int64_t{1} << 30 || columns >= 1 << 20) return false;
  for (int d = 0; d < 4; ++d)
    if (x.size[d] > 1 && (x.stride[d] <= 0 || x.stride[d] % 8 != 0)) return false;
  if (reinterpret_cast<std::uintptr_t>(x.data) % 16 != 0 || voxels_of(x, kernel) > std::int64_t{1} << 31) return false;
  if (args.bias != nullptr && (args.bias->stride[0] != 1 || reinterpret_cast<std::uintptr_t>(args.bias->data) % 4 != 0))
    return false;
  if (rows == 0) return true;

  // The fewer columns beyond the last one; among equals the wider panels, which read the patches less often.
  const auto padded = [&](std::int64_t panel) { return ceil_div(columns, patch_blocks * panel) * patch_blocks * panel; };
  const int panel = padded(192) <= padded(128) ? 192 : 128;
  const int piece = kernel[2] % 32 == 0 ? 32 : 16;
  PatchesParams p{};
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)}, stride[1] = {size[0] * 2};
  const cuuint32_t box[2] = {out_box, out_box};
  if (!encode_weight(&p.weight, args.weight, depth, panel) ||
      !encode_tensor_map(&p.out, x.dtype, out.data, size, stride, box) ||
      !encode_patches(&p.x, x, kernel, grid, piece, patch_rows / patch_blocks))
    return false;
  p.line = Divider(grid[2]), p.frame = Divider(grid[1] * grid[2]), p.volume = Divider(grid[0] * grid[1] * grid[2]);
  p.columns = static_cast<int>(columns);
  p.tiles = static_cast<int>(ceil_div(rows, patch_rows)), p.pairs = static_cast<int>(padded(panel) / (patch_blocks * panel));
  p.steps = static_cast<int>(depth / patch_depth), p.piece = piece;
  for (int d = 0; d < 3; ++d) p.kernel[d] = static_cast<int>(d < 2 ? kernel[d] : kernel[2] / piece);
  p.step_c = static_cast<int>(x.stride[1]), p.step_t = static_cast<int>(x.stride[2]), p.step_h = static_cast<int>(x.stride[3]);
  if (args.bias != nullptr) p.bias = args.bias->data;
  const auto run_as = [&](auto zero) {
    using T = decltype(zero);
    return panel == 192 ? run<T, 192>(function, p, launch) : run<T, 128>(function, p, launch);
  };
  if (x.dtype == DType::bfloat16) return run_as(bf16{}), true;
#if !defined(EFFCORE_CUDA_SET_CI)
  return run_as(fp16{}), true;
#else
  return false;
#endif
}

}  // namespace effcore::cuda::conv3d::hopper
