// out[position, n] = bias[n] + sum over taps and channels of G[position, (tap, c)] W[(tap, c), n] at stride 1 on sm_90a.
//
// Bound: 2 * taps * channels FLOPs an output on the tensor cores (4096 a cycle and multiprocessor), or the second-level cache
// (about 5 TB/s), from which blocks read voxels and weights again and again. Reading 128 voxels for each of 11 taps would bound
// 64 columns to 44 FLOPs a byte, 240 TFLOP/s. Therefore:
//
// A block computes 128 positions, a box of w x t x b x h, in this order in shared memory: TMA fetches the box, whose rows are
// 64 channels (128 bytes, zeros outside the tensor), with kernel_h - 1 more lines, and the taps of one column of the kernel
// read it at steps of one line (a multiple of 1024 bytes, so that the swizzle stays). 3 boxes with a halo and 2 without serve
// 11 taps. Weights come as tiles [Columns, 64 channels], one a tap.
//
// A producer warp fills two rings by TMA; two warpgroups multiply 64 positions each. Two blocks share a multiprocessor: one
// multiplies while the other begins or ends.
#pragma once
#include <cuda.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "conv3d/params.h"
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
  int voxel_bytes;                 // of a stage
  int log_w, log_t, log_b, log_h;  // of the box
  int tiles_w, tiles_t, tiles_b;   // and h outermost
  int line;                        // rows of the box that share h
  int groups, blocks;              // blocks: of 64 channels
  int box_bytes, halo_bytes;
  int padded_columns, columns, batch, grid[3];
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
  if (threadIdx.x == 0) {
    rings.voxels.init(2);
    rings.weights.init(2);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  int tile = blockIdx.x;
  const int w0 = tile % p.tiles_w << p.log_w;
  tile /= p.tiles_w;
  const int t0 = tile % p.tiles_t << p.log_t;
  tile /= p.tiles_t;
  const int b0 = tile % p.tiles_b << p.log_b, h0 = tile / p.tiles_b << p.log_h;
  const int first_column = blockIdx.y * Columns;
  sm90::Turn<voxel_stages> voxel_turn;
  sm90::Turn<weight_stages<Columns>> weight_turn;

  if (threadIdx.x >= consumers) {
    if (threadIdx.x != consumers) return;
    for (int i = 0; i < p.groups; ++i) {
      const Group& group = p.group[i];
      const bool halo = group.taps > 1;
      for (int block = 0; block < p.blocks; ++block) {
        rings.voxels.wait_empty(voxel_turn);
        rings.voxels.expect(voxel_turn, halo ? p.halo_bytes : p.box_bytes);
        cute::SM90_TMA_LOAD_5D::copy(halo ? &p.box_with_halo : &p.box, &rings.voxels.full[voxel_turn.stage],
                                     static_cast<std::uint64_t>(sm90::Keep::last), memory + voxel_turn.stage * p.voxel_bytes,
                                     block * 64, w0 + group.w, t0 + group.t, b0, h0 + group.h);
        voxel_turn.next();
        for (int tap = 0; tap < group.taps; ++tap) {
          rings.weights.wait_empty(weight_turn);
          rings.weights.expect(weight_turn, weight_bytes);
          cute::SM90_TMA_LOAD_2D::copy(&p.weights, &rings.weights.full[weight_turn.stage],
                                       static_cast<std::uint64_t>(sm90::Keep::last),
                                       weight_memory + weight_turn.stage * weight_bytes, block * 64,
                                       p.number[group.first + tap] * p.padded_columns + first_column);
          weight_turn.next();
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
    if (thread == 0 && weights_read) rings.weights.release(read_weights);
    if (thread == 0 && voxels_read) rings.voxels.release(read_voxels);
  };
  for (int i = 0; i < p.groups; ++i) {
    const int taps = p.group[i].taps;
    for (int block = 0; block < p.blocks; ++block) {
      rings.voxels.wait_full(voxel_turn);
      const std::uint32_t voxels =
          shared_address(memory + voxel_turn.stage * p.voxel_bytes) + static_cast<std::uint32_t>(warpgroup * 64 * 128);
      for (int tap = 0; tap < taps; ++tap) {
        rings.weights.wait_full(weight_turn);
        const sm90::SharedOperand<false> a(voxels + static_cast<std::uint32_t>(tap * p.line * 128), 64, false);
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
    const int w = w0 + (r & ((1 << p.log_w) - 1)), t = t0 + (r >> p.log_w & ((1 << p.log_t) - 1)),
              b = b0 + (r >> (p.log_w + p.log_t) & ((1 << p.log_b) - 1)), h = h0 + (r >> (p.log_w + p.log_t + p.log_b));
    if (w >= p.grid[2] || t >= p.grid[0] || b >= p.batch || h >= p.grid[1]) continue;
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
}

}  // namespace effcore::cuda::conv3d::hopper
