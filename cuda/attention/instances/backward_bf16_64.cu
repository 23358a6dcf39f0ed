#include "attention/instances/instantiate.h"
#include "attention/launch_backward.cuh"

namespace effcore::cuda::attention {
EFFCORE_BACKWARD(bf16, 64)
}  // namespace effcore::cuda::attention
