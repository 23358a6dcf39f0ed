// Which of the 16-bit dtypes a launcher runs.
#pragma once
#include "common/element.cuh"
#include "effcore/tensor.h"

namespace effcore::cuda::conv3d::hopper {

// run(bf16{}) or run(fp16{}), which say whether they serve. The set of kernels that CI compiles has bfloat16 alone.
template <class Run>
bool run_16bit(DType dtype, Run&& run) {
  if (dtype == DType::bfloat16) return run(bf16{});
#if !defined(EFFCORE_CUDA_SET_CI)
  return run(fp16{});
#else
  return false;
#endif
}

}  // namespace effcore::cuda::conv3d::hopper
