// Gram matrices of ragged groups on NVIDIA GPUs (sm_80 and later): the function of effcore/kronecker.h with the same arguments,
// which the caller has checked, but for the values of the offsets. A group is cut to the rows that x has; groups that overlap
// leave results undefined. float64 is refused. Two runs give identical bits. A failing launch throws std::runtime_error.
#pragma once
#include <cstddef>

#include "effcore/cuda/launch.h"
#include "effcore/kronecker.h"

namespace effcore::cuda::kronecker {

using effcore::kronecker::GroupedGram;

std::size_t workspace_bytes(const GroupedGram& args);

void grouped_gram(const GroupedGram& args, const Launch& launch);

// Which kernels serve this dtype on the current GPU, for `effcore doctor`: "wgmma sm_90a" (where the
// arguments allow it; else as on other GPUs), "mma sm_80", "fma sm_80", or "none: " and why.
const char* path(DType dtype);

}  // namespace effcore::cuda::kronecker
