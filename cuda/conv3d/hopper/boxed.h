// The rows of a product on sm_90a whose positions are one apart: one box of voxels serves all taps.
#pragma once
#include "conv3d/hopper/rows.h"

namespace effcore::cuda::conv3d::hopper {

// How the positions are cut: sub-tiles of at most 128 positions (t, w, h, batch rows), so many of them a block, whose sums over
// the channels `split` blocks share.
struct BoxedPlan {
  int side[4], subtiles, split;
};

// The plan that a model of the multiprocessors finds fastest; no sub-tiles where none fits.
BoxedPlan plan_boxes(const RowsProblem& problem);

// False where it does not serve the problem (see `rows`): nothing was launched then.
bool boxed_rows(const char* function, const RowsProblem& problem, const BoxedPlan& plan, const Launch& launch);

}  // namespace effcore::cuda::conv3d::hopper
