// Which warpgroup of which block sums which taps, and the launch.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/overlap.cuh"
#include "conv3d/hopper/weights.cuh"
#include "conv3d/hopper/weights.h"

namespace effcore::cuda::conv3d::hopper {
namespace {

// Blocks under way at once: a constant, so that every device sums in the same order.
constexpr std::int64_t multiprocessors = 132;
constexpr int most_halo_rows = 128;

// Boxes that are read in sequence: one with a halo, or several with one tap each.
using PlannedSequence = std::vector<Column>;

// A unit for each column of taps of the kernel; single taps join them, and then each other.
std::vector<std::vector<PlannedSequence>> units_of(const std::vector<Column>& columns) {
  std::vector<std::vector<PlannedSequence>> units;
  std::vector<Column> singles;
  for (const Column& c : columns)
    if (c.numbers.size() > 1)
      units.push_back({{c}});
    else
      singles.push_back(c);
  std::size_t next = 0;
  const auto take = [&](std::size_t most) {
    const std::size_t begin = next;
    next = std::min(next + most, singles.size());
    return PlannedSequence(singles.begin() + static_cast<std::ptrdiff_t>(begin),
                           singles.begin() + static_cast<std::ptrdiff_t>(next));
  };
  for (auto& unit : units) unit.push_back(take(taps_of_warpgroup - unit[0][0].numbers.size()));
  while (next < singles.size()) {
    const PlannedSequence first = take(3);
    units.push_back({first, take(first.size() == 3 ? 1 : 0)});
  }
  return units;
}

bool plan_tap_blocks(TiledWeightsParams& p, const std::vector<Column>& columns, const Box& box, int halo, int& tap_blocks) {
  const std::vector<std::vector<PlannedSequence>> units = units_of(columns);
  const auto count = static_cast<std::int64_t>(units.size());
  tap_blocks = static_cast<int>(ceil_div(count, summing_warpgroups));
  if (tap_blocks > most_tap_blocks) return false;
  const int line = box.line(), plain_rows = line * box.h, halo_rows = line * (box.h + halo);
  for (int i = 0; i < tap_blocks; ++i) {
    TapBlock& block = p.tap_block[i];
    int row = depth_of_step;
    // Spread evenly.
    for (std::int64_t u = i * count / tap_blocks; u < (i + 1) * count / tap_blocks; ++u) {
      Unit& unit = block.unit[block.units++];
      int numbers = 0;
      for (int which = 0; which < 2; ++which) {
        Sequence& sequence = unit.sequence[which];
        sequence.first = static_cast<std::int16_t>(row);
        sequence.distance = static_cast<std::int16_t>(plain_rows);
        for (const Column& c : units[static_cast<std::size_t>(u)][static_cast<std::size_t>(which)]) {
          const bool with_halo = c.numbers.size() > 1;
          if (with_halo) sequence.distance = static_cast<std::int16_t>(line);
          block.box[block.boxes++] = {static_cast<std::int16_t>(c.t), static_cast<std::int16_t>(c.h),
                                      static_cast<std::int16_t>(c.w), static_cast<std::int16_t>(row), with_halo};
          for (const std::int64_t number : c.numbers) unit.number[numbers++] = static_cast<std::int16_t>(number);
          sequence.taps = static_cast<std::int16_t>(sequence.taps + c.numbers.size());
          row += with_halo ? halo_rows : plain_rows;
        }
      }
    }
    block.bytes = row * 128;
    p.stage_bytes = std::max(p.stage_bytes, block.bytes);
  }
  return true;
}

// compute-sanitizer takes an operand for as many contiguous bytes as it has elements, while overlapping panels have fewer: this
// much behind the last stage keeps it content. (The reads themselves end with the stage.)
int overhang(const TiledWeightsParams& p, int tap_blocks) {
  constexpr int bytes_of_16_rows = 16 * 128;
  int end = p.stage_bytes;
  for (int i = 0; i < tap_blocks; ++i)
    for (int u = 0; u < p.tap_block[i].units; ++u)
      for (const Sequence& s : p.tap_block[i].unit[u].sequence)
        if (s.taps > 0) end = std::max(end, s.first * 128 + (depth_of_step / 16 - 1 + s.taps) * bytes_of_16_rows);
  return end - p.stage_bytes;
}

template <class T>
void run(const char* function, const TiledWeightsParams& p, int tap_blocks, int bytes, const Launch& launch) {
  const dim3 grid(static_cast<unsigned>(p.column_panels * p.channel_panels * tap_blocks), static_cast<unsigned>(p.splits));
  launch_overlapping(function, conv3d_weights_kernel<T>, grid, weights_threads, static_cast<std::size_t>(bytes),
                     static_cast<cudaStream_t>(launch.stream), p);
}

}  // namespace

PartialSums partial_sums(std::int64_t positions, std::int64_t columns, std::int64_t channels, std::int64_t taps) {
  PartialSums sums{1, ceil_div(columns, 64) * 64, ceil_div(channels, 64) * 64, taps};
  const std::int64_t blocks = sums.columns / 64 * (sums.channels / 64) * ceil_div(taps, summing_warpgroups * taps_of_warpgroup);
  const auto steps = static_cast<double>(ceil_div(positions, depth_of_step));
  constexpr double write = 6;  // partial sums, in steps
  double least = std::numeric_limits<double>::infinity();
  for (std::int64_t splits = 1; splits <= multiprocessors && (splits == 1 || splits <= steps); ++splits) {
    const auto waves = static_cast<double>(ceil_div(blocks * splits, multiprocessors));
    const double time = waves * (std::ceil(steps / static_cast<double>(splits)) + write);
    if (time < least) least = time, sums.splits = splits;
  }
  return sums;
}

bool weights(const char* function, const WeightsProblem& problem, const PartialSums& sums, const Launch& launch) {
  const TensorView &x = problem.x, &dout = problem.dout;
  if (!readable(x) || !readable(dout) || problem.taps.empty()) return false;

  const std::vector<Column> columns = columns_of(problem.taps, problem.step[1], 3);
  int halo = 0;
  for (const Column& c : columns) halo = std::max(halo, static_cast<int>(c.numbers.size()) - 1);
  // Between boxes of 64 positions the halo makes the difference.
  const Box box = choose_box(depth_of_step, most_halo_rows, dout.size + 2, dout.size[0], halo,
                             [](double boxes, double rows_with_halo) { return boxes * (2 * depth_of_step + rows_with_halo); });
  constexpr std::int64_t whole[3] = {1, 1, 1};
  TiledWeightsParams p{};
  int tap_blocks = 0;
  if (box.w == 0 || !plan_tap_blocks(p, columns, box, halo, tap_blocks)) return false;
  if (!encode_boxes(&p.dout, dout, box, box.h, whole) || !encode_boxes(&p.box, x, box, box.h, problem.step) ||
      !encode_boxes(&p.box_with_halo, x, box, box.h + halo, problem.step))
    return false;
  const int memory = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, function);
  const int behind = static_cast<int>(sizeof(WeightsRing)) + overhang(p, tap_blocks);
  p.stages = std::min(most_weights_stages, (memory - behind) / p.stage_bytes);
  if (p.stages < 2) return false;

  p.tiling = Tiling(box, dout.size + 2, dout.size[0], problem.step);
  p.column_panels = static_cast<int>(sums.columns / 64);
  p.channel_panels = static_cast<int>(sums.channels / 64);
  p.splits = static_cast<int>(sums.splits);
  p.depth = sums.taps * sums.channels;
  p.partial = static_cast<float*>(launch.workspace);
  const int bytes = p.stages * p.stage_bytes + behind;
  if (x.dtype == DType::bfloat16) return run<bf16>(function, p, tap_blocks, bytes, launch), true;
#if !defined(EFFCORE_CUDA_SET_CI)
  return run<fp16>(function, p, tap_blocks, bytes, launch), true;
#else
  return false;
#endif
}

}  // namespace effcore::cuda::conv3d::hopper
