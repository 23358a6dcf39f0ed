// out[patch, n] = bias[n] + sum over a patch's voxels of x[patch, voxel] W[n, voxel] on sm_90a: the product of a convolution whose
// stride is its kernel, without the matrix of patches.
//
// Bound: 2 K O FLOPs a patch on the tensor cores (4096 a cycle and multiprocessor): reading the voxels and writing the result
// are a third of it for tubelets of 2 x 16² and 768 channels. So this must be as good a product as the library's, and the
// gathering must cost nothing: the copy engine does it.
//
// A patch's line of kw voxels (a segment: 32, 64 or 128 bytes) is the unit. The copy engine's im2col mode walks a tensor's
// positions in order, across lines, frames and batch, and brings a few channels of each: here positions are patches, and the
// "channels" are all voxels from a patch's first one on, at distance 1. Their coordinate says which segment is meant, and their
// strides overlap, which the engine does not mind. It writes a segment of all patches of a tile one below the other in the
// swizzle of that width, which wgmma reads as rows along the depth. So any 256 patches in a row make a tile, whatever the sizes.
//
// A cluster of two blocks computes 256 patches times two panels of columns; each fetches half of the patches' segments for
// both, and its own columns' weights: 26 bytes a cycle from the second-level cache at 192 columns a block.
#pragma once
#include <cuda.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "common/overlap.cuh"
#include "conv3d/params.h"
#include "hopper/pipeline.cuh"
#include "hopper/wgmma.cuh"

namespace effcore::cuda::conv3d::hopper {

namespace sm90 = effcore::cuda::hopper;

constexpr int patch_rows = 256, patch_depth = 64, patch_stages = 4, patch_blocks = 2;  // of a tile, a step, a ring, a cluster
constexpr int patch_consumers = 2, patch_threads = (patch_consumers + 1) * 128;
constexpr int patch_registers = 240, patch_fetching_registers = 24;

struct PatchesParams {
  CUtensorMap x, weight;
  Divider volume, frame, line;  // patches of a batch row, a frame, a line
  int rows, columns, tiles, pairs;  // tiles of rows, pairs of panels of columns
  int steps, segments, segment_bytes;
  std::uint64_t layout;              // of the segments' swizzle, for wgmma
  int kernel[2];                     // t, h
  int step_c, step_t, step_h, segment;  // elements
  const void* bias;
  std::int64_t bias_stride;
  void* out;
};

template <int Columns>
struct PatchesMemory {
  static constexpr int x_bytes = patch_rows * patch_depth * 2, weight_bytes = Columns * patch_depth * 2;
  char x[patch_stages][x_bytes], weight[patch_stages][weight_bytes];
  sm90::Ring<patch_stages> ring;
};

// Rows of segments as an operand: block k of 16 along the depth is in segment k * 32 / bytes.
struct SegmentOperand {
  std::uint32_t low, step[4];
  std::uint64_t high;

  __device__ __forceinline__ explicit SegmentOperand(const PatchesParams& p)
      : low(0), high(p.layout | static_cast<std::uint64_t>(p.segment_bytes * 8 / 16) << 32 | 1 << 16) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int byte = k * 32, in_segment = byte & (p.segment_bytes - 1);
      step[k] = static_cast<std::uint32_t>(((byte - in_segment) * patch_rows + in_segment) / 16);
    }
  }
  __device__ __forceinline__ std::uint64_t at(std::uint32_t address, int k) const {
    return high | (((address & 0x3ffff) >> 4) + step[k]);
  }
};

template <int Columns>
__device__ __forceinline__ void fetch_patches(const PatchesParams& p, PatchesMemory<Columns>& shared, int cluster, int clusters,
                                              int rank) {
  constexpr int rows = patch_rows / patch_blocks;
  constexpr auto keep = static_cast<std::uint64_t>(sm90::Keep::last);
  using Memory = PatchesMemory<Columns>;
  sm90::Turn<patch_stages> turn;
  for (int item = cluster; item < p.tiles * p.pairs; item += clusters) {
    const int column = (item % p.pairs * patch_blocks + rank) * Columns;
    int w = item / p.pairs * patch_rows + rank * rows;
    const int b = p.volume.take(w), t = p.frame.take(w), h = p.line.take(w);
    int at_h = 0, at_t = 0, voxel = 0;
    for (int step = 0; step < p.steps; ++step) {
      shared.ring.wait_empty(turn);
      shared.ring.expect(turn, Memory::x_bytes + Memory::weight_bytes);
      sm90::BarrierWord* const full = &shared.ring.full[turn.stage];
      cute::SM90_TMA_LOAD_2D::copy(&p.weight, full, keep, shared.weight[turn.stage], step * patch_depth, column);
      for (int i = 0; i < p.segments; ++i) {
        cute::SM90_TMA_LOAD_IM2COL_MULTICAST_5D::copy(&p.x, full, (1 << patch_blocks) - 1,
                                                      shared.x[turn.stage] + (i * patch_rows + rank * rows) * p.segment_bytes,
                                                      voxel, w, h, t, b, 0, 0, 0);
        voxel += p.step_h;
        if (++at_h < p.kernel[1]) continue;
        at_h = 0, voxel += p.step_t - p.kernel[1] * p.step_h;
        if (++at_t < p.kernel[0]) continue;
        at_t = 0, voxel += p.step_c - p.kernel[0] * p.step_t;
      }
      turn.next();
    }
  }
}

// The four threads of a row exchange pairs of columns: thread t gets all of block t, eight neighbouring columns.
__device__ __forceinline__ uint4 columns_of_quad(const std::uint32_t (&x)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  // Neighbours swap so that each has two pairs of two of the blocks, then the halves of the quad do.
  const std::uint32_t a = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1), b = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
  const std::uint32_t y[4] = {odd ? a : x[0], odd ? x[1] : a, odd ? b : x[2], odd ? x[3] : b};
  const std::uint32_t c = __shfl_xor_sync(~0u, high ? y[0] : y[2], 2), d = __shfl_xor_sync(~0u, high ? y[1] : y[3], 2);
  return high ? make_uint4(c, d, y[2], y[3]) : make_uint4(y[0], y[1], c, d);
}

// 64 rows, from `row` on in this thread.
template <class T, int Columns>
__device__ __forceinline__ void store_patches(const PatchesParams& p, const float (&sums)[Columns / 2], int row, int column) {
  const auto* const bias = static_cast<const T*>(p.bias);
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < Columns / 8; n += 4) {
    std::uint32_t upper[4], lower[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float add[2] = {};
      if (bias != nullptr) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (const int at = column + (n + i) * 8 + lane * 2 + e; at < p.columns) add[e] = to_float(bias[at * p.bias_stride]);
      }
      const float* const x = sums + 4 * (n + i);
      upper[i] = pack<T>(x[0] + add[0], x[1] + add[1]), lower[i] = pack<T>(x[2] + add[0], x[3] + add[1]);
    }
    const uint4 up = columns_of_quad(upper), low = columns_of_quad(lower);
    const int at = column + (n + lane) * 8;
    if (at >= p.columns) continue;
    T* const to = static_cast<T*>(p.out) + static_cast<std::int64_t>(row) * p.columns + at;
    if (row < p.rows) *reinterpret_cast<uint4*>(to) = up;
    if (row + 8 < p.rows) *reinterpret_cast<uint4*>(to + static_cast<std::int64_t>(8) * p.columns) = low;
  }
}

template <class T, int Columns>
__global__ void __cluster_dims__(patch_blocks, 1, 1) __launch_bounds__(patch_threads, 1)
    conv3d_patches_kernel(const __grid_constant__ PatchesParams p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<PatchesMemory<Columns>*>(memory);
  if (threadIdx.x == 0) {
    shared.ring.init(patch_blocks * patch_consumers);
    cutlass::arch::fence_barrier_init();
  }
  cute::cluster_sync();
  wait_for_kernel_before();
  const int rank = static_cast<int>(cute::block_rank_in_cluster());
  const int cluster = static_cast<int>(blockIdx.x) / patch_blocks, clusters = static_cast<int>(gridDim.x) / patch_blocks;
  const int warpgroup = sm90::uniform(static_cast<int>(threadIdx.x) / 128);
  if (warpgroup == patch_consumers) {
    cutlass::arch::warpgroup_reg_dealloc<patch_fetching_registers>();
    if (threadIdx.x == patch_consumers * 128) fetch_patches(p, shared, cluster, clusters, rank);
    __syncwarp();
  } else {
    cutlass::arch::warpgroup_reg_alloc<patch_registers>();
    SegmentOperand x(p);
    sm90::Turn<patch_stages> turn, read;
    const auto release = [&] {  // to the producers of both blocks
      if (threadIdx.x % 128 < patch_blocks) sm90::Barrier::arrive(&shared.ring.empty[read.stage], threadIdx.x % 128, 1);
    };
    for (int item = cluster; item < p.tiles * p.pairs; item += clusters) {
      float upper[Columns / 2], lower[Columns / 2];
      for (int step = 0; step < p.steps; ++step) {
        shared.ring.wait_full(turn);
        const std::uint32_t rows = static_cast<std::uint32_t>(warpgroup * 128 * p.segment_bytes);
        const std::uint32_t a = shared_address(shared.x[turn.stage]) + rows;
        const sm90::SharedOperand<false> b(shared_address(shared.weight[turn.stage]), Columns, false);
        using Atom = typename sm90::Instruction<T, Columns, sm90::gmma::Major::K, sm90::gmma::Major::K>::Shared;
        sm90::pin(upper), sm90::pin(lower);
        sm90::wgmma_begin();
        [&]<int... I>(std::integer_sequence<int, I...>) {
#pragma unroll
          for (int k = 0; k < patch_depth / 16; ++k) {
            const auto scale = k > 0 || step > 0 ? sm90::gmma::ScaleOut::One : sm90::gmma::ScaleOut::Zero;
            Atom::fma(x.at(a, k), b.at(k), upper[I]..., scale);
            Atom::fma(x.at(a + 64 * p.segment_bytes, k), b.at(k), lower[I]..., scale);
          }
        }(std::make_integer_sequence<int, Columns / 2>{});
        sm90::wgmma_commit();
        sm90::wgmma_wait<1>();
        if (step > 0) release();
        read = turn;
        turn.next();
      }
      sm90::wgmma_wait<0>();
      sm90::pin(upper), sm90::pin(lower);
      release();
      const int row = item / p.pairs * patch_rows + warpgroup * 128 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
      const int column = (item % p.pairs * patch_blocks + rank) * Columns;
      store_patches<T, Columns>(p, upper, row, column);
      store_patches<T, Columns>(p, lower, row + 64, column);
    }
  }
  cute::cluster_sync();  // nobody ends while the other block still writes its memory or signals its barriers
}

}  // namespace effcore::cuda::conv3d::hopper
