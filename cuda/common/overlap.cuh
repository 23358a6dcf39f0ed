// A kernel whose launch overlaps the end of the kernel before it in the stream ("programmatic dependent launch", sm_90 and
// later): it must call wait_for_kernel_before() before it touches what that one reads or writes. Elsewhere an ordinary launch.
// `cluster` (sm_90 and later): blocks that run at once and may read each other's shared memory.
#pragma once
#include "common/error.h"

namespace effcore::cuda {

__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may begin (its blocks wait where they call wait_for_kernel_before) once all blocks of this one have said so.
// Behind a kernel's own wait: what begins early then still finds everything but this kernel's results.
__device__ __forceinline__ void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <class Params>
void launch_overlapping(const char* function, void (*kernel)(Params), dim3 grid, dim3 block, std::size_t shared_bytes,
                        cudaStream_t stream, const Params& params, dim3 cluster = dim3(1, 1, 1)) {
  if (grid.x == 0 || grid.y == 0) return;
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), function);
  cudaLaunchAttribute attribute[2];
  attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[0].val.programmaticStreamSerializationAllowed = 1;
  attribute[1].id = cudaLaunchAttributeClusterDimension;
  attribute[1].val.clusterDim.x = cluster.x, attribute[1].val.clusterDim.y = cluster.y,
  attribute[1].val.clusterDim.z = cluster.z;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = attribute;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, function) >= 9)
    config.numAttrs = cluster.x * cluster.y * cluster.z > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, params), function);
}

}  // namespace effcore::cuda
