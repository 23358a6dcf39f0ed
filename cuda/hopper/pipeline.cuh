// How a producer warp hands tiles to consumer warpgroups: rings of stages in shared memory, filled by TMA, each with a barrier
// `full` (the bytes have arrived) and a barrier `empty` (every consumer is done).
#pragma once
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>
#include <cute/arch/copy_sm90_tma.hpp>

namespace effcore::cuda::hopper {

using Barrier = cutlass::arch::ClusterTransactionBarrier;
using BarrierWord = Barrier::ValueType;

// For what is read or stored behind it: CUTLASS's wait alone does not keep the compiler from doing that before.
__device__ __forceinline__ void wait_for(const BarrierWord* barrier, std::uint32_t phase) {
  Barrier::wait(barrier, phase);
  asm volatile("" ::: "memory");
}

// What the L2 does with a tile: read by many blocks, or by this one alone.
enum class Keep : std::uint64_t { last = 0x14F0000000000000, first = 0x12F0000000000000 };

// Position in a ring of `Stages`.
template <int Stages>
struct Turn {
  int stage = 0;
  std::uint32_t phase = 0;
  __device__ __forceinline__ void next(int stages = Stages) {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

template <int Stages>
struct Ring {
  BarrierWord full[Stages], empty[Stages];

  // By one thread, before a barrier of the block. `producers` and `consumers` arrive at a stage.
  __device__ __forceinline__ void init(int consumers, int producers = 1) {
    for (int i = 0; i < Stages; ++i) {
      Barrier::init(&full[i], producers);
      Barrier::init(&empty[i], consumers);
    }
  }
  __device__ __forceinline__ void wait_empty(const Turn<Stages>& turn) { wait_for(&empty[turn.stage], turn.phase ^ 1); }
  __device__ __forceinline__ void wait_full(const Turn<Stages>& turn) { wait_for(&full[turn.stage], turn.phase); }
  __device__ __forceinline__ void expect(const Turn<Stages>& turn, int bytes) {
    Barrier::arrive_and_expect_tx(&full[turn.stage], static_cast<std::uint32_t>(bytes));
  }
  // By one thread of each consumer, when its reads have ended.
  __device__ __forceinline__ void release(const Turn<Stages>& turn) { Barrier::arrive(&empty[turn.stage]); }
};

// Makes ordinary stores to shared memory visible to wgmma and TMA; a barrier follows.
__device__ __forceinline__ void fence_async() {
  cutlass::arch::fence_view_async_shared();
}

}  // namespace effcore::cuda::hopper
