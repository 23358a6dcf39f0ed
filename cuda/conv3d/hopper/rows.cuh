// out[position, n] = bias[n] + sum over taps and channels of G[position, (tap, c)] W[(tap, c), n] on sm_90a, at strides that
// TMA takes: what lines.cuh does not serve, such as steps above 1 along h and w.
//
// Bound: 2 * taps * channels FLOPs an output on the tensor cores (4096 a cycle and multiprocessor), or the second-level cache
// (about 5 TB/s), from which blocks read voxels and weights again and again. Reading 128 voxels for each of 11 taps would bound
// 64 columns to 44 FLOPs a byte, 240 TFLOP/s. Therefore:
//
// A block computes 128 or 256 positions, a box (boxes.h) with kernel_h - 1 more lines: 3 boxes with a halo and 2 without serve
// 11 taps. Weights come as tiles [Columns, 64 channels], one a tap; 256 positions (with 64 columns) halve their part. (Blocks
// of a cluster that fetch for each other by multicast were tried, and wait for each other longer than they save: 10 to 20 %
// slower. So was one box with a halo all around for all taps, gathered into registers by ldmatrix: it reads a third of the
// bytes, but a block takes a multiprocessor alone, where nothing hides its beginning and end: 0 to 60 % slower.)
//
// A producer warp fills two rings by TMA, as deep as there is memory for; two warpgroups multiply 64 or 128 positions each. Two
// blocks share a multiprocessor: one multiplies while the other begins or ends.
#pragma once
#include <cuda.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "common/overlap.cuh"
#include "conv3d/hopper/boxes.h"
#include "hopper/pipeline.cuh"
#include "hopper/wgmma.cuh"

namespace effcore::cuda::conv3d::hopper {

namespace sm90 = effcore::cuda::hopper;

constexpr int consumers = 2 * 128, rows_threads = consumers + 32, max_groups = 64;
constexpr int most_voxel_stages = 4, most_weight_stages = 8;

// Taps that share a box: they are neighbours along h.
struct Group {
  std::int16_t t, h, w, first, taps;  // numbers[first ...]
};

struct TiledRowsParams {
  CUtensorMap box, box_with_halo, weights;
  Tiling tiling;
  int line, voxel_stages, voxel_bytes, weight_stages;
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

struct RowsRings {
  sm90::Ring<most_voxel_stages> voxels;
  sm90::Ring<most_weight_stages> weights;
};

// RowBlocks: of 64 positions, for each of the two warpgroups.
template <class T, int RowBlocks, int Columns>
__global__ void __launch_bounds__(rows_threads, 2) conv3d_rows_kernel(const __grid_constant__ TiledRowsParams p) {
  constexpr int weight_bytes = Columns * 128, rows_of_block = 2 * RowBlocks * 64;
  extern __shared__ __align__(1024) char memory[];
  char* const weight_memory = memory + p.voxel_stages * p.voxel_bytes;
  auto& rings = *reinterpret_cast<RowsRings*>(weight_memory + p.weight_stages * weight_bytes);
  if (threadIdx.x == 0) {
    rings.voxels.init(2);
    rings.weights.init(2);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const Corner at = p.tiling.corner(static_cast<int>(blockIdx.x));
  const int first_column = blockIdx.y * Columns;
  sm90::Turn<most_voxel_stages> voxel_turn;
  sm90::Turn<most_weight_stages> weight_turn;

  if (threadIdx.x >= consumers) {
    if (threadIdx.x != consumers) return;
    constexpr auto keep = static_cast<std::uint64_t>(sm90::Keep::last);
    for (int i = 0; i < p.groups; ++i) {
      const Group& group = p.group[i];
      const bool halo = group.taps > 1;
      const int w = at.w * p.tiling.step[2] + group.w, t = at.t * p.tiling.step[0] + group.t,
                h = at.h * p.tiling.step[1] + group.h;
      for (int block = 0; block < p.blocks; ++block) {
        rings.voxels.wait_empty(voxel_turn);
        rings.voxels.expect(voxel_turn, halo ? p.halo_bytes : p.box_bytes);
        cute::SM90_TMA_LOAD_5D::copy(halo ? &p.box_with_halo : &p.box, &rings.voxels.full[voxel_turn.stage], keep,
                                     memory + voxel_turn.stage * p.voxel_bytes, block * 64, w, t, at.b, h);
        voxel_turn.next(p.voxel_stages);
        if (i == 0 && block == 0) wait_for_kernel_before();  // which packs the weights
        for (int tap = 0; tap < group.taps; ++tap) {
          rings.weights.wait_empty(weight_turn);
          rings.weights.expect(weight_turn, weight_bytes);
          cute::SM90_TMA_LOAD_2D::copy(&p.weights, &rings.weights.full[weight_turn.stage], keep,
                                       weight_memory + weight_turn.stage * weight_bytes, block * 64,
                                       p.number[group.first + tap] * p.padded_columns + first_column);
          weight_turn.next(p.weight_stages);
        }
      }
    }
    return;
  }

  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  float sums[RowBlocks][Columns / 2];
#pragma unroll
  for (int r = 0; r < RowBlocks; ++r)
#pragma unroll
    for (int i = 0; i < Columns / 2; ++i) sums[r][i] = 0.0f;
  const auto pin = [&] {
#pragma unroll
    for (int r = 0; r < RowBlocks; ++r) sm90::pin(sums[r]);
  };
  // What the product under way reads is released behind the next one.
  sm90::Turn<most_voxel_stages> read_voxels;
  sm90::Turn<most_weight_stages> read_weights;
  bool weights_read = false, voxels_read = false;
  const auto release = [&] {
    if (thread == 0 && weights_read) rings.weights.release(read_weights);
    if (thread == 0 && voxels_read) rings.voxels.release(read_voxels);
  };
  for (int i = 0; i < p.groups; ++i) {
    const int taps = p.group[i].taps;
    for (int block = 0; block < p.blocks; ++block) {
      rings.voxels.wait_full(voxel_turn);
      const std::uint32_t voxels = shared_address(memory + voxel_turn.stage * p.voxel_bytes) +
                                   static_cast<std::uint32_t>(warpgroup * RowBlocks * 64 * 128);
      for (int tap = 0; tap < taps; ++tap) {
        rings.weights.wait_full(weight_turn);
        const sm90::SharedOperand<false> b(shared_address(weight_memory + weight_turn.stage * weight_bytes), Columns, false);
        pin();
        sm90::wgmma_begin();
#pragma unroll
        for (int r = 0; r < RowBlocks; ++r) {
          const sm90::SharedOperand<false> a(voxels + static_cast<std::uint32_t>((tap * p.line + r * 64) * 128), 64, false);
          sm90::multiply<T, Columns, 4, false, false>(sums[r], a, b, true);
        }
        sm90::wgmma_commit();
        sm90::wgmma_wait<1>();
        release();
        read_weights = weight_turn, weights_read = true;
        read_voxels = voxel_turn, voxels_read = tap + 1 == taps;
        weight_turn.next(p.weight_stages);
      }
      voxel_turn.next(p.voxel_stages);
    }
  }
  sm90::wgmma_wait<0>();
  pin();

  // Both warpgroups are done with the voxels: their memory takes the results, of which whole lines leave.
  asm volatile("bar.sync 1, 256;" ::: "memory");
  const Tile<T, Columns> result(memory);
  const int lane = thread % 32, row = warpgroup * RowBlocks * 64 + thread / 32 * 16 + lane / 4;
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
    for (int r = 0; r < RowBlocks; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair(result.at(row + 64 * r + 8 * half, column), 0, 2, true, sums[r][4 * n + 2 * half] + add[0],
                   sums[r][4 * n + 2 * half + 1] + add[1]);
  }
  asm volatile("bar.sync 1, 256;" ::: "memory");
  constexpr int pieces = Columns / 8;
  T* const out = static_cast<T*>(p.out) + first_column;
  for (int i = threadIdx.x; i < rows_of_block * pieces; i += consumers) {
    const int r = i / pieces, column = i % pieces * 8;
    const Corner position = p.tiling.position(at, r);
    if (!p.tiling.holds(position)) continue;
    T* const to = out + position.b * p.out_stride[0] + position.t * p.out_stride[1] + position.h * p.out_stride[2] +
                  position.w * p.out_stride[3] + column;
    const T* const from = result.at(r, column);
    if (p.out_aligned) {
      if (first_column + column < p.columns) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (first_column + column + e < p.columns) to[e] = from[e];
    }
  }
}

}  // namespace effcore::cuda::conv3d::hopper
