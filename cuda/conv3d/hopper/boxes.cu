#include "common/tensor_map.h"
#include "conv3d/hopper/boxes.h"

namespace effcore::cuda::conv3d::hopper {
namespace {

constexpr int order[5] = {1, 4, 2, 0, 3};  // channels, w, t, b, h: the lines of a box are outermost
constexpr int most_step = 8, most_side = 256;

}  // namespace

std::vector<Column> columns_of(const std::vector<effcore::conv3d::PlacedTap>& taps, std::int64_t step_h, std::size_t most) {
  std::vector<Column> columns;
  for (const auto& tap : taps) {
    bool placed = false;
    for (Column& c : columns) {
      const auto count = static_cast<std::int64_t>(c.numbers.size());
      placed = c.numbers.size() < most && c.t == tap.place[0] && c.w == tap.place[2] && c.h + count * step_h == tap.place[1];
      if (placed) {
        c.numbers.push_back(tap.number);
        break;
      }
    }
    if (!placed) columns.push_back({tap.place[0], tap.place[1], tap.place[2], {tap.number}});
  }
  return columns;
}

std::vector<FrameOfTaps> frames_of(const std::vector<Column>& columns) {
  std::vector<FrameOfTaps> frames;
  for (const Column& c : columns) {
    auto frame = std::find_if(frames.begin(), frames.end(), [&](const FrameOfTaps& f) { return f.t == c.t; });
    if (frame == frames.end()) frame = frames.insert(frames.end(), FrameOfTaps{c.t, {}, {}});
    frame->h.take(c.h, c.h + static_cast<std::int64_t>(c.numbers.size()) - 1);
    frame->w.take(c.w, c.w);
  }
  return frames;
}

Lines::Lines(const std::vector<FrameOfTaps>& frames, std::int64_t positions, std::int64_t voxels_of_line) : width(positions) {
  Span w;
  halo = 0;
  for (const FrameOfTaps& f : frames) w.take(f.w.first, f.w.last), halo = std::max(halo, f.h.reach());
  first_w = w.first;
  // All voxels that the taps read, or up to where zeros follow that stand before the next line as well.
  pitch = std::min(width + w.reach(), std::max(voxels_of_line - first_w, width + w.last));
  margin = std::max<std::int64_t>(w.reach() - (pitch - width), 0);
}

Box choose_lines(std::int64_t positions, std::int64_t most_frames, const Lines& lines, const std::int64_t grid[3],
                 std::int64_t batch, std::int64_t& tiles) {
  Box best;
  for (std::int64_t t = 1; t <= most_frames; ++t)
    for (std::int64_t b = 1; b <= (t == most_frames ? batch : 1); ++b)
      for (std::int64_t h = 1; h <= grid[1] && (h * t * b - 1) * lines.pitch + lines.width <= positions; ++h) {
        const std::int64_t count = ceil_div(grid[0], t) * ceil_div(batch, b) * ceil_div(grid[1], h);
        if (best.w != 0 && count >= tiles) continue;
        tiles = count;
        best = Box{static_cast<int>(lines.pitch), static_cast<int>(t), static_cast<int>(b), static_cast<int>(h)};
      }
  return best;
}

bool readable(const TensorView& voxels) {
  if (voxels.dtype != DType::bfloat16 && voxels.dtype != DType::float16) return false;
  bool fits = reinterpret_cast<std::uintptr_t>(voxels.data) % 16 == 0;
  for (const int d : {0, 2, 3, 4}) fits = fits && (voxels.size[d] == 1 || (voxels.stride[d] > 0 && voxels.stride[d] % 8 == 0));
  return fits;
}

bool encode_boxes(CUtensorMap* map, const TensorView& voxels, const Box& box, int lines, const std::int64_t step[3]) {
  const std::int64_t steps[5] = {1, step[2], step[0], 1, step[1]};
  const std::int64_t sides[5] = {64, box.w, box.t, box.b, lines};
  cuuint64_t size[5], stride[4];
  cuuint32_t side[5], traversal[5];
  for (int d = 0; d < 5; ++d) {
    if (steps[d] > most_step || sides[d] * steps[d] > most_side) return false;
    size[d] = static_cast<cuuint64_t>(voxels.size[order[d]]);
    side[d] = static_cast<cuuint32_t>(sides[d] * steps[d]);  // before the steps are taken
    traversal[d] = static_cast<cuuint32_t>(steps[d]);
  }
  for (int d = 1; d < 5; ++d)  // a dimension of size 1 has no stride of its own
    stride[d - 1] = size[d] == 1 ? static_cast<cuuint64_t>(ceil_div(voxels.size[1], 8) * 16)
                                 : static_cast<cuuint64_t>(voxels.stride[order[d]] * 2);
  return encode_tensor_map(map, voxels.dtype, voxels.data, size, stride, side, traversal);
}

}  // namespace effcore::cuda::conv3d::hopper
