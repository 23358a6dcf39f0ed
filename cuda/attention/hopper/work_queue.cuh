// Blocks that stay, one a processor, and draw their next piece of work: while its consumers store the last output, the producer
// fetches what comes next. Pieces are numbered; a block begins with its own number and draws the others from a counter in
// device memory. Without a counter a block does its own piece alone.
#pragma once
#include "common/error.h"
#include "hopper/pipeline.cuh"
#include "hopper/wgmma.cuh"

namespace effcore::cuda::hopper {

// In shared memory, from the producer warp to its consumers.
struct WorkQueue {
  int number[2];
  Ring<2> ring;
};

// The producer warp's end.
class WorkSource {
 public:
  __device__ WorkSource(WorkQueue& queue, int* ticket, int all) : queue_(queue), ticket_(ticket), all_(all) {}

  // Runs load(number) for each of the block's pieces of work.
  template <class Load>
  __device__ __forceinline__ void for_each(Load&& load) {
    for (int number = static_cast<int>(blockIdx.x);;) {
      int next = all_;
      if (threadIdx.x % 32 == 0) {
        if (ticket_ != nullptr && number < all_) next = static_cast<int>(gridDim.x) + atomicAdd(ticket_, 1);
        queue_.ring.wait_empty(turn_);
        queue_.number[turn_.stage] = number;
        Barrier::arrive(&queue_.ring.full[turn_.stage]);
      }
      turn_.next();
      if (number >= all_) return;
      load(number);
      number = __shfl_sync(~0u, next, 0);
    }
  }

 private:
  WorkQueue& queue_;
  int* const ticket_;
  const int all_;
  Turn<2> turn_;
};

// A consumer warp's end.
class WorkSink {
 public:
  __device__ WorkSink(WorkQueue& queue, int all) : queue_(queue), all_(all) {}

  // Runs work(number) for each of the block's pieces of work.
  template <class Work>
  __device__ __forceinline__ void for_each(Work&& work) {
    for (int number = next(); number < all_; number = next()) work(number);
  }

 private:
  __device__ __forceinline__ int next() {
    queue_.ring.wait_full(turn_);
    int number = 0;
    if (threadIdx.x % 32 == 0) {
      number = queue_.number[turn_.stage];
      queue_.ring.release(turn_);
    }
    turn_.next();
    return uniform(number);
  }

  WorkQueue& queue_;
  const int all_;
  Turn<2> turn_;
};

// The blocks to launch for `all` pieces: where there are more than processors and a counter for them, one a processor. The
// counter is zeroed here, and with it so many numbers behind it.
inline unsigned staying_blocks(unsigned all, int*& ticket, const char* function, cudaStream_t stream, std::int64_t behind = 0) {
  const auto processors = static_cast<unsigned>(device_attribute(cudaDevAttrMultiProcessorCount, function));
  if (ticket != nullptr && (all > processors || behind > 0))
    check(cudaMemsetAsync(ticket, 0, static_cast<std::size_t>(1 + behind) * sizeof(int), stream), function);
  if (all <= processors) ticket = nullptr;
  return ticket == nullptr ? all : processors;
}

}  // namespace effcore::cuda::hopper
