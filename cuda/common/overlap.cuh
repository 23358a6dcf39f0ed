// A kernel whose launch overlaps the end of the kernel before it in the stream ("programmatic dependent launch", sm_90 and
// later): it must call wait_for_kernel_before() before it touches what that one reads or writes. Elsewhere an ordinary launch.
#pragma once
#include "common/error.h"

namespace effcore::cuda {

__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// By a kernel that is followed by such a one: once every block has called this (or has ended), that kernel's blocks may begin.
__device__ __forceinline__ void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <class Params>
void launch_overlapping(const char* function, void (*kernel)(Params), dim3 grid, dim3 block, std::size_t shared_bytes,
                        cudaStream_t stream, const Params& params) {
  if (grid.x == 0 || grid.y == 0) return;
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), function);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = device_attribute(cudaDevAttrComputeCapabilityMajor, function) >= 9 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), function);
}

}  // namespace effcore::cuda
