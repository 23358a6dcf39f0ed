#include "lowrank/hopper/launch.cuh"

namespace effcore::cuda::lowrank::hopper {
template bool fused_instance<fp16>(const FusedProblem&, const Launch&);
}  // namespace effcore::cuda::lowrank::hopper
