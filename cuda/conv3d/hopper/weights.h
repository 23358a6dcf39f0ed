// The gradient of the kernels on sm_90a: called by the host side of the family, which adds the partial sums up.
#pragma once
#include <vector>

#include "conv3d/params.h"
#include "effcore/conv3d_taps.h"
#include "effcore/cuda/launch.h"

namespace effcore::cuda::conv3d::hopper {

struct WeightsProblem {
  TensorView x, dout;
  std::vector<effcore::conv3d::PlacedTap> taps;  // position p reads x at step * p + their offsets
  std::int64_t step[3];
};

// Partial sums [splits][columns / 64][taps][channels / 64] of tiles of 64 columns x 64 channels, both padded to multiples
// of 64. Tiles lie as warpgroups hold them (wgmma.cuh), [columns / 8][upper and lower rows][threads] of two sums, so that warps
// write and read whole lines.
constexpr int sums_of_tile = 64 * 64;

struct PartialSums {
  std::int64_t splits, columns, channels, taps;

  std::size_t bytes() const { return static_cast<std::size_t>(splits * columns * channels * taps) * sizeof(float); }
};

PartialSums partial_sums(std::int64_t positions, std::int64_t columns, std::int64_t channels, std::int64_t taps);

// False where these kernels do not serve it (another dtype, rows that TMA cannot describe): nothing was launched then.
bool weights(const char* function, const WeightsProblem& problem, const PartialSums& sums, const Launch& launch);

}  // namespace effcore::cuda::conv3d::hopper
