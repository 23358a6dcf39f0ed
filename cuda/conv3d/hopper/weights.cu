// Which warpgroup of which block sums which taps, and the launch.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "common/overlap.cuh"
#include "conv3d/hopper/weights.cuh"
#include "conv3d/hopper/weights.h"

namespace effcore::cuda::conv3d::hopper {
namespace {

// Blocks under way at once: a constant, so that every device sums in the same order.
constexpr std::int64_t multiprocessors = 132;
constexpr int most_halo_rows = 128, most_side = 256;
constexpr std::int64_t most_behind = 4096;  // bytes behind the stages

// Columns of taps that are read in sequence: one, or two single taps.
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
    const PlannedSequence first = take(2);
    units.push_back({first, take(2)});
  }
  return units;
}

// How a stage holds x: boxes of whole lines, one for each frame of taps, or one for each column of taps.
struct Layout {
  Box box;
  int halo = 0;                // lines more
  int depth = 0;               // rows of dout, with zeros behind the box
  const Lines* lines = nullptr;  // where boxes are whole lines
};

int round_up(std::int64_t n, std::int64_t multiple) {
  return static_cast<int>(ceil_div(n, multiple) * multiple);
}

bool plan_tap_blocks(TiledWeightsParams& p, const std::vector<Column>& columns, const Layout& layout, int& tap_blocks) {
  const std::vector<std::vector<PlannedSequence>> units = units_of(columns);
  const auto count = static_cast<std::int64_t>(units.size());
  tap_blocks = static_cast<int>(ceil_div(count, summing_warpgroups));
  if (tap_blocks > most_tap_blocks) return false;
  const int line = layout.box.line();
  for (int i = 0; i < tap_blocks; ++i) {
    TapBlock& block = p.tap_block[i];
    int row = layout.depth;
    const auto load = [&](std::int64_t t, std::int64_t h, std::int64_t w, bool halo) {
      block.box[block.boxes++] = {static_cast<std::int16_t>(t), static_cast<std::int16_t>(h), static_cast<std::int16_t>(w),
                                  static_cast<std::int16_t>(row), halo};
      const int first = row, rows = line * (layout.box.h + (halo ? layout.halo : 0));
      block.bytes += rows * 128;
      row += round_up(rows + (layout.lines != nullptr ? layout.lines->margin : 0), 8);
      return first;
    };
    const std::int64_t begin = i * count / tap_blocks, end = (i + 1) * count / tap_blocks;  // spread evenly
    std::vector<FrameOfTaps> frames;
    std::vector<int> frame_rows;
    if (layout.lines != nullptr) {
      std::vector<Column> taps;
      for (std::int64_t u = begin; u < end; ++u)
        for (const PlannedSequence& sequence : units[static_cast<std::size_t>(u)])
          taps.insert(taps.end(), sequence.begin(), sequence.end());
      frames = frames_of(taps);
      for (const FrameOfTaps& f : frames)
        frame_rows.push_back(load(f.t, f.h.first, layout.lines->first_w, layout.lines->needs_halo(f)));
    }
    const auto first_row = [&](const Column& c) {
      if (layout.lines == nullptr) return load(c.t, c.h, c.w, c.numbers.size() > 1);
      std::size_t f = 0;
      while (frames[f].t != c.t) ++f;
      return frame_rows[f] + static_cast<int>((c.h - frames[f].h.first) * line + c.w - layout.lines->first_w);
    };
    block.bytes += layout.box.rows() * 128;  // dout
    for (std::int64_t u = begin; u < end; ++u) {
      Unit& unit = block.unit[block.units++];
      int numbers = 0;
      for (int which = 0; which < 2; ++which) {
        Sequence& sequence = unit.sequence[which];
        for (const Column& c : units[static_cast<std::size_t>(u)][static_cast<std::size_t>(which)]) {
          const int first = first_row(c);
          if (sequence.taps == 0)
            sequence.first = static_cast<std::int16_t>(first), sequence.distance = static_cast<std::int16_t>(line);
          else
            sequence.distance = static_cast<std::int16_t>(first - sequence.first);
          for (const std::int64_t number : c.numbers) unit.number[numbers++] = static_cast<std::int16_t>(number);
          sequence.taps = static_cast<std::int16_t>(sequence.taps + c.numbers.size());
          if (sequence.distance <= 0) return false;
        }
      }
    }
    // Products read on to the end of dout's rows.
    int rows = row;
    for (int u = 0; u < block.units; ++u)
      for (const Sequence& s : block.unit[u].sequence)
        if (s.taps > 0) rows = std::max(rows, s.first + (s.taps - 1) * s.distance + layout.depth);
    p.stage_bytes = std::max(p.stage_bytes, round_up(rows, 8) * 128);
  }
  return true;
}

// compute-sanitizer takes an operand for as many contiguous bytes as it has elements, while overlapping panels have fewer: this
// much behind the last stage keeps it content. (The reads themselves end with the stage.)
int overhang(const TiledWeightsParams& p, int tap_blocks) {
  constexpr int bytes_of_product = depth_of_product * 128;
  int end = p.stage_bytes;
  for (int i = 0; i < tap_blocks; ++i)
    for (int u = 0; u < p.tap_block[i].units; ++u)
      for (const Sequence& s : p.tap_block[i].unit[u].sequence)
        if (s.taps > 0) end = std::max(end, s.first * 128 + (p.products - 1 + s.taps) * bytes_of_product);
  return end - p.stage_bytes;
}

// The box of whole lines that costs the least, of which at least two stages fit; or none.
Layout lines_layout(const Lines& lines, std::int64_t frames, const std::int64_t grid[3], std::int64_t batch, int memory) {
  Layout best;
  best.lines = &lines, best.halo = static_cast<int>(lines.halo);
  double least = std::numeric_limits<double>::infinity();
  for (std::int64_t t = 1; t <= grid[0]; ++t)
    for (std::int64_t b = 1; b <= (t == grid[0] ? batch : 1); ++b)
      for (std::int64_t h = 1; h <= grid[1]; ++h) {
        const std::int64_t line = lines.pitch * t * b, depth = round_up(line * h, depth_of_product);
        const std::int64_t rows = depth + round_up(line * (h + lines.halo) + lines.margin, 8) +
                                  (frames - 1) * round_up(line * h + lines.margin, 8);
        const std::int64_t stages = (memory - most_behind) / (rows * 128);
        if (stages < 2) break;
        const double boxes = static_cast<double>(ceil_div(grid[0], t) * ceil_div(batch, b) * ceil_div(grid[1], h));
        // Cycles of the products of 11 taps, or of the bytes; two stages hide less of what is between.
        const double cycles = std::max(static_cast<double>(depth) * 22, static_cast<double>(rows) * 128 / 24);
        const double cost = boxes * (cycles + (stages > 2 ? 200 : 400));
        if (cost >= least) continue;
        least = cost;
        best.box = Box{static_cast<int>(lines.pitch), static_cast<int>(t), static_cast<int>(b), static_cast<int>(h)};
        best.depth = static_cast<int>(depth);
      }
  return best;
}

Layout boxes_layout(const std::vector<Column>& columns, const std::int64_t grid[3], std::int64_t batch) {
  constexpr int rows = 64;
  Layout layout;
  for (const Column& c : columns) layout.halo = std::max(layout.halo, static_cast<int>(c.numbers.size()) - 1);
  // Between boxes of 64 positions the halo makes the difference.
  layout.box = choose_box(rows, most_halo_rows, grid, batch, layout.halo,
                          [](double boxes, double rows_with_halo) { return boxes * (2 * rows + rows_with_halo); });
  layout.depth = rows;
  return layout;
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
  const auto steps = static_cast<double>(ceil_div(positions, 64));
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
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, function) != 9) return false;

  const std::vector<Column> columns = columns_of(problem.taps, problem.step[1], 3);
  constexpr std::int64_t whole[3] = {1, 1, 1};
  const int memory = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, function);
  const std::vector<FrameOfTaps> frames = frames_of(columns);
  const Lines lines(frames, dout.size[4], x.size[4]);
  Layout layout;
  if (problem.step[1] == 1 && problem.step[2] == 1 && lines.pitch <= most_side && std::getenv("EFFCORE_CONV3D_WEIGHT_LINES") != nullptr)
    layout = lines_layout(lines, static_cast<std::int64_t>(frames.size()), dout.size + 2, dout.size[0], memory);
  if (layout.box.w == 0) layout = boxes_layout(columns, dout.size + 2, dout.size[0]);
  const Box& box = layout.box;
  TiledWeightsParams p{};
  int tap_blocks = 0;
  p.products = layout.depth / depth_of_product;
  if (box.w == 0 || !plan_tap_blocks(p, columns, layout, tap_blocks)) return false;
  if (!encode_boxes(&p.dout, dout, box, box.h, whole) || !encode_boxes(&p.box, x, box, box.h, problem.step) ||
      !encode_boxes(&p.box_with_halo, x, box, box.h + layout.halo, problem.step))
    return false;
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
