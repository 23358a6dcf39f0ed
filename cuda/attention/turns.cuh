// Adding up dq in a fixed order. Every block of keys contributes to the dq of the blocks of queries that see it; float
// additions in any order would give other bits each run, and partial sums of every block of keys would be as large as the
// scores. So the blocks of keys take turns: contribution n of a block of queries waits until n of them are in. Nobody waits for
// a block that has not started: blocks are numbered by a ticket in the order in which they start, and wait only for smaller
// numbers.
//
// Sums are kept in float32 in the order of the accumulators' fragments: 16 bytes a lane, 512 a warp.
#pragma once
#include <cstdint>

namespace effcore::cuda::attention {

__device__ __forceinline__ int load_relaxed(const int* p) {
  int x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ int load_acquire(const int* p) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ __forceinline__ void store_release(int* p, int x) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

// By one thread, before a barrier: until `turn` contributions are in.
__device__ __forceinline__ void wait_for_turn(const int* turns, int turn) {
  while (load_acquire(turns) < turn) {
  }
}

// Adds in L2, with nobody else adding at that time.
__device__ __forceinline__ void add_in_turn(float4* to, const float (&x)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
#else
  const float4 sum = __ldcg(to);
  __stcg(to, make_float4(sum.x + x[0], sum.y + x[1], sum.z + x[2], sum.w + x[3]));
#endif
}

}  // namespace effcore::cuda::attention
