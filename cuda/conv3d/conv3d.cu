// The conv3d family's host side: shapes to parameters, and which configuration of a kernel serves them.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/path.h"
#include "conv3d/hopper/patches.h"
#include "conv3d/hopper/rows.h"
#include "conv3d/hopper/weights.h"
#include "conv3d/layouts.cuh"
#include "conv3d/rows.cuh"
#include "conv3d/weights.cuh"
#include "effcore/conv3d_taps.h"
#include "effcore/cuda/conv3d.h"

namespace effcore::cuda::conv3d {
namespace {

using effcore::conv3d::cross;
using effcore::conv3d::for_residues;
using effcore::conv3d::forward_taps;
using effcore::conv3d::Geometry;
using effcore::conv3d::mirrored_taps;
using effcore::conv3d::PlacedTap;
using effcore::conv3d::Tap;

// Warps compute 64 x 32 each. Three stages of 128 x 64 leave room for three blocks on a multiprocessor, of 128 x 128 for two.
template <class T>
using Wide = RowsConfig<T, 128, 128, 2, 4, 3>;
template <class T>
using Narrow = RowsConfig<T, 128, 64, 2, 2, 3>;
// float32 is there to be right; its tiles are half as deep.
using Plain = RowsConfig<float, 64, 64, 2, 2, 2>;

template <class T>
using Weights = WeightsConfig<T, 1, 2, 2, 4, 3>;
using PlainWeights = WeightsConfig<float, 2, 2, 2, 2, 2>;

// Blocks of a weight gradient: a constant, so that every device sums in the same order.
constexpr std::int64_t gradient_blocks = 528;

// That add its partial sums up, constant for the same reason.
constexpr std::int64_t reducing_threads = 132 * 1024;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

int element_size(DType dtype) {
  return dtype == DType::float32 ? 4 : 2;
}
int segment_of(DType dtype) {
  return 128 / element_size(dtype);
}

[[noreturn]] void refuse(const char* function, const char* reason) {
  throw std::invalid_argument(std::string("effcore.") + function + ": " + reason);
}

void check_taps(const char* function, std::size_t taps) {
  static_assert(max_taps == 128);
  if (taps > max_taps) refuse(function, "kernels of more than 128 taps are not supported on cuda");
}

// Calls body(T{}) with the element type of this dtype.
template <class Body>
void with_type(const char* function, DType dtype, const Body& body) {
  switch (dtype) {
    case DType::bfloat16: return body(bf16{});
#if !defined(EFFCORE_CUDA_SET_CI)
    case DType::float16: return body(fp16{});
    case DType::float32: return body(float{});
#endif
    default: refuse(function, "this library has no CUDA kernel for the dtype");
  }
}

bool aligned_16(const TensorView& voxels) {
  const std::int64_t piece = 16 / element_size(voxels.dtype);
  bool aligned = reinterpret_cast<std::uintptr_t>(voxels.data) % 16 == 0 && voxels.size[1] % piece == 0;
  for (const int d : {0, 2, 3, 4}) aligned = aligned && voxels.stride[d] % piece == 0;
  return aligned;
}

GatherParams gather_params(const char* function, const TensorView& from, const std::int64_t grid[3], const std::int64_t step[3],
                           const std::vector<PlacedTap>& taps) {
  check_taps(function, taps.size());
  const std::int64_t line = grid[2], frame = line * grid[1], plane = frame * from.size[0], rows = plane * grid[0];
  if (rows >= std::int64_t{1} << 31) refuse(function, "2^31 positions and more are not supported on cuda");
  GatherParams g{};
  g.data = from.data;
  constexpr int order[4] = {0, 2, 3, 4};
  for (int d = 0; d < 4; ++d) g.stride[d] = from.stride[order[d]];
  g.channels = static_cast<int>(from.size[1]);
  for (int d = 0; d < 3; ++d) {
    g.size[d] = static_cast<int>(from.size[2 + d]);
    g.step[d] = static_cast<int>(step[d]);
  }
  g.rows = static_cast<int>(rows);
  g.plane = Divider(std::max<std::int64_t>(plane, 1));
  g.frame = Divider(std::max<std::int64_t>(frame, 1));
  g.width = Divider(std::max<std::int64_t>(line, 1));
  g.aligned = aligned_16(from);
  g.taps = static_cast<int>(taps.size());
  for (std::size_t i = 0; i < taps.size(); ++i) {
    // Beyond 16 bits an offset lies outside of any tensor that has taps inside.
    const auto offset = [&](int d) {
      return static_cast<std::int16_t>(std::clamp<std::int64_t>(taps[i].place[d], -32768, 32767));
    };
    g.tap[i] = {offset(0), offset(1), offset(2), static_cast<std::int16_t>(taps[i].number)};
  }
  return g;
}

struct PackedSize {
  std::int64_t columns, channels, taps;
  std::size_t bytes;
};

PackedSize packed_size(const TensorView& spatial, const TensorView& temporal, int channel) {
  PackedSize size;
  size.columns = round_up(spatial.size[1 - channel], spatial.size[1 - channel] > 64 ? 128 : 64);
  size.channels = round_up(spatial.size[channel], segment_of(spatial.dtype));
  size.taps = spatial.size[2] * spatial.size[3] + temporal.size[2] - 1;
  size.bytes = static_cast<std::size_t>(size.columns * size.channels * size.taps * element_size(spatial.dtype));
  return size;
}

// Those of a product, and whether they have been packed into the workspace. Dimension `channel` is that of the voxels read.
struct Kernels {
  const TensorView &spatial, &temporal;
  int channel;
  std::vector<PlacedTap> taps;
  PackedSize size;
  bool packed = false;

  Kernels(const TensorView& spatial_kernel, const TensorView& temporal_kernel, int channel_dimension)
      : spatial(spatial_kernel),
        temporal(temporal_kernel),
        channel(channel_dimension),
        taps(cross(spatial, temporal)),
        size(packed_size(spatial, temporal, channel)) {}
};

void pack(const char* function, const Kernels& kernels, const Launch& launch) {
  const auto& [spatial, temporal, channel, taps, size, packed] = kernels;
  PackParams p{};
  check_taps(function, taps.size());
  p.spatial = spatial.data;
  p.temporal = temporal.data;
  p.spatial_column = spatial.stride[1 - channel], p.spatial_channel = spatial.stride[channel];
  p.temporal_column = temporal.stride[1 - channel], p.temporal_channel = temporal.stride[channel];
  p.columns = static_cast<int>(spatial.size[1 - channel]), p.channels = static_cast<int>(spatial.size[channel]);
  p.padded_columns = static_cast<int>(size.columns), p.padded_channels = static_cast<int>(size.channels);
  p.taps = static_cast<int>(taps.size());
  for (const PlacedTap& t : taps) {
    p.spatial_tap[t.number] = static_cast<int>(t.tap.spatial);
    p.temporal_tap[t.number] = static_cast<int>(t.tap.temporal);
  }
  p.packed = launch.workspace;
  const dim3 grid(static_cast<unsigned>(size.columns / pack_side * (size.channels / pack_side)),
                  static_cast<unsigned>(ceil_div(size.taps, pack_taps)));
  with_type(function, spatial.dtype, [&](auto zero) {
    launch_overlapping(function, pack_kernel<decltype(zero)>, grid, dim3(pack_side, pack_rows), 0,
                       static_cast<cudaStream_t>(launch.stream), p);
  });
}

template <class Params>
void launch_2d(const char* function, void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, const Launch& launch,
               const Params& params) {
  if (grid.x == 0 || grid.y == 0) return;
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), function);
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(launch.stream)>>>(params);
  check_launch(function);
}

template <class T, class Config>
void run_rows(const char* function, const RowsParams& p, const Launch& launch) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.gather.rows, Config::Rows)),
                  static_cast<unsigned>(ceil_div(p.columns, Config::Columns)));
  launch_2d(function, rows_kernel<T, Config>, grid, Config::threads, Config::shared_bytes, launch, p);
}

// Positions of `to` at origin + to_step * p, each from step * p + the taps' offsets in `from`.
struct RowsPlan {
  TensorView from, to;
  std::vector<PlacedTap> taps;
  std::int64_t grid[3], step[3], origin[3], to_step[3];
  const TensorView* bias = nullptr;
};

bool rows_on_hopper([[maybe_unused]] const char* function, [[maybe_unused]] const RowsPlan& plan,
                    [[maybe_unused]] const Kernels& kernels, [[maybe_unused]] const Launch& launch) {
#if defined(EFFCORE_HOPPER)
  if (!on_hopper(function)) return false;
  const PackedSize& size = kernels.size;
  hopper::RowsProblem problem{plan.from,       plan.to,          plan.taps,       {plan.step[0], plan.step[1], plan.step[2]},
                              kernels.spatial, kernels.temporal, kernels.channel, kernels.packed ? launch.workspace : nullptr,
                              size.columns,    size.channels,    size.taps,       plan.bias};
  TensorView& to = problem.to;  // the positions at origin + to_step * p alone
  std::int64_t origin = 0;
  for (int d = 0; d < 3; ++d) {
    origin += plan.origin[d] * to.stride[2 + d];
    to.size[2 + d] = plan.grid[d];
    to.stride[2 + d] *= plan.to_step[d];
  }
  to.data = static_cast<char*>(to.data) + origin * element_size(to.dtype);
  return hopper::rows(function, problem, launch);
#else
  return false;
#endif
}

void rows(const char* function, const RowsPlan& plan, Kernels& kernels, const Launch& launch) {
  if (rows_on_hopper(function, plan, kernels, launch)) return;
  if (!kernels.packed && !plan.taps.empty()) {
    pack(function, kernels, launch);
    kernels.packed = true;
    if (rows_on_hopper(function, plan, kernels, launch)) return;
  }
  const PackedSize& size = kernels.size;
  const TensorView& to = plan.to;
  const TensorView* const bias = plan.bias;
  RowsParams p{};
  p.gather = gather_params(function, plan.from, plan.grid, plan.step, plan.taps);
  p.packed = launch.workspace;
  p.padded_columns = static_cast<int>(size.columns), p.padded_channels = static_cast<int>(size.channels);
  if (bias != nullptr) p.bias = bias->data, p.bias_stride = bias->stride[0];
  p.out = to.data;
  constexpr int order[4] = {0, 2, 3, 4};
  for (int d = 0; d < 4; ++d) p.out_stride[d] = to.stride[order[d]];
  for (int d = 0; d < 3; ++d) p.origin[d] = static_cast<int>(plan.origin[d]), p.out_step[d] = static_cast<int>(plan.to_step[d]);
  p.columns = static_cast<int>(to.size[1]);
  p.out_aligned = aligned_16(to);
  with_type(function, to.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!is_16bit<T>)
      run_rows<T, Plain>(function, p, launch);
    else if (p.columns > 64)
      run_rows<T, Wide<T>>(function, p, launch);
    else
      run_rows<T, Narrow<T>>(function, p, launch);
  });
}

struct GradientPlan {
  int column_blocks, segments, segment_blocks, steps, splits, padded_columns, padded_depth;
};

template <class Config>
GradientPlan gradient_plan(std::int64_t rows, std::int64_t columns, std::int64_t channels, std::int64_t taps, int segment) {
  GradientPlan plan;
  plan.column_blocks = static_cast<int>(ceil_div(columns, Config::Columns));
  plan.segments = static_cast<int>(taps * ceil_div(channels, segment));
  plan.segment_blocks = static_cast<int>(ceil_div(plan.segments, Config::Segments));
  plan.steps = static_cast<int>(ceil_div(rows, Config::depth));
  plan.splits = static_cast<int>(std::clamp<std::int64_t>(
      gradient_blocks / (static_cast<std::int64_t>(plan.column_blocks) * plan.segment_blocks), 1, std::max(plan.steps, 1)));
  plan.padded_columns = plan.column_blocks * Config::Columns;
  plan.padded_depth = plan.segment_blocks * Config::Width;
  return plan;
}

GradientPlan gradient_plan(const BackwardWeight& args) {
  const std::int64_t* out = args.dout.size;
  const std::int64_t rows = out[0] * out[2] * out[3] * out[4];
  const std::int64_t taps = args.dspatial.size[2] * args.dspatial.size[3] + args.dtemporal.size[2] - 1;
  if (args.x.dtype == DType::float32)
    return gradient_plan<PlainWeights>(rows, out[1], args.x.size[1], taps, segment_of(args.x.dtype));
  return gradient_plan<Weights<bf16>>(rows, out[1], args.x.size[1], taps, segment_of(args.x.dtype));
}

#if defined(EFFCORE_HOPPER)
hopper::PartialSums hopper_sums(const BackwardWeight& args) {
  const std::int64_t* out = args.dout.size;
  const std::int64_t taps = args.dspatial.size[2] * args.dspatial.size[3] + args.dtemporal.size[2] - 1;
  return hopper::partial_sums(out[0] * out[2] * out[3] * out[4], out[1], args.x.size[1], taps);
}
#else
hopper::PartialSums hopper_sums(const BackwardWeight&) {
  return {};
}
#endif

// Partial sums into the workspace, and into `r` how they lie there.
bool sum_on_hopper([[maybe_unused]] const char* function, [[maybe_unused]] const BackwardWeight& args,
                   [[maybe_unused]] const std::vector<PlacedTap>& taps, [[maybe_unused]] ReduceParams& r,
                   [[maybe_unused]] const Launch& launch) {
#if defined(EFFCORE_HOPPER)
  if (!on_hopper(function)) return false;
  const hopper::PartialSums sums = hopper_sums(args);
  const std::int64_t* step = args.geometry.stride;
  r.splits = static_cast<int>(sums.splits), r.padded_columns = static_cast<int>(sums.columns);
  r.padded_depth = static_cast<int>(sums.taps * sums.channels);
  r.tiles = hopper::weights(function, {args.x, args.dout, forward_taps(taps, args.geometry), {step[0], step[1], step[2]}}, sums,
                            launch);
  return r.tiles;
#else
  return false;
#endif
}

void sum(const char* function, const BackwardWeight& args, const std::vector<PlacedTap>& taps, ReduceParams& r,
         const Launch& launch) {
  const GradientPlan plan = gradient_plan(args);
  WeightsParams p{};
  p.gather = gather_params(function, args.x, args.dout.size + 2, args.geometry.stride, forward_taps(taps, args.geometry));
  p.dout = args.dout.data;
  constexpr int order[4] = {0, 2, 3, 4};
  for (int d = 0; d < 4; ++d) p.dout_stride[d] = args.dout.stride[order[d]];
  p.columns = static_cast<int>(args.dout.size[1]);
  p.dout_aligned = aligned_16(args.dout);
  p.column_blocks = plan.column_blocks;
  p.segments = plan.segments;
  p.splits = plan.splits;
  p.steps = plan.steps;
  p.partial = static_cast<float*>(launch.workspace);
  r.splits = plan.splits, r.padded_columns = plan.padded_columns, r.padded_depth = plan.padded_depth;
  const dim3 grid(static_cast<unsigned>(plan.column_blocks * plan.segment_blocks), static_cast<unsigned>(plan.splits));
  with_type(function, args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (is_16bit<T>)
      launch_2d(function, weights_kernel<T, Weights<T>>, grid, Weights<T>::threads, Weights<T>::shared_bytes, launch, p);
    else
      launch_2d(function, weights_kernel<T, PlainWeights>, grid, PlainWeights::threads, PlainWeights::shared_bytes, launch, p);
  });
}

}  // namespace

std::size_t workspace_bytes(const Forward& args) {
  return packed_size(args.spatial, args.temporal, 1).bytes;
}
std::size_t workspace_bytes(const BackwardData& args) {
  return packed_size(args.spatial, args.temporal, 0).bytes;
}
std::size_t workspace_bytes(const BackwardWeight& args) {
  const GradientPlan plan = gradient_plan(args);
  const std::size_t portable = static_cast<std::size_t>(plan.splits) * plan.padded_columns * plan.padded_depth * sizeof(float);
  return std::max(portable, hopper_sums(args).bytes());
}

void forward(const Forward& args, const Launch& launch) {
  const char* f = "cross_conv3d";
  Kernels kernels(args.spatial, args.temporal, 1);
  RowsPlan plan{args.x, args.out, forward_taps(kernels.taps, args.geometry), {}, {}, {}, {}, args.bias};
  for (int d = 0; d < 3; ++d)
    plan.grid[d] = args.out.size[2 + d], plan.step[d] = args.geometry.stride[d], plan.origin[d] = 0, plan.to_step[d] = 1;
  rows(f, plan, kernels, launch);
}

void backward_data(const BackwardData& args, const Launch& launch) {
  const char* f = "cross_conv3d_bwd_data";
  Kernels kernels(args.spatial, args.temporal, 0);
  for_residues(args.dx.size + 2, args.geometry, [&](const std::int64_t residue[3]) {
    RowsPlan plan{args.dout, args.dx, mirrored_taps(kernels.taps, args.geometry, residue), {}, {}, {}, {}, nullptr};
    for (int d = 0; d < 3; ++d) {
      plan.grid[d] = ceil_div(args.dx.size[2 + d] - residue[d], args.geometry.stride[d]);
      plan.step[d] = 1, plan.origin[d] = residue[d], plan.to_step[d] = args.geometry.stride[d];
    }
    rows(f, plan, kernels, launch);
  });
}

void backward_weight(const BackwardWeight& args, const Launch& launch) {
  const char* f = "cross_conv3d_bwd_weight";
  const std::vector<PlacedTap> taps = cross(args.dspatial, args.dtemporal);
  check_taps(f, taps.size());
  ReduceParams r{};
  r.partial = static_cast<const float*>(launch.workspace);
  r.padded_channels = static_cast<int>(round_up(args.x.size[1], segment_of(args.x.dtype)));
  r.columns = static_cast<int>(args.dout.size[1]), r.channels = static_cast<int>(args.x.size[1]);
  r.taps = static_cast<int>(taps.size());
  r.spatial_column = args.dspatial.stride[0], r.spatial_channel = args.dspatial.stride[1];
  r.temporal_column = args.dtemporal.stride[0], r.temporal_channel = args.dtemporal.stride[1];
  for (const PlacedTap& t : taps) {
    r.spatial_tap[t.number] = static_cast<int>(t.tap.spatial);
    r.temporal_tap[t.number] = static_cast<int>(t.tap.temporal);
  }
  r.dspatial = args.dspatial.data;
  r.dtemporal = args.dtemporal.data;
  if (!sum_on_hopper(f, args, taps, r, launch)) sum(f, args, taps, r, launch);

  // More threads than four share the splits only where there would be few.
  const std::int64_t threads = std::int64_t{r.padded_depth} / 4 * r.padded_columns;
  r.parts = 1;
  while (4 * r.parts <= r.splits && r.parts < (4 * threads < reducing_threads ? 8 : 4)) r.parts *= 2;

  const dim3 blocks(static_cast<unsigned>(ceil_div(threads, reduce_threads / r.parts)));
  with_type(f, args.x.dtype, [&](auto zero) {
    launch_overlapping(f, reduce_kernel<decltype(zero)>, blocks, reduce_threads, 0, static_cast<cudaStream_t>(launch.stream),
                       r);
  });
}

void patches(const Patches& args, const Launch& launch) {
  const char* f = "patch_embed3d";
#if defined(EFFCORE_HOPPER)
  if (on_hopper(f) && hopper::patches(f, args, launch)) return;
#endif
  static_cast<void>(args), static_cast<void>(launch);
  refuse(f, "no CUDA kernel serves these arguments (cuda/conv3d.h says which one does)");
}

const char* path(DType dtype) {
#ifdef EFFCORE_CUDA_SET_CI
  if (dtype != DType::bfloat16) return "none: built with EFFCORE_CUDA_SET=ci";
#endif
  return product_path(dtype);
}

}  // namespace effcore::cuda::conv3d
