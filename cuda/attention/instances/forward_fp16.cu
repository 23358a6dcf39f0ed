#ifndef EFFCORE_CUDA_SET_CI
#include "attention/instances/instantiate.h"
#include "attention/launch_forward.cuh"

namespace effcore::cuda::attention {
EFFCORE_FORWARD(fp16, 64)
EFFCORE_FORWARD(fp16, 128)
EFFCORE_FORWARD(fp16, 256)
}  // namespace effcore::cuda::attention
#endif
