#include "attention/hopper/instances/instantiate.h"
#include "attention/hopper/launch_forward.cuh"

namespace effcore::cuda::attention::hopper {
EFFCORE_HOPPER_FORWARD(bf16, 64)
#ifndef EFFCORE_CUDA_SET_CI
EFFCORE_HOPPER_FORWARD(bf16, 128)
EFFCORE_HOPPER_FORWARD(bf16, 256)
#endif
}  // namespace effcore::cuda::attention::hopper
