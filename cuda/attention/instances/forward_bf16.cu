#include "attention/instances/instantiate.h"
#include "attention/launch_forward.cuh"

namespace effcore::cuda::attention {
EFFCORE_FORWARD(bf16, 64)
#ifndef EFFCORE_CUDA_SET_CI
EFFCORE_FORWARD(bf16, 128)
EFFCORE_FORWARD(bf16, 256)
#endif
}  // namespace effcore::cuda::attention
