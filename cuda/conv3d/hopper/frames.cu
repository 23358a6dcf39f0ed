// Tiles, boxes and launches of pairs of frames.
#include <algorithm>

#include "common/overlap.cuh"
#include "common/tensor_map.h"
#include "conv3d/hopper/dispatch.h"
#include "conv3d/hopper/frames.cuh"
#include "conv3d/hopper/lines.h"

namespace effcore::cuda::conv3d::hopper {
namespace {

constexpr int asked_before = 4;  // taps

template <class T, bool Transposed>
bool run(const char* function, FramesParams p, int tiles, const Launch& launch) {
  const int memory = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, function);
  const auto bytes = [&](int weights) {
    return 2 * middle_stages * p.middle_bytes + p.outer_bytes + 2 * weights * frame_weight_bytes +
           static_cast<int>(sizeof(FramesMemory));
  };
  p.weight_stages = 3;
  if (bytes(p.weight_stages) > memory) return false;
  while (p.weight_stages < most_frame_weight_stages && bytes(p.weight_stages + 1) <= memory) ++p.weight_stages;
  const int shared_bytes = bytes(p.weight_stages);
  const auto kernel = conv3d_frames_kernel<T, Transposed>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), function);
  cudaLaunchAttribute attribute[2];
  attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[0].val.programmaticStreamSerializationAllowed = 1;
  attribute[1].id = cudaLaunchAttributeClusterDimension;
  attribute[1].val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(2 * tiles));
  config.blockDim = frames_threads, config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = attribute, config.numAttrs = 2;
  check(cudaLaunchKernelEx(&config, kernel, p), function);
  return true;
}

}  // namespace

bool frames(const char* function, const RowsProblem& problem, const Lines& lines, const std::vector<FrameOfTaps>& frames,
            const Launch& launch) {
  const TensorView &from = problem.from, &to = problem.to;
  const std::int64_t* const grid = to.size + 2;
  if (grid[0] < 2) return false;
  // One frame of several taps, and others of one each.
  const auto taps_of = [&](const FrameOfTaps& f) {
    return std::count_if(problem.taps.begin(), problem.taps.end(), [&](const auto& tap) { return tap.place[0] == f.t; });
  };
  const FrameOfTaps middle =
      *std::max_element(frames.begin(), frames.end(), [&](const auto& a, const auto& b) { return taps_of(a) < taps_of(b); });
  for (const FrameOfTaps& f : frames)
    if (f.t != middle.t && taps_of(f) != 1) return false;
  std::int64_t count = 0;
  const Box box = choose_lines(frame_positions, 1, lines, grid, to.size[0], count);
  if (count == 0) return false;
  const std::int64_t pairs = ceil_div(grid[0], 2), column_blocks = problem.padded_columns / frame_columns;
  const std::int64_t tiles = count / grid[0] * pairs * column_blocks;
  if (2 * tiles > device_attribute(cudaDevAttrMultiProcessorCount, function)) return false;

  FramesParams p{};
  if (!encode_boxes(&p.middle, from, box, static_cast<int>(box.h + lines.halo), problem.step) ||
      !encode_boxes(&p.outer, from, box, box.h, problem.step) || !encode_weights(p.weights, problem, frame_columns / 2))
    return false;
  p.tiling = Tiling(box, grid, to.size[0], problem.step);
  p.tiling.tiles_t = Divider(pairs);
  p.column_blocks = Divider(column_blocks);
  p.first_w = static_cast<int>(lines.first_w);
  const auto bytes_of_stage = [&](std::int64_t rows) { return static_cast<int>(ceil_div(rows + lines.margin, 8) * 1024); };
  const std::int64_t middle_rows = box.line() * (box.h + lines.halo);
  p.middle_box_bytes = static_cast<int>(middle_rows * 128), p.outer_box_bytes = box.rows() * 128;
  p.middle_bytes = std::max(bytes_of_stage(middle_rows), bytes_for_second);
  p.outer_bytes = std::max(bytes_of_stage(box.rows()), bytes_for_first);

  // Outer frames come behind the first half of the middle's taps, and last the one tap whose two kernels are added.
  std::vector<effcore::conv3d::PlacedTap> taps, outer;
  for (const auto& tap : problem.taps) (tap.place[0] == middle.t ? taps : outer).push_back(tap);
  std::stable_partition(taps.begin(), taps.end(), [&](const auto& tap) { return place_of_weights(problem, tap).added < 0; });
  const std::ptrdiff_t half = static_cast<std::ptrdiff_t>(taps.size() + 1) / 2;
  taps.insert(taps.begin() + half, outer.begin(), outer.end());

  p.taps = static_cast<int>(taps.size());
  p.middle_h = static_cast<int>(middle.h.first);
  // The frame before has been read by all who read it when the third tap behind it is under way.
  p.middle_at = std::max(2, p.taps - asked_before);
  for (int i = 0; i < p.taps; ++i) {
    const PlaceOfWeights weights = place_of_weights(problem, taps[static_cast<std::size_t>(i)]);
    p.tap[i] = {weights.map, weights.number, weights.added};
  }
  for (int block = 0; block < 2; ++block) {
    p.middle_t[block] = static_cast<int>(middle.t + block * problem.step[0]);
    int others = 0, last = -1;
    for (int i = 0; i < p.taps; ++i) {
      const auto& tap = taps[static_cast<std::size_t>(i)];
      const std::int64_t frame = tap.place[0] + block * problem.step[0];
      const bool in_middle = tap.place[1] >= middle.h.first && tap.place[1] <= middle.h.last;
      const bool own = tap.place[0] == middle.t;
      const bool other = !own && in_middle && frame == middle.t + (1 - block) * problem.step[0];
      const std::int64_t row = (own || other ? (tap.place[1] - middle.h.first) * box.line() : 0) + tap.place[2] - lines.first_w;
      std::uint32_t what = own ? 0 : other ? TapCode::other_middle : TapCode::outer;
      if (p.tap[i].added >= 0) what |= TapCode::added;
      p.code[i][block] = TapCode::of(static_cast<int>(row), what);
      others += other ? 1 : 0;
      if (own || other) continue;
      p.outer_frame[block][p.outers[block]++] = {static_cast<std::int16_t>(frame), static_cast<std::int16_t>(tap.place[1]),
                                                 static_cast<std::int16_t>(std::max(last + 1, i - asked_before)),
                                                 static_cast<std::int16_t>(i)};
      last = i;
    }
    if (others != 1) return false;  // the middle frames are fetched for both blocks
    // There is one place for outer frames. A warpgroup gives it back behind its next product, two taps on, whose weights must
    // be asked for before the next frame; else at once.
    const int count = p.outers[block];
    for (int k = 0; k < count; ++k) {
      const OuterFrame* const frame = p.outer_frame[block];
      const int next = k + 1 < count ? frame[k + 1].before : p.taps + frame[0].before;
      if (next < frame[k].tap + 3) p.code[frame[k].tap][block].bits |= TapCode::wait;
    }
  }
  p.blocks = static_cast<int>(problem.padded_channels / 64);
  p.packed = problem.packed != nullptr;
  set_results(p, problem);
  return run_16bit(from.dtype, [&](auto zero) {
    using T = decltype(zero);
    return transposed(problem) ? run<T, true>(function, p, static_cast<int>(tiles), launch)
                               : run<T, false>(function, p, static_cast<int>(tiles), launch);
  });
}

}  // namespace effcore::cuda::conv3d::hopper
