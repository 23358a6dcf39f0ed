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

template <int Stages>
__device__ __forceinline__ bool is_full(sm90::Ring<Stages>& ring, const sm90::Turn<Stages>& turn) {
  return sm90::Barrier::test_wait(&ring.full[turn.stage], turn.phase, 1);
}

}  // namespace effcore::cuda::conv3d::hopper
