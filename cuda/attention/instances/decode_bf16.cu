#include "attention/instances/instantiate.h"
#include "attention/launch_decode.cuh"

namespace effcore::cuda::attention {
EFFCORE_DECODE(bf16, 64)
#ifndef EFFCORE_CUDA_SET_CI
EFFCORE_DECODE(bf16, 128)
EFFCORE_DECODE(bf16, 256)
#endif
}  // namespace effcore::cuda::attention
