// Blocks of a cluster that read each other's shared memory.
#pragma once
#include <cute/arch/cluster_sm90.hpp>

#include "common/tile.cuh"

namespace effcore::cuda::hopper {

// A barrier of the threads of all blocks that have not ended, in halves: what was written before `arrive` is seen after `wait`.
__device__ __forceinline__ void cluster_arrive() {
  cute::cluster_arrive();
}
__device__ __forceinline__ void cluster_wait() {
  cute::cluster_wait();
}

// What block `rank` of the cluster has where `p` points to in this block's shared memory.
__device__ __forceinline__ float4 load_of_block(const float4* p, int rank) {
  std::uint32_t at;
  float4 x;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(shared_address(p)), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(at)
               : "memory");
  return x;
}

}  // namespace effcore::cuda::hopper
