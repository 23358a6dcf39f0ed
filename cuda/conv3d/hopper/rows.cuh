// out[position, n] = bias[n] + sum over taps and channels of G[position, (tap, c)] W[(tap, c), n] on sm_90a, at strides that
// TMA takes.
//
// Bound: 2 * taps * channels FLOPs an output on the tensor cores (4096 a cycle and multiprocessor), or the second-level cache
// (about 5 TB/s), from which blocks read voxels and weights again and again. Reading 128 voxels for each of 11 taps would bound
// 64 columns to 44 FLOPs a byte, 240 TFLOP/s. Therefore:
//
// A block computes 128 or 256 positions, a box (boxes.h) with kernel_h - 1 more lines: 3 boxes with a halo and 2 without serve
// 11 taps. Weights come as tiles of 64 channels, one a tap; 256 positions (with 64 columns) halve their part. (Blocks of a
// cluster that fetch for each other by multicast were tried, and wait for each other longer than they save: 10 to 20 % slower.
// So was one box with a halo all around for all taps, gathered into registers by ldmatrix: it reads a third of the bytes, but
// takes a multiprocessor alone, where nothing hides its beginning and end: 0 to 40 % slower.)
//
// Weights are read where they lie if their channels are contiguous; only the middle, a sum of two kernels, is made by a kernel
// before this one, which runs meanwhile: the middle is the last tap. Other weights are packed by that kernel.
//
// A producer warp fills two rings by TMA, as deep as there is memory for; two warpgroups multiply 64 or 128 positions each. Two
// blocks share a multiprocessor: one multiplies while the other begins or ends. Where positions are few, pairs of blocks with
// three warpgroups of 64 positions share the channels and add up through each other's memory.
#pragma once
#include <cuda.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "common/overlap.cuh"
#include "conv3d/hopper/boxes.h"
#include "hopper/cluster.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/wgmma.cuh"

namespace effcore::cuda::conv3d::hopper {

namespace sm90 = effcore::cuda::hopper;

constexpr int max_groups = 64;
constexpr int most_voxel_stages = 4, most_weight_stages = 8;

// Taps that share a box: they are neighbours along h.
struct Group {
  std::int16_t t, h, w, first, taps;  // tap[first ...]
};

// Where the weights of a tap lie: which tensor [O, .., .., C], and where in its middle dimensions.
struct TapWeights {
  std::int16_t map, row, column;
};
constexpr int packed_map = 0, spatial_map = 1, temporal_map = 2;

struct TiledRowsParams {
  CUtensorMap box, box_with_halo, weights[3];
  Tiling tiling;
  int voxel_stages, voxel_bytes, weight_stages;  // voxel_bytes: of a stage
  int groups, blocks;                            // blocks: of 64 channels
  int box_bytes, halo_bytes;
  int columns;
  void* out;
  std::int64_t out_stride[4];  // b, t, h, w
  bool out_aligned;
  const void* bias;
  std::int64_t bias_stride;
  Group group[max_groups];
  TapWeights tap[max_taps];
};

struct RowsRings {
  sm90::Ring<most_voxel_stages> voxels;
  sm90::Ring<most_weight_stages> weights;
};

// What a block computes: `boxes` boxes of positions by `columns`, with two warpgroups for one box, or three with a box of 64
// each. `blocks` of a cluster share the channels: for few positions, so that every multiprocessor has a block.
template <int RowBlocks_, int Columns_, bool Transposed_, bool Shared_>
struct RowsShape {
  static constexpr int row_blocks = RowBlocks_, columns = Columns_;  // row_blocks: of 64 positions, of each warpgroup
  static constexpr bool transposed = Transposed_, shared = Shared_;
  static constexpr int boxes = shared ? 3 : 1, blocks = shared ? 2 : 1;
  static constexpr int warpgroups = shared ? 3 : 2, consumers = warpgroups * 128, threads = consumers + 32;
  static constexpr int rows_of_box = (shared ? 1 : 2) * row_blocks * 64;
  static constexpr int result_columns = columns / blocks;  // that a block of the cluster finishes
};

// Transposed: the columns are the tensors' C, as for the gradient of the data, and the channels their O: a tile is then
// [64 channels, columns] in panels of 64 columns.
template <class T, class Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::shared ? 1 : 2)
    conv3d_rows_kernel(const __grid_constant__ TiledRowsParams p) {
  constexpr int RowBlocks = Shape::row_blocks, Columns = Shape::columns, consumers = Shape::consumers;
  constexpr bool Transposed = Shape::transposed;
  constexpr int weight_bytes = Columns * 128;
  extern __shared__ __align__(1024) char memory[];
  char* const weight_memory = memory + p.voxel_stages * p.voxel_bytes;
  auto& rings = *reinterpret_cast<RowsRings*>(weight_memory + p.weight_stages * weight_bytes);
  if (threadIdx.x == 0) {
    rings.voxels.init(Shape::warpgroups);
    rings.weights.init(Shape::warpgroups);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const int first_box = blockIdx.x * Shape::boxes, rank = Shape::shared ? blockIdx.z : 0;
  const int first_block = rank * p.blocks / Shape::blocks, end_block = (rank + 1) * p.blocks / Shape::blocks;
  const int first_column = blockIdx.y * Columns;
  sm90::Turn<most_voxel_stages> voxel_turn;
  sm90::Turn<most_weight_stages> weight_turn;

  if (threadIdx.x >= consumers) {
    if (threadIdx.x != consumers) return;
    constexpr auto keep = static_cast<std::uint64_t>(sm90::Keep::last);
    bool packed = false;  // what the kernel before packs or adds up
    for (int i = 0; i < p.groups; ++i) {
      const Group& group = p.group[i];
      const bool halo = group.taps > 1;
      for (int block = first_block; block < end_block; ++block) {
        const int bytes = halo ? p.halo_bytes : p.box_bytes;
        rings.voxels.wait_empty(voxel_turn);
        rings.voxels.expect(voxel_turn, Shape::boxes * bytes);
        for (int box = 0; box < Shape::boxes; ++box) {
          const Corner at = p.tiling.corner(first_box + box);
          const int w = at.w * p.tiling.step[2] + group.w, t = at.t * p.tiling.step[0] + group.t,
                    h = at.h * p.tiling.step[1] + group.h;
          cute::SM90_TMA_LOAD_5D::copy(halo ? &p.box_with_halo : &p.box, &rings.voxels.full[voxel_turn.stage], keep,
                                       memory + voxel_turn.stage * p.voxel_bytes + box * p.halo_bytes, block * 64, w, t, at.b,
                                       h);
        }
        voxel_turn.next(p.voxel_stages);
        for (int tap = 0; tap < group.taps; ++tap) {
          const TapWeights& weights = p.tap[group.first + tap];
          if (weights.map == packed_map && !packed) wait_for_kernel_before(), packed = true;
          rings.weights.wait_empty(weight_turn);
          rings.weights.expect(weight_turn, weight_bytes);
          char* const to = weight_memory + weight_turn.stage * weight_bytes;
          const auto load = [&](char* tile, int c, int o) {
            cute::SM90_TMA_LOAD_4D::copy(&p.weights[weights.map], &rings.weights.full[weight_turn.stage], keep, tile, c,
                                         weights.column, weights.row, o);
          };
          if constexpr (Transposed)
            for (int panel = 0; panel < Columns / 64; ++panel)
              load(to + panel * 64 * 128, first_column + panel * 64, block * 64);
          else
            load(to, block * 64, first_column);
          weight_turn.next(p.weight_stages);
        }
      }
    }
    if (!packed) wait_for_kernel_before();
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
    for (int block = first_block; block < end_block; ++block) {
      rings.voxels.wait_full(voxel_turn);
      const std::uint32_t voxels =
          shared_address(memory + voxel_turn.stage * p.voxel_bytes) +
          static_cast<std::uint32_t>(warpgroup * (Shape::shared ? p.halo_bytes : RowBlocks * 64 * 128));
      for (int tap = 0; tap < taps; ++tap) {
        rings.weights.wait_full(weight_turn);
        const sm90::SharedOperand<Transposed> b(shared_address(weight_memory + weight_turn.stage * weight_bytes),
                                                Transposed ? 64 : Columns, false);
        pin();
        sm90::wgmma_begin();
#pragma unroll
        for (int r = 0; r < RowBlocks; ++r) {
          const sm90::SharedOperand<false> a(voxels + static_cast<std::uint32_t>((tap * p.tiling.line + r * 64) * 128), 64,
                                             false);
          sm90::multiply<T, Columns, 4, false, Transposed>(sums[r], a, b, true);
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
  let_next_kernel_begin();

  // All warpgroups are done with the voxels: their memory takes the results, of which whole lines leave.
  const auto meet = [] { asm volatile("bar.sync 1, %0;" ::"n"(consumers) : "memory"); };
  meet();
  char* results = memory;
  if constexpr (Shape::shared) {
    // Each block of the pair finishes half of the columns, with the sums that the other one leaves in its memory.
    constexpr int half = Columns / 4;
    float4* const left = reinterpret_cast<float4*>(memory) + threadIdx.x;
    const auto pick = [&](int i, bool upper) { return upper ? sums[0][half + i] : sums[0][i]; };
#pragma unroll
    for (int i = 0; i < half / 4; ++i)
      left[i * consumers] = make_float4(pick(4 * i, rank == 0), pick(4 * i + 1, rank == 0), pick(4 * i + 2, rank == 0),
                                        pick(4 * i + 3, rank == 0));
    sm90::cluster_arrive();
    sm90::cluster_wait();
#pragma unroll
    for (int i = 0; i < half / 4; ++i) {
      const float4 x = sm90::load_of_block(left + i * consumers, 1 - rank);
      const float other[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[0][4 * i + e] = pick(4 * i + e, rank == 1) + other[e];
    }
    sm90::cluster_arrive();
    results += consumers * half * sizeof(float);
  }
  const int result_column = first_column + rank * Shape::result_columns;
  const Tile<T, Shape::result_columns> result(results);
  const int lane = thread % 32, row = warpgroup * RowBlocks * 64 + thread / 32 * 16 + lane / 4;
  const T* const bias = static_cast<const T*>(p.bias);
#pragma unroll
  for (int n = 0; n < Shape::result_columns / 8; ++n) {
    const int column = 8 * n + lane % 4 * 2;
    float add[2] = {};
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (bias != nullptr && result_column + column + e < p.columns)
        add[e] = to_float(bias[(result_column + column + e) * p.bias_stride]);
#pragma unroll
    for (int r = 0; r < RowBlocks; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair(result.at(row + 64 * r + 8 * half, column), 0, 2, true, sums[r][4 * n + 2 * half] + add[0],
                   sums[r][4 * n + 2 * half + 1] + add[1]);
  }
  meet();
  constexpr int pieces = Shape::result_columns / 8;
  T* const out = static_cast<T*>(p.out) + result_column;
  for (int i = threadIdx.x; i < Shape::boxes * Shape::rows_of_box * pieces; i += consumers) {
    const int row_of_block = i / pieces, column = i % pieces * 8, r = row_of_block % Shape::rows_of_box;
    const Tiling& tiling = p.tiling;
    const Corner at = tiling.corner(first_box + row_of_block / Shape::rows_of_box);
    const int w = at.w + (r & ((1 << tiling.log_w) - 1)), t = at.t + (r >> tiling.log_w & ((1 << tiling.log_t) - 1)),
              b = at.b + (r >> (tiling.log_w + tiling.log_t) & ((1 << tiling.log_b) - 1)),
              h = at.h + (r >> (tiling.log_w + tiling.log_t + tiling.log_b));
    if (w >= tiling.grid[2] || t >= tiling.grid[0] || b >= tiling.batch || h >= tiling.grid[1]) continue;
    T* const to = out + b * p.out_stride[0] + t * p.out_stride[1] + h * p.out_stride[2] + w * p.out_stride[3] + column;
    const T* const from = result.at(row_of_block, column);
    if (p.out_aligned) {
      if (result_column + column < p.columns) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (result_column + column + e < p.columns) to[e] = from[e];
    }
  }
  if constexpr (Shape::shared) sm90::cluster_wait();  // nobody reads this block's memory any more
}

}  // namespace effcore::cuda::conv3d::hopper
