// The cross-shaped convolution on the CPU: which taps there are, and how the work is cut into tasks. The arithmetic is in isa/.
#include "effcore/conv3d.h"

#include <algorithm>
#include <vector>

#include "choose.h"
#include "conv3d_kernels.h"
#include "scratch.h"
#include "tasks.h"

namespace effcore::conv3d {
namespace {

const Kernels& kernels_for(DType dtype) {
  EFFCORE_RETURN_PRODUCTS(kernels, dtype)
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

// Taps and the runs that they form along w, where the gathered tensor's neighbours lie on end in memory.
struct Taps {
  std::vector<Tap> taps;
  std::vector<Run> runs;

  Taps(const std::vector<PlacedTap>& placed, const TensorView& gathered) {
    const bool dense = gathered.stride[4] == gathered.size[1];
    for (const PlacedTap& t : placed) {
      const std::int64_t* at = t.place;
      taps.push_back(t.tap);
      Run* const last = runs.empty() ? nullptr : &runs.back();
      if (dense && last != nullptr && last->offset[0] == at[0] && last->offset[1] == at[1] &&
          last->offset[2] + last->taps == at[2])
        ++last->taps;
      else
        runs.push_back({{at[0], at[1], at[2]}, 1});
    }
  }
  void attach(Gather& gather) const {
    gather.runs = runs.data();
    gather.run_count = static_cast<std::int64_t>(runs.size());
    gather.taps = static_cast<std::int64_t>(taps.size());
  }
};

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
  const Taps taps(forward_taps(cross(args.spatial, args.temporal), args.geometry), args.x);
  RowsJob job;
  job.gather = gather_input(args.x, args.geometry, args.out.size + 2, taps);
  job.bias = args.bias;
  job.to = args.out;
  run_rows(job, taps, args.spatial, args.temporal, 1, threads);
}

void backward_data(const BackwardData& args, const Threads& threads) {
  const std::vector<PlacedTap> all = cross(args.spatial, args.temporal);
  for_residues(args.dx.size + 2, args.geometry, [&](const std::int64_t residue[3]) {
    const Taps taps(mirrored_taps(all, args.geometry, residue), args.dout);
    RowsJob job;
    job.gather.from = args.dout;
    taps.attach(job.gather);
    job.to = args.dx;
    for (int d = 0; d < 3; ++d) {
      job.gather.grid[d] = ceil_div(args.dx.size[2 + d] - residue[d], args.geometry.stride[d]);
      job.origin[d] = residue[d];
      job.to_step[d] = args.geometry.stride[d];
    }
    run_rows(job, taps, args.spatial, args.temporal, 0, threads);
  });
}

void backward_weight(const BackwardWeight& args, const Threads& threads) {
  const Kernels& kernels = kernels_for(args.x.dtype);
  const Taps taps(forward_taps(cross(args.dspatial, args.dtemporal), args.geometry), args.x);
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
