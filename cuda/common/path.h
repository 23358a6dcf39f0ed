// Which kernels serve a dtype on the current GPU: what a family's dispatch goes by, and what its `path` tells `effcore doctor`.
#pragma once
#include "common/error.h"
#include "effcore/tensor.h"

namespace effcore::cuda {

// Whether the kernels for sm_90a (the folders hopper/) serve 16-bit dtypes on the current GPU, as far as the arguments allow.
// EFFCORE_CUDA_PORTABLE=1 leaves them out, for tests and comparisons.
inline bool on_hopper(const char* function) {
#ifdef EFFCORE_HOPPER
  static const bool portable = [] {
    const char* text = std::getenv("EFFCORE_CUDA_PORTABLE");
    return text != nullptr && *text == '1';
  }();
  return !portable && device_attribute(cudaDevAttrComputeCapabilityMajor, function) == 9;
#else
  static_cast<void>(function);
  return false;
#endif
}

// Why no kernel of ours serves the dtype, or null.
inline const char* path_refusal(DType dtype) {
  if (dtype != DType::bfloat16 && dtype != DType::float16 && dtype != DType::float32)
    return "none: not float32, bfloat16 or float16";
  return device_attribute(cudaDevAttrComputeCapabilityMajor, "path") < 8 ? "none: compute capability below 8.0" : nullptr;
}

// Of a family whose products run on tensor cores in 16-bit dtypes, with kernels of their own for sm_90a.
inline const char* product_path(DType dtype) {
  if (const char* none = path_refusal(dtype)) return none;
  if (dtype == DType::float32) return "fma sm_80";
  return on_hopper("path") ? "wgmma sm_90a" : "mma sm_80";
}

}  // namespace effcore::cuda
