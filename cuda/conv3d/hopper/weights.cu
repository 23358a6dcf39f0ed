// Which warpgroup of which block sums which taps, and the launch.
#include <algorithm>
#include <cmath>
#include <limits>

#include "common/overlap.cuh"
#include "conv3d/hopper/dispatch.h"
#include "conv3d/hopper/weights.cuh"
#include "conv3d/hopper/weights.h"

namespace effcore::cuda::conv3d::hopper {
namespace {

// Blocks under way at once: a constant, so that every device sums in the same order.
constexpr std::int64_t multiprocessors = 132;
constexpr int most_halo_rows = 128;

// Positions of a step. Grids whose sides are multiples of 7 are cut without loss into the deeper ones, for which there is
// shared memory with 128 output channels.
constexpr int depth_of_step = 64, deep_step = 112;

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
    int row = box.rows();
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

// The same for 128 output channels: taps in their order, as many as fit into a block. Its first two warpgroups take the same
// taps of one half of the channels each, the third those of both.
bool plan_wide_tap_blocks(TiledWeightsParams& p, const std::vector<Column>& columns, const Box& box, int halo, int step_h,
                          int& tap_blocks) {
  std::vector<Column> left;  // columns of several taps first
  for (const bool single : {false, true})
    std::copy_if(columns.begin(), columns.end(), std::back_inserter(left),
                 [&](const Column& c) { return (c.numbers.size() == 1) == single; });
  const int line = box.line(), plain_rows = line * box.h, halo_rows = line * (box.h + halo);
  std::size_t next = 0, used = 0;  // the column to read from, and how many of its taps have been taken
  tap_blocks = 0;
  while (next < left.size()) {
    if (tap_blocks == most_tap_blocks) return false;
    TapBlock& block = p.tap_block[tap_blocks++];
    int row = 2 * box.rows(), at = 0;
    // Up to `most` taps of one column, or of several of one tap each.
    const auto take = [&](int most, std::int16_t* number) {
      Sequence sequence{};
      while (sequence.taps < most && next < left.size()) {
        const Column& c = left[next];
        const bool with_halo = c.numbers.size() > 1;
        if (with_halo && sequence.taps > 0) break;
        if (used == 0) {
          at = row;
          block.box[block.boxes++] = {static_cast<std::int16_t>(c.t), static_cast<std::int16_t>(c.h),
                                      static_cast<std::int16_t>(c.w), static_cast<std::int16_t>(row), with_halo};
          row += with_halo ? halo_rows : plain_rows;
        }
        if (sequence.taps == 0) {
          sequence.first = static_cast<std::int16_t>(at + static_cast<int>(used) * line);
          sequence.distance = static_cast<std::int16_t>(with_halo ? line : plain_rows);
        }
        while (sequence.taps < most && used < c.numbers.size())
          number[sequence.taps++] = static_cast<std::int16_t>(c.numbers[used++]);
        if (used == c.numbers.size()) ++next, used = 0;
        if (with_halo) break;
      }
      return sequence;
    };
    Unit &lower = block.unit[0], &upper = block.unit[1], &both = block.unit[2];
    const int first = (lower.sequence[0] = take(3, lower.number)).taps;
    lower.sequence[1] = take(std::min(first, taps_of_warpgroup - first), lower.number + first);
    upper = lower;
    const int third = (both.sequence[0] = both.sequence[1] = take(2, both.number)).taps;
    std::copy_n(both.number, third, both.number + third);
    for (Sequence* sequence : {&upper.sequence[0], &upper.sequence[1], &both.sequence[1]}) sequence->half = 1;
    block.units = third > 0 ? 3 : 2;
    block.bytes = row * 128;
    p.stage_bytes = std::max(p.stage_bytes, block.bytes);
    if (used > 0) {  // the next block reads the rest of the column
      Column& c = left[next];
      c.h += static_cast<std::int64_t>(used) * step_h;
      c.numbers.erase(c.numbers.begin(), c.numbers.begin() + static_cast<std::ptrdiff_t>(used));
      used = 0;
    }
  }
  return true;
}

// compute-sanitizer takes an operand for as many contiguous bytes as it has elements, while overlapping panels have fewer: this
// much behind the last stage keeps it content. (The reads themselves end with the stage.)
int overhang(const TiledWeightsParams& p, int depth, int tap_blocks) {
  constexpr int bytes_of_16_rows = 16 * 128;
  int end = p.stage_bytes;
  for (int i = 0; i < tap_blocks; ++i)
    for (int u = 0; u < p.tap_block[i].units; ++u)
      for (const Sequence& s : p.tap_block[i].unit[u].sequence)
        if (s.taps > 0) end = std::max(end, s.first * 128 + (depth / 16 - 1 + s.taps) * bytes_of_16_rows);
  return end - p.stage_bytes;
}

struct Plan {
  TiledWeightsParams p{};
  int tap_blocks = 0, bytes = 0;  // of shared memory; 0 where there is no such plan
  double cost = std::numeric_limits<double>::infinity();
};

// With steps of `depth` positions, where there is room for as many stages.
Plan plan_of(const char* function, const WeightsProblem& problem, int halves, int depth, int least_stages) {
  const TensorView& dout = problem.dout;
  const std::vector<Column> columns = columns_of(problem.taps, problem.step[1], 3);
  int halo = 0;
  for (const Column& c : columns) halo = std::max(halo, static_cast<int>(c.numbers.size()) - 1);
  // Between boxes of as many positions the halo makes the difference.
  const auto cost = [&](double boxes, double rows_with_halo) { return boxes * (2 * depth + rows_with_halo); };
  const Box box = choose_box(depth, most_halo_rows, dout.size + 2, dout.size[0], halo, cost);
  Plan plan;
  TiledWeightsParams& p = plan.p;
  if (box.w == 0) return plan;
  const auto planned = halves == 2
                           ? plan_wide_tap_blocks(p, columns, box, halo, static_cast<int>(problem.step[1]), plan.tap_blocks)
                           : plan_tap_blocks(p, columns, box, halo, plan.tap_blocks);
  constexpr std::int64_t whole[3] = {1, 1, 1};
  if (!planned || !encode_boxes(&p.dout, dout, box, box.h, whole) ||
      !encode_boxes(&p.box, problem.x, box, box.h, problem.step) ||
      !encode_boxes(&p.box_with_halo, problem.x, box, box.h + halo, problem.step))
    return plan;
  const int memory = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, function);
  const int behind = static_cast<int>(sizeof(WeightsRing)) + overhang(p, depth, plan.tap_blocks);
  p.stages = std::min(most_weights_stages, (memory - behind) / p.stage_bytes);
  if (p.stages < least_stages) return plan;
  plan.bytes = p.stages * p.stage_bytes + behind;
  p.halves = halves;
  p.tiling = Tiling(box, dout.size + 2, dout.size[0], problem.step);
  plan.cost = cost(p.tiling.tiles, box.line() * (box.h + halo));
  return plan;
}

template <class T>
void run(const char* function, const Plan& plan, const Launch& launch) {
  const TiledWeightsParams& p = plan.p;
  const dim3 grid(static_cast<unsigned>(p.column_panels * p.channel_panels * plan.tap_blocks), static_cast<unsigned>(p.splits));
  const auto kernel =
      p.tiling.box.rows() == deep_step ? conv3d_weights_kernel<T, deep_step> : conv3d_weights_kernel<T, depth_of_step>;
  launch_overlapping(function, kernel, grid, weights_threads, static_cast<std::size_t>(plan.bytes),
                     static_cast<cudaStream_t>(launch.stream), p);
}

// Of 64 output channels, that a block sums; more taps than these would not fit into its parameters with two.
std::int64_t halves_of(const PartialSums& sums) {
  return sums.columns % 128 == 0 && sums.taps <= 64 ? 2 : 1;
}

}  // namespace

PartialSums partial_sums(std::int64_t positions, std::int64_t columns, std::int64_t channels, std::int64_t taps) {
  PartialSums sums{1, ceil_div(columns, 64) * 64, ceil_div(channels, 64) * 64, taps};
  // 64 output channels and twelve taps a block, or 128 and six.
  const std::int64_t halves = halves_of(sums), accumulators = summing_warpgroups * taps_of_warpgroup;
  const std::int64_t blocks = sums.columns / (64 * halves) * (sums.channels / 64) * ceil_div(taps * halves, accumulators);
  const auto steps = static_cast<double>(ceil_div(positions, depth_of_step));
  constexpr double sums_of_block = 0.1;  // writing and reading them, whichever blocks do it, in steps of all blocks
  double least = std::numeric_limits<double>::infinity();
  for (std::int64_t splits = 1; splits <= multiprocessors && (splits == 1 || splits <= steps); ++splits) {
    const auto all = static_cast<double>(blocks * splits);
    const double time = std::ceil(all / multiprocessors) * std::ceil(steps / static_cast<double>(splits)) + sums_of_block * all;
    if (time < least) least = time, sums.splits = splits;
  }
  return sums;
}

bool weights(const char* function, const WeightsProblem& problem, const PartialSums& sums, const Launch& launch) {
  const TensorView& x = problem.x;
  if (!readable(x) || !readable(problem.dout) || problem.taps.empty()) return false;
  const int halves = static_cast<int>(halves_of(sums));
  Plan plan = plan_of(function, problem, halves, depth_of_step, 2);
  if (halves == 2) {
    Plan deep = plan_of(function, problem, halves, deep_step, 3);
    if (deep.cost < plan.cost) plan = deep;
  }
  if (plan.bytes == 0) return false;
  TiledWeightsParams& p = plan.p;
  p.column_panels = static_cast<int>(sums.columns / (64 * halves));
  p.channel_panels = static_cast<int>(sums.channels / 64);
  p.splits = static_cast<int>(sums.splits);
  p.panel_sums = sums.taps * p.channel_panels * sums_of_tile;
  p.partial = static_cast<float*>(launch.workspace);
  return run_16bit(x.dtype, [&](auto zero) { return run<decltype(zero)>(function, plan, launch), true; });
}

}  // namespace effcore::cuda::conv3d::hopper
