// Whole lines of positions at a time on sm_90a, for products of many columns; see lines.cuh and frames.cuh.
#pragma once
#include "conv3d/hopper/boxes.h"
#include "conv3d/hopper/rows.h"

namespace effcore::cuda::conv3d::hopper {

// False where these kernels do not serve it, or another would be faster: nothing was launched then.
bool lines(const char* function, const RowsProblem& problem, const Launch& launch);

// The same, of pairs of frames, each tile by two blocks; false where it does not serve it.
bool frames(const char* function, const RowsProblem& problem, const Lines& lines, const std::vector<FrameOfTaps>& frames,
            const Launch& launch);

// Maps of the kernels where they lie, or of the packed ones, in boxes of 64 channels and `rows` columns, or of 64 columns and
// `rows` channels where they stand as rows of columns. False where the copy engine cannot read them.
bool encode_weights(CUtensorMap maps[2], const RowsProblem& problem, int rows);
bool transposed(const RowsProblem& problem);

// In which of the maps a tap's weights lie, and where in it, and those that are added to them, in the second map: -1 for none.
struct PlaceOfWeights {
  std::int16_t map, number, added;
};
PlaceOfWeights place_of_weights(const RowsProblem& problem, const effcore::conv3d::PlacedTap& tap);

}  // namespace effcore::cuda::conv3d::hopper
