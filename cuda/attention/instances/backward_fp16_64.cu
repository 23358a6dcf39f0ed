#ifndef EFFCORE_CUDA_SET_CI
#include "attention/instances/instantiate.h"
#include "attention/launch_backward.cuh"

namespace effcore::cuda::attention {
EFFCORE_BACKWARD(fp16, 64)
}  // namespace effcore::cuda::attention
#endif
