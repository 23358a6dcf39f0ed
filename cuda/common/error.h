// A CUDA call that fails is an exception that names the function.
#pragma once
#include <cuda_runtime.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace effcore::cuda {

inline void check(cudaError_t error, const char* function) {
  if (error != cudaSuccess) [[unlikely]]
    throw std::runtime_error(std::string("effcore.") + function + ": CUDA error: " + cudaGetErrorString(error));
}

inline void check_launch(const char* function) {
  check(cudaGetLastError(), function);
}

// Launches a kernel that may need more than the default 48 KiB of dynamic shared memory.
template <class Params>
void launch(const char* function, void (*kernel)(Params), unsigned blocks, int threads, std::size_t shared_bytes,
            cudaStream_t stream, const Params& params) {
  if (blocks == 0) return;
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), function);
  kernel<<<blocks, threads, shared_bytes, stream>>>(params);
  check_launch(function);
}

inline int device_attribute(cudaDeviceAttr attribute, const char* function) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), function);
  check(cudaDeviceGetAttribute(&value, attribute, device), function);
  return value;
}

// Shared memory that a block may have. EFFCORE_CUDA_SHARED_KIB lowers it, so that tests reach the kernels of smaller GPUs.
inline int shared_memory_limit(const char* function) {
  static const int forced = [] {
    const char* text = std::getenv("EFFCORE_CUDA_SHARED_KIB");
    return text != nullptr ? std::atoi(text) * 1024 : 0;
  }();
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, function);
  return forced > 0 && forced < limit ? forced : limit;
}

}  // namespace effcore::cuda
