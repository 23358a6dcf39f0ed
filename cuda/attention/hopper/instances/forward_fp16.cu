#include "attention/hopper/instances/instantiate.h"
#include "attention/hopper/launch_forward.cuh"

namespace effcore::cuda::attention::hopper {
#ifndef EFFCORE_CUDA_SET_CI
EFFCORE_HOPPER_FORWARD(fp16, 64)
EFFCORE_HOPPER_FORWARD(fp16, 128)
EFFCORE_HOPPER_FORWARD(fp16, 256)
#endif
}  // namespace effcore::cuda::attention::hopper
