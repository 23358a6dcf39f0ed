// The taps of the cross-shaped kernel, for the plans of the CPU and of the GPU.
#pragma once
#include <algorithm>
#include <vector>

#include "effcore/conv3d.h"

namespace effcore::conv3d {

// Where a tap's weights are: elements into the kernels' last dimensions, -1 for none. The middle of the cross has both.
struct Tap {
  std::int64_t spatial, temporal;
};

struct PlacedTap {
  std::int64_t place[3];  // (t, h, w): in the dense kernel, or an offset from a position
  Tap tap;
  std::int64_t number;  // in `cross`
};

// In ascending order of place.
inline std::vector<PlacedTap> cross(const TensorView& spatial, const TensorView& temporal) {
  const std::int64_t kt = temporal.size[2], kh = spatial.size[2], kw = spatial.size[3];
  std::vector<PlacedTap> taps;
  const auto add = [&](std::int64_t l, std::int64_t i, std::int64_t j, Tap tap) {
    taps.push_back({{l, i, j}, tap, static_cast<std::int64_t>(taps.size())});
  };
  for (std::int64_t l = 0; l < kt; ++l)
    if (l != kt / 2)
      add(l, kh / 2, kw / 2, {-1, l * temporal.stride[2]});
    else
      for (std::int64_t i = 0; i < kh; ++i)
        for (std::int64_t j = 0; j < kw; ++j)
          add(l, i, j,
              {i * spatial.stride[2] + j * spatial.stride[3],
               i == kh / 2 && j == kw / 2 ? l * temporal.stride[2] : std::int64_t{-1}});
  return taps;
}

// Output position p reads x at stride * p + offset.
inline std::vector<PlacedTap> forward_taps(std::vector<PlacedTap> taps, const Geometry& g) {
  for (PlacedTap& t : taps)
    for (int d = 0; d < 3; ++d) t.place[d] -= g.padding[d];
  return taps;
}

// Position i of x is read from output (i + padding - place) / stride, where that is whole: for the positions residue + stride *
// p these are the taps with (residue + padding - place) divisible by the stride, at output p + offset. Ascending as well.
inline std::vector<PlacedTap> mirrored_taps(const std::vector<PlacedTap>& taps, const Geometry& g,
                                            const std::int64_t residue[3]) {
  std::vector<PlacedTap> found;
  for (auto t = taps.rbegin(); t != taps.rend(); ++t) {
    PlacedTap mirrored = *t;
    bool whole = true;
    for (int d = 0; d < 3; ++d) {
      const std::int64_t distance = residue[d] + g.padding[d] - t->place[d];
      whole = whole && distance % g.stride[d] == 0;
      mirrored.place[d] = distance / g.stride[d];
    }
    if (whole) found.push_back(mirrored);
  }
  return found;
}

// Runs body(residue) for each residue that a position of an input of this size can have.
template <class Body>
void for_residues(const std::int64_t size[3], const Geometry& g, const Body& body) {
  std::int64_t r[3];
  for (r[0] = 0; r[0] < std::min(g.stride[0], size[0]); ++r[0])
    for (r[1] = 0; r[1] < std::min(g.stride[1], size[1]); ++r[1])
      for (r[2] = 0; r[2] < std::min(g.stride[2], size[2]); ++r[2]) body(r);
}

}  // namespace effcore::conv3d
