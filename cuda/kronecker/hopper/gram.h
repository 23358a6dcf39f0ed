// Gram matrices on sm_90a: called by the host side of the family, which sums the partial results.
#pragma once
#include "effcore/tensor.h"
#include "kronecker/gram.cuh"

namespace effcore::cuda::kronecker::hopper {

// False where this kernel does not serve it (another dtype, rows that TMA cannot describe): nothing was launched then.
bool grouped_gram(const char* function, const GramParams& p, DType dtype, cudaStream_t stream);

}  // namespace effcore::cuda::kronecker::hopper
