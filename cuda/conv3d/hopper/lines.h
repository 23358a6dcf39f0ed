// Whole lines of positions at a time on sm_90a, for products of many columns; see lines.cuh.
#pragma once
#include "conv3d/hopper/rows.h"

namespace effcore::cuda::conv3d::hopper {

// False where this kernel does not serve it, or another would be faster: nothing was launched then.
bool lines(const char* function, const RowsProblem& problem, const Launch& launch);

}  // namespace effcore::cuda::conv3d::hopper
