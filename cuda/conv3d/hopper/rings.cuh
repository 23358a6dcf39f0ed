// Rings whose first stages are filled before all barriers are there.
#pragma once
#include "hopper/pipeline.cuh"

namespace effcore::cuda::conv3d::hopper {

namespace sm90 = effcore::cuda::hopper;

constexpr int line_consumers = 2 * 128;  // threads that multiply

// All barriers but `full` of the first `count` stages.
template <int Stages>
__device__ __forceinline__ void init_behind(sm90::Ring<Stages>& ring, int count, int consumers) {
  for (int i = 0; i < Stages; ++i) {
    if (i >= count) sm90::Barrier::init(&ring.full[i], 1);
    sm90::Barrier::init(&ring.empty[i], consumers);
  }
}

}  // namespace effcore::cuda::conv3d::hopper
