#include "attention/hopper/launch_backward.cuh"

namespace effcore::cuda::attention::hopper {
template struct BackwardKernels<bf16, 64>;
}  // namespace effcore::cuda::attention::hopper
