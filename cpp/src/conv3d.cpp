// The cross-shaped convolution on the CPU: which taps there are, and how the work is cut into tasks. The arithmetic is in isa/.
#include "effcore/conv3d.h"

#include <algorithm>
#include <array>
#include <vector>

#include "conv3d_kernels.h"
#include "effcore/cpu.h"
#include "scratch.h"
#include "tasks.h"

namespace effcore::conv3d {
namespace {

const Kernels& kernels_for(DType dtype) {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::amx: return dtype == DType::bfloat16 ? amx::kernels(dtype) : v4::kernels(dtype);
    case Isa::v4: return v4::kernels(dtype);
    case Isa::v3: return v3::kernels(dtype);
    default: break;
  }
#endif
  return v2::kernels(dtype);
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

// Rows of a block: enough that weights read from the second-level cache cost little, few enough that the block stays in it.
constexpr std::int64_t block_rows = 384;
// Tasks of a weight gradient: a constant, so that the order of summation does not depend on the number of threads.
constexpr std::int64_t gradient_tasks = 32;

std::int64_t element_size(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// A tap of the kernel at place (t, h, w) of the dense one.
struct PlacedTap {
  std::int64_t place[3];
  Tap tap;
};

std::vector<PlacedTap> cross(const TensorView& spatial, const TensorView& temporal) {
  const std::int64_t kt = temporal.size[2], kh = spatial.size[2], kw = spatial.size[3];
  std::vector<PlacedTap> taps;
  for (std::int64_t l = 0; l < kt; ++l)
    if (l != kt / 2)
      taps.push_back({{l, kh / 2, kw / 2}, {-1, l * temporal.stride[2]}});
    else
      for (std::int64_t i = 0; i < kh; ++i)
        for (std::int64_t j = 0; j < kw; ++j)
          taps.push_back({{l, i, j},
                          {i * spatial.stride[2] + j * spatial.stride[3],
                           i == kh / 2 && j == kw / 2 ? l * temporal.stride[2] : std::int64_t{-1}}});
  return taps;
}

// Taps and the runs that they form. `dense`: the gathered tensor's neighbours along w lie on end in memory.
struct Taps {
  std::vector<Tap> taps;
  std::vector<Run> runs;

  void add(const std::array<std::int64_t, 3>& offset, const Tap& tap, bool dense) {
    taps.push_back(tap);
    if (dense && !runs.empty()) {
      Run& last = runs.back();
      if (last.offset[0] == offset[0] && last.offset[1] == offset[1] && last.offset[2] + last.taps == offset[2]) {
        ++last.taps;
        return;
      }
    }
    runs.push_back({{offset[0], offset[1], offset[2]}, 1});
  }
  void attach(Gather& gather) const {
    gather.runs = runs.data();
    gather.run_count = static_cast<std::int64_t>(runs.size());
    gather.taps = static_cast<std::int64_t>(taps.size());
  }
};

bool dense_along_w(const TensorView& voxels) {
  return voxels.stride[4] == voxels.size[1];
}

Taps forward_taps(const TensorView& x, const TensorView& spatial, const TensorView& temporal, const Geometry& g) {
  Taps taps;
  for (const PlacedTap& t : cross(spatial, temporal))
    taps.add({t.place[0] - g.padding[0], t.place[1] - g.padding[1], t.place[2] - g.padding[2]}, t.tap, dense_along_w(x));
  return taps;
}

Gather gather_input(const TensorView& x, const Geometry& g, const std::int64_t grid[3], const Taps& taps) {
  Gather gather{x, {grid[0], grid[1], grid[2]}, {g.stride[0], g.stride[1], g.stride[2]}};
  taps.attach(gather);
  return gather;
}

// Packs the kernels of these taps into scratch memory and computes the rows.
void run_rows(RowsJob& job, const Taps& taps, const TensorView& spatial, const TensorView& temporal, int channel,
              const Threads& threads) {
  const Kernels& kernels = kernels_for(job.to.dtype);
  const std::int64_t channels = spatial.size[channel], columns = spatial.size[1 - channel];
  const std::int64_t depth = job.gather.taps * channels;
  const std::int64_t plane = job.gather.from.size[0] * job.gather.grid[1] * job.gather.grid[2];
  if (plane == 0 || job.gather.grid[0] == 0) return;

  const std::int64_t rows_bytes = round_up(depth * columns * element_size(job.to.dtype), 64);
  char* const memory =
      static_cast<char*>(scratch::get(scratch::Slot::shared, rows_bytes + kernels.packed_bytes(depth, columns)));
  WeightsJob weights{spatial, temporal, taps.taps.data(), job.gather.taps, channel, memory, memory + rows_bytes};
  if (depth > 0) {
    run_tasks(threads, ceil_div(channels, weight_channels), [&](std::int64_t task) { kernels.arrange(weights, task); });
    run_tasks(threads, ceil_div(depth, pack_depth), [&](std::int64_t task) { kernels.pack(weights, task); });
  }
  job.packed = weights.packed;
  job.block_rows = round_up(ceil_div(plane, ceil_div(plane, block_rows)), kernels.row_multiple);
  job.blocks = ceil_div(plane, job.block_rows);
  run_tasks(threads, job.gather.grid[0] * job.blocks, [&](std::int64_t task) { kernels.rows(job, task); });
}

}  // namespace

void forward(const Forward& args, const Threads& threads) {
  const Taps taps = forward_taps(args.x, args.spatial, args.temporal, args.geometry);
  RowsJob job;
  job.gather = gather_input(args.x, args.geometry, args.out.size + 2, taps);
  job.bias = args.bias;
  job.to = args.out;
  run_rows(job, taps, args.spatial, args.temporal, 1, threads);
}

// Position i of x reads from output (i + padding - place) / stride, where that is whole: for the positions residue + stride * p
// the taps with (residue + padding - place) divisible by the stride, at p + (residue + padding - place) / stride.
void backward_data(const BackwardData& args, const Threads& threads) {
  const std::int64_t *stride = args.geometry.stride, *padding = args.geometry.padding;
  std::vector<PlacedTap> all = cross(args.spatial, args.temporal);
  std::reverse(all.begin(), all.end());  // ascending offsets
  std::int64_t residue[3];
  for (residue[0] = 0; residue[0] < std::min(stride[0], args.dx.size[2]); ++residue[0])
    for (residue[1] = 0; residue[1] < std::min(stride[1], args.dx.size[3]); ++residue[1])
      for (residue[2] = 0; residue[2] < std::min(stride[2], args.dx.size[4]); ++residue[2]) {
        Taps taps;
        for (const PlacedTap& t : all) {
          std::array<std::int64_t, 3> offset;
          bool whole = true;
          for (int d = 0; d < 3; ++d) {
            const std::int64_t distance = residue[d] + padding[d] - t.place[d];
            whole = whole && distance % stride[d] == 0;
            offset[d] = distance / stride[d];
          }
          if (whole) taps.add(offset, t.tap, dense_along_w(args.dout));
        }
        RowsJob job;
        job.gather.from = args.dout;
        taps.attach(job.gather);
        job.to = args.dx;
        for (int d = 0; d < 3; ++d) {
          job.gather.grid[d] = ceil_div(args.dx.size[2 + d] - residue[d], stride[d]);
          job.origin[d] = residue[d];
          job.to_step[d] = stride[d];
        }
        run_rows(job, taps, args.spatial, args.temporal, 0, threads);
      }
}

void backward_weight(const BackwardWeight& args, const Threads& threads) {
  const Kernels& kernels = kernels_for(args.x.dtype);
  const Taps taps = forward_taps(args.x, args.dspatial, args.dtemporal, args.geometry);
  WeightGradientJob job;
  job.gather = gather_input(args.x, args.geometry, args.dout.size + 2, taps);
  job.dout = args.dout;
  job.taps = taps.taps.data();
  job.dspatial = args.dspatial;
  job.dtemporal = args.dtemporal;
  const std::int64_t plane = args.x.size[0] * job.gather.grid[1] * job.gather.grid[2];
  job.blocks = ceil_div(plane, kernels.gradient_rows);
  job.chunks = ceil_div(job.gather.taps * args.x.size[1], kernels.gradient_chunk);
  // An empty batch has one split of no rows, so that the gradients become zero.
  job.splits = std::clamp<std::int64_t>(ceil_div(gradient_tasks, job.chunks), 1,
                                        std::max<std::int64_t>(1, job.gather.grid[0] * job.blocks));
  job.partial = static_cast<char*>(
      scratch::get(scratch::Slot::shared, job.splits * job.chunks * kernels.partial_bytes(args.dout.size[1])));
  run_tasks(threads, job.splits * job.chunks, [&](std::int64_t task) { kernels.weights(job, task); });
  run_tasks(threads, ceil_div(args.x.size[1], weight_channels), [&](std::int64_t task) { kernels.reduce(job, task); });
}

}  // namespace effcore::conv3d
