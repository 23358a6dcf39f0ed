#ifndef EFFCORE_CUDA_SET_CI
#include "attention/instances/instantiate.h"
#include "attention/launch_decode.cuh"

namespace effcore::cuda::attention {
EFFCORE_DECODE(float, 64)
EFFCORE_DECODE(float, 128)
EFFCORE_DECODE(float, 256)
}  // namespace effcore::cuda::attention
#endif
