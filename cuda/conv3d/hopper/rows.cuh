// out[position, n] = bias[n] + sum over taps and channels of G[position, (tap, c)] W[(tap, c), n] on sm_90a, at strides that
// TMA takes.
//
// Bound: 2 * taps * channels FLOPs an output on the tensor cores (4096 a cycle and multiprocessor), or the second-level cache
// (about 5 TB/s), from which blocks read voxels and weights again and again. Reading 128 voxels for each of 11 taps would bound
// 64 columns to 44 FLOPs a byte, 240 TFLOP/s. Therefore:
//
// A block computes 128 positions, a box (boxes.h) with kernel_h - 1 more lines: 3 boxes with a halo and 2 without serve 11
// taps. Weights come as tiles [Columns, 64 channels], one a tap. The blocks of a cluster share what they read: the weights
// those of neighbouring boxes, the voxels those of neighbouring columns.
//
// A producer warp fills two rings by TMA; two warpgroups multiply 64 positions each. Two blocks share a multiprocessor: one
// multiplies while the other begins or ends.
#pragma once
#include <cuda.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "common/overlap.cuh"
#include "conv3d/hopper/boxes.h"
#include "hopper/pipeline.cuh"
#include "hopper/wgmma.cuh"

namespace effcore::cuda::conv3d::hopper {

namespace sm90 = effcore::cuda::hopper;

constexpr int rows_of_block = 128, consumers = 2 * 128, rows_threads = consumers + 32, max_groups = 64, voxel_stages = 2;

// Taps that share a box: they are neighbours along h.
struct Group {
  std::int16_t t, h, w, first, taps;  // numbers[first ...]
};

struct TiledRowsParams {
  CUtensorMap box, box_with_halo, weights;
  Tiling tiling;
  int voxel_bytes;     // of a stage
  int groups, blocks;  // blocks: of 64 channels
  int box_bytes, halo_bytes;
  int padded_columns, columns;
  void* out;
  std::int64_t out_stride[4];  // b, t, h, w
  bool out_aligned;
  const void* bias;
  std::int64_t bias_stride;
  Group group[max_groups];
  std::int16_t number[max_taps];
};

template <int Columns>
constexpr int weight_stages = Columns == 64 ? 5 : 3;

template <int Columns>
struct RowsRings {
  sm90::Ring<voxel_stages> voxels;
  sm90::Ring<weight_stages<Columns>> weights;
};

// Of one block: voxels, weights, barriers.
template <int Columns>
constexpr int rows_shared_bytes(int voxel_bytes) {
  return voxel_stages * voxel_bytes + weight_stages<Columns> * Columns * 128 + static_cast<int>(sizeof(RowsRings<Columns>));
}

template <class T, int Columns>
__global__ void __launch_bounds__(rows_threads, 2) conv3d_rows_kernel(const __grid_constant__ TiledRowsParams p) {
  constexpr int weight_bytes = Columns * 128;
  extern __shared__ __align__(1024) char memory[];
  char* const weight_memory = memory + voxel_stages * p.voxel_bytes;
  auto& rings = *reinterpret_cast<RowsRings<Columns>*>(weight_memory + weight_stages<Columns> * weight_bytes);
  const dim3 cluster = cute::cluster_shape(), place = cute::block_id_in_cluster();
  const int tiles = static_cast<int>(cluster.x), x = static_cast<int>(place.x), y = static_cast<int>(place.y);
  const sm90::Sharers of_weights{tiles, x, y * tiles, 1}, of_voxels{static_cast<int>(cluster.y), y, x, tiles};
  if (threadIdx.x == 0) {
    rings.voxels.init(2 * of_voxels.count);
    rings.weights.init(2 * of_weights.count);
    cutlass::arch::fence_barrier_init();
  }
  cute::cluster_sync();

  const Corner at = p.tiling.corner(static_cast<int>(blockIdx.x));
  const int first_column = blockIdx.y * Columns;
  sm90::Turn<voxel_stages> voxel_turn;
  sm90::Turn<weight_stages<Columns>> weight_turn;

  if (threadIdx.x >= consumers) {
    if (threadIdx.x != consumers) return;
    constexpr auto keep = static_cast<std::uint64_t>(sm90::Keep::last);
    int voxels_loaded = 0, weights_loaded = 0;
    for (int i = 0; i < p.groups; ++i) {
      const Group& group = p.group[i];
      const bool halo = group.taps > 1;
      const CUtensorMap* const map = halo ? &p.box_with_halo : &p.box;
      const int w = at.w * p.tiling.step[2] + group.w, t = at.t * p.tiling.step[0] + group.t,
                h = at.h * p.tiling.step[1] + group.h;
      for (int block = 0; block < p.blocks; ++block) {
        rings.voxels.wait_empty(voxel_turn);
        rings.voxels.expect(voxel_turn, halo ? p.halo_bytes : p.box_bytes);
        sm90::BarrierWord* const voxels_full = &rings.voxels.full[voxel_turn.stage];
        char* const voxels_to = memory + voxel_turn.stage * p.voxel_bytes;
        if (of_voxels.count == 1)
          cute::SM90_TMA_LOAD_5D::copy(map, voxels_full, keep, voxels_to, block * 64, w, t, at.b, h);
        else if (of_voxels.fetches(voxels_loaded))
          cute::SM90_TMA_LOAD_MULTICAST_5D::copy(map, voxels_full, of_voxels.mask(), keep, voxels_to, block * 64, w, t, at.b,
                                                 h);
        voxel_turn.next(), ++voxels_loaded;
        if (weights_loaded == 0) wait_for_kernel_before();  // which packs them
        for (int tap = 0; tap < group.taps; ++tap) {
          rings.weights.wait_empty(weight_turn);
          rings.weights.expect(weight_turn, weight_bytes);
          sm90::BarrierWord* const weights_full = &rings.weights.full[weight_turn.stage];
          char* const weights_to = weight_memory + weight_turn.stage * weight_bytes;
          const int row = p.number[group.first + tap] * p.padded_columns + first_column;
          if (of_weights.count == 1)
            cute::SM90_TMA_LOAD_2D::copy(&p.weights, weights_full, keep, weights_to, block * 64, row);
          else if (of_weights.fetches(weights_loaded))
            cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&p.weights, weights_full, of_weights.mask(), keep, weights_to, block * 64,
                                                   row);
          weight_turn.next(), ++weights_loaded;
        }
      }
    }
    return;
  }

  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  float sums[Columns / 2];
#pragma unroll
  for (int i = 0; i < Columns / 2; ++i) sums[i] = 0.0f;
  // What the product under way reads is released behind the next one.
  sm90::Turn<voxel_stages> read_voxels;
  sm90::Turn<weight_stages<Columns>> read_weights;
  bool weights_read = false, voxels_read = false;
  const auto release = [&] {
    if (weights_read) rings.weights.release(read_weights, of_weights, thread);
    if (voxels_read) rings.voxels.release(read_voxels, of_voxels, thread);
  };
  for (int i = 0; i < p.groups; ++i) {
    const int taps = p.group[i].taps;
    for (int block = 0; block < p.blocks; ++block) {
      rings.voxels.wait_full(voxel_turn);
      const std::uint32_t voxels =
          shared_address(memory + voxel_turn.stage * p.voxel_bytes) + static_cast<std::uint32_t>(warpgroup * 64 * 128);
      for (int tap = 0; tap < taps; ++tap) {
        rings.weights.wait_full(weight_turn);
        const sm90::SharedOperand<false> a(voxels + static_cast<std::uint32_t>(tap * p.tiling.line * 128), 64, false);
        const sm90::SharedOperand<false> b(shared_address(weight_memory + weight_turn.stage * weight_bytes), Columns, false);
        sm90::pin(sums);
        sm90::wgmma_begin();
        sm90::multiply<T, Columns, 4, false, false>(sums, a, b, true);
        sm90::wgmma_commit();
        sm90::wgmma_wait<1>();
        release();
        read_weights = weight_turn, weights_read = true;
        read_voxels = voxel_turn, voxels_read = tap + 1 == taps;
        weight_turn.next();
      }
      voxel_turn.next();
    }
  }
  sm90::wgmma_wait<0>();
  sm90::pin(sums);
  cute::cluster_arrive();  // no block ends while another may still release tiles to it

  // Both warpgroups are done with the voxels: their memory takes the results, of which whole lines leave.
  asm volatile("bar.sync 1, 256;" ::: "memory");
  const Tile<T, Columns> result(memory);
  const int lane = thread % 32, row = warpgroup * 64 + thread / 32 * 16 + lane / 4;
  const T* const bias = static_cast<const T*>(p.bias);
#pragma unroll
  for (int n = 0; n < Columns / 8; ++n) {
    const int column = 8 * n + lane % 4 * 2;
    float add[2] = {};
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (bias != nullptr && first_column + column + e < p.columns)
        add[e] = to_float(bias[(first_column + column + e) * p.bias_stride]);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      store_pair(result.at(row + 8 * half, column), 0, 2, true, sums[4 * n + 2 * half] + add[0],
                 sums[4 * n + 2 * half + 1] + add[1]);
  }
  asm volatile("bar.sync 1, 256;" ::: "memory");
  constexpr int pieces = Columns / 8;
  T* const out = static_cast<T*>(p.out) + first_column;
  for (int i = threadIdx.x; i < rows_of_block * pieces; i += consumers) {
    const int r = i / pieces, column = i % pieces * 8;
    const Tiling& tiling = p.tiling;
    const int w = at.w + (r & ((1 << tiling.log_w) - 1)), t = at.t + (r >> tiling.log_w & ((1 << tiling.log_t) - 1)),
              b = at.b + (r >> (tiling.log_w + tiling.log_t) & ((1 << tiling.log_b) - 1)),
              h = at.h + (r >> (tiling.log_w + tiling.log_t + tiling.log_b));
    if (w >= tiling.grid[2] || t >= tiling.grid[0] || b >= tiling.batch || h >= tiling.grid[1]) continue;
    T* const to = out + b * p.out_stride[0] + t * p.out_stride[1] + h * p.out_stride[2] + w * p.out_stride[3] + column;
    const T* const from = result.at(r, column);
    if (p.out_aligned) {
      if (first_column + column < p.columns) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (first_column + column + e < p.columns) to[e] = from[e];
    }
  }
  cute::cluster_wait();
}

}  // namespace effcore::cuda::conv3d::hopper
