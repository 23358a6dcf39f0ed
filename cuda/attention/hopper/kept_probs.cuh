// How a warp writes its 16 rows of probabilities to kept tiles of 64 x 64 (params.h: probs_tiles): through shared memory, where
// TMA takes them, so that nobody waits for device memory.
#pragma once
#include "attention/hopper/tensor_map.h"
#include "hopper/pipeline.cuh"
#include "hopper/wgmma.cuh"

namespace effcore::cuda::hopper {

template <class T, int buffers>
class KeptProbs {
 public:
  static constexpr int rows = 16, elements = rows * panel_columns;  // of a buffer of a warp

  // `map` has boxes of 16 rows; the warp's rows begin with `row` of all tiles' rows, and have `stored` keys.
  __device__ KeptProbs(T* memory, const CUtensorMap& map, int row, int stored)
      : memory_(memory), map_(map), row_(row), stored_(stored) {}

  // A packed tile (softmax.cuh) of keys key0 ...
  template <int Blocks>
  __device__ __forceinline__ void store(const std::uint32_t (&probs)[Blocks][4], int key0) {
    constexpr int tile_blocks = panel_columns / 16;
    const int lane = threadIdx.x % 32, place = lane % 16, across = lane / 16;  // the row and chunk that the lane addresses
#pragma unroll
    for (int tile = 0; tile < Blocks / tile_blocks; ++tile) {
      const int key = key0 + tile * panel_columns;
      if (key >= stored_) return;
      T* const buffer = memory_ + next_ * elements;
      next_ = next_ + 1 == buffers ? 0 : next_ + 1;
      if (lane == 0) cute::tma_store_wait<buffers - 1>();
      __syncwarp();
      const std::uint32_t to = shared_address(buffer) + place * panel_row_bytes;
#pragma unroll
      for (int j = 0; j < tile_blocks; ++j) {
        const auto& x = probs[tile * tile_blocks + j];
        asm volatile(
            "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + ((2 * j + across) ^ place % 8) * 16),
            "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
            : "memory");
      }
      fence_async();
      __syncwarp();
      if (lane == 0) {
        // Evicted first, or P drives keys and values out of L2 (1 %).
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3}], [%1], %4;" ::"l"(
                         reinterpret_cast<std::uint64_t>(&map_)),
                     "r"(shared_address(buffer)), "r"(0), "r"(row_ + key), "l"(static_cast<std::uint64_t>(Keep::first))
                     : "memory");
        cute::tma_store_arrive();
      }
    }
  }

  // Before the block ends: TMA has read everything.
  __device__ __forceinline__ void finish() {
    if (threadIdx.x % 32 == 0) cute::tma_store_wait<0>();
  }

 private:
  T* const memory_;
  const CUtensorMap& map_;
  const int row_, stored_;
  int next_ = 0;
};

}  // namespace effcore::cuda::hopper
