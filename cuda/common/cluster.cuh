// Clusters of blocks (sm_90 and later), which run at the same time and read each other's shared memory. Elsewhere a cluster is
// a block alone.
#pragma once
#include "common/error.h"

namespace effcore::cuda {

// Every thread of every block of the cluster has come this far, and what they wrote to shared memory is seen.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// What block `rank` of the cluster has where `p` points to in this block's shared memory.
__device__ __forceinline__ float load_of_block(const float* p, int rank) {
#if __CUDA_ARCH__ >= 900
  const auto here = static_cast<unsigned>(__cvta_generic_to_shared(p));
  unsigned at;
  float x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(here), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
  return x;
#else
  return *p;
#endif
}

inline bool has_clusters(const char* function) {
  return device_attribute(cudaDevAttrComputeCapabilityMajor, function) >= 9;
}

// Launches `blocks` blocks in clusters of `cluster`.
template <class Params>
void launch_clusters(const char* function, void (*kernel)(Params), unsigned blocks, int threads, std::size_t shared_bytes,
                     cudaStream_t stream, const Params& params, unsigned cluster) {
  if (blocks == 0) return;
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)), function);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = static_cast<unsigned>(threads);
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, params), function);
}

}  // namespace effcore::cuda
