#ifndef EFFCORE_CUDA_SET_CI
#include "attention/hopper/launch_backward.cuh"

namespace effcore::cuda::attention::hopper {
template struct BackwardKernels<fp16, 128>;
}  // namespace effcore::cuda::attention::hopper
#endif
