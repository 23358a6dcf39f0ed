// What happens to the sums of frames.cuh: from one warpgroup to the other, and out to memory; and what blocks of a cluster say
// to each other.
#pragma once
#include <cutlass/arch/barrier.h>

#include <cstdint>

#include "common/element.cuh"
#include "common/tile.cuh"
#include "conv3d/hopper/rings.cuh"

namespace effcore::cuda::conv3d::hopper {

constexpr int frame_positions = 216, part_of_positions = 104;  // the first warpgroup's part
constexpr int bytes_for_first = part_of_positions * 64 * 4, bytes_for_second = (frame_positions - part_of_positions) * 64 * 4;

// The cluster's barrier; threads that have ended need not come.
__device__ __forceinline__ void arrive_in_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void wait_in_cluster() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// At a barrier of block `of` of the cluster.
__device__ __forceinline__ void arrive_at(sm90::BarrierWord* barrier, int of) {
  cutlass::arch::ClusterBarrier::arrive(barrier, static_cast<std::uint32_t>(of), 1);
}

// A warpgroup's sums of the positions `From` to `To`, four of a thread side by side.
template <int From, int To>
__device__ __forceinline__ void give_sums(const float (&sums)[frame_positions / 2], char* to) {
#pragma unroll
  for (int i = From / 2; i < To / 2; i += 4)
    reinterpret_cast<float4*>(to)[(i - From / 2) * 32 + threadIdx.x % 128] =
        make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
}

template <int From, int To>
__device__ __forceinline__ void add_sums(float (&sums)[frame_positions / 2], const char* from) {
#pragma unroll
  for (int i = From / 2; i < To / 2; i += 4) {
    const float4 x = reinterpret_cast<const float4*>(from)[(i - From / 2) * 32 + threadIdx.x % 128];
    sums[i] += x.x, sums[i + 1] += x.y, sums[i + 2] += x.z, sums[i + 3] += x.w;
  }
}

// Results of the positions `From` to `To` to shared memory: a row of 64 columns a position, its pieces of 8 swizzled.
template <class T, int From, int To>
__device__ __forceinline__ void stage_lines(const float (&sums)[frame_positions / 2], char* to, const float (&add)[2]) {
  const int lane = threadIdx.x % 32, piece = threadIdx.x % 128 / 32 * 2 + lane / 8 % 2, row = lane % 8;
  const std::uint32_t at = shared_address(to + (lane / 16 * 8 + row) * 128 + (piece ^ row) * 16);
#pragma unroll
  for (int n = From / 8; n < To / 8; n += 2) {
    const std::uint32_t a = pack<T>(sums[4 * n] + add[0], sums[4 * n + 1] + add[0]);
    const std::uint32_t b = pack<T>(sums[4 * n + 2] + add[1], sums[4 * n + 3] + add[1]);
    if (n + 1 < To / 8) {
      const std::uint32_t c = pack<T>(sums[4 * n + 4] + add[0], sums[4 * n + 5] + add[0]);
      const std::uint32_t d = pack<T>(sums[4 * n + 6] + add[1], sums[4 * n + 7] + add[1]);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at + n * 1024), "r"(a),
                   "r"(b), "r"(c), "r"(d)
                   : "memory");
    } else {
      asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at + n * 1024), "r"(a), "r"(b)
                   : "memory");
    }
  }
}

// By both warpgroups: such rows to where they belong, of each no more than `columns`.
template <class T, int Positions>
__device__ __forceinline__ void store_staged(const char* from, const int* offset, T* to, int columns) {
  const int piece = threadIdx.x % 8;
#pragma unroll
  for (int begin = 0; begin < Positions; begin += line_consumers / 8) {
    const int i = begin + threadIdx.x / 8, at = i < Positions ? offset[i] : -1;
    const uint4 x = *reinterpret_cast<const uint4*>(from + i * 128 + (piece ^ i % 8) * 16);
    if (at >= 0 && piece * 8 < columns) *reinterpret_cast<uint4*>(to + std::int64_t{at} * 8 + piece * 8) = x;
  }
}

}  // namespace effcore::cuda::conv3d::hopper
