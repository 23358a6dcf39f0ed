// out[position, n] = bias[n] + sum over taps and channels of G[position, (tap, c)] W[(tap, c), n] on sm_90a, where neighbouring
// positions lie side by side in the tensor that is read (step 1 along h and w) and there are many columns.
//
// Bound: 2 * taps * channels FLOPs an output on the tensor cores (4096 a cycle and multiprocessor), if the second-level cache
// keeps up: it gives a multiprocessor about 24 bytes a cycle. So what counts is how often a block reads voxels and weights.
//
// A block computes 64 or 128 columns of some hundred positions at a time: whole lines of one or several frames. The product is
// transposed, columns x positions, for wgmma's second side may be any multiple of 8: 14 lines of 28 voxels fill it to 96 %, and
// 128 such tiles the device.
//
// One box of voxels serves all taps of a frame. In shared memory a line takes `pitch` rows (of 64 channels), and a tap reads
// the box from another row on: h * line + w. (The swizzle is a function of the address, so a product may begin at any row.)
// Lines share their margins: the zeros to the right of a line are those to the left of the next; products of margins are
// dropped. For 3 x 3 + 2 taps that is 1.14 + 2 boxes instead of the 11 that taps read one by one.
//
// Kernels with their channels inside (channels_last_3d) are read where they lie, as rows of input channels for the gradient of
// the data, which wgmma then reads transposed. The middle of the cross has two kernels: both come, and who multiplies by them
// adds them, rounded once, while the product before is under way. Others are packed beforehand.
//
// A producer thread fills rings by TMA; blocks stay, and fetch the next tile's first boxes while the last one's results leave.
#pragma once
#include <cuda.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "common/overlap.cuh"
#include "conv3d/hopper/boxes.h"
#include "conv3d/hopper/middle_weights.cuh"
#include "conv3d/hopper/rings.cuh"
#include "hopper/wgmma_sizes.cuh"

namespace effcore::cuda::conv3d::hopper {

constexpr int line_threads = line_consumers + 128;
constexpr int line_registers = 240, line_fetching_registers = 24;
constexpr int most_line_voxel_stages = 3, most_line_weight_stages = 8, most_frames = 16;

// Taps that share a box.
struct LoadedFrame {
  std::int16_t t, h;         // offset of the box from a position
  std::int16_t first, taps;  // tap[first ...]
  bool halo;
};

// Where a tap's weights lie, those that are added to them (-1 for none, among the temporal ones), and which rows of the box
// they meet.
struct LoadedTap {
  std::int16_t map, number, added, shift;
};

struct LinesParams {
  CUtensorMap box, box_with_halo, weights[2];  // spatial and temporal, or packed
  Tiling tiling;                               // of positions, margins included
  int items, first_w;
  Divider column_blocks;
  int voxel_stages, weight_stages, stage_bytes, box_bytes, halo_bytes, zero_from;
  int taps, frames_of_taps, blocks;  // blocks: of 64 channels
  int half_blocks;                   // 1 where the last of them has at most 32
  bool packed;
  int columns;
  void* out;
  std::int64_t out_stride[4];  // b, t, h, w
  const void* bias;
  std::int64_t bias_stride;
  LoadedFrame frame[most_frames];
  LoadedTap tap[max_taps];
};

template <int Positions>
struct LinesMemory {
  sm90::Ring<most_line_voxel_stages> voxels;
  sm90::Ring<most_line_weight_stages> weights;
  int offset[Positions];  // of a position's results, in pieces of 8, or -1
};

// An 8 x 8 tile of 16-bit elements across a warp, transposed.
__device__ __forceinline__ std::uint32_t transpose_8x8(std::uint32_t x) {
  std::uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Results of 8 positions at a time, of those from `From` to `To`: four columns of one position a thread.
template <class T, int From, int To, int N>
__device__ __forceinline__ void store_lines(const float (&sums)[N], const int* offset, T* to, const float (&add)[2],
                                            bool exists) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane % 2 != 0;
#pragma unroll
  for (int n = From / 8; n < To / 8; ++n) {
    const std::uint32_t low = transpose_8x8(pack<T>(sums[4 * n] + add[0], sums[4 * n + 1] + add[0]));
    const std::uint32_t high = transpose_8x8(pack<T>(sums[4 * n + 2] + add[1], sums[4 * n + 3] + add[1]));
    const std::uint32_t other = __shfl_xor_sync(~0u, odd ? low : high, 1);
    const int at = offset[8 * n + lane / 4];
    if (at >= 0 && exists)
      *reinterpret_cast<uint2*>(to + static_cast<std::int64_t>(at) * 8) =
          odd ? make_uint2(other, high) : make_uint2(low, other);
  }
}

// With 128 columns each warpgroup takes half of them, and all positions by two instructions (or one, Second = 0); with 64 it
// takes all of them, and half of the positions.
template <int Columns, int First, int Second>
constexpr int positions_of_lines = Columns == 128 ? First + Second : 2 * First;

// Transposed: weights stand as rows of columns (the gradient of the data, kernels where they lie).
template <class T, int Columns, int First, int Second, bool Transposed>
__global__ void __launch_bounds__(line_threads, 1) conv3d_lines_kernel(const __grid_constant__ LinesParams p) {
  constexpr int weight_bytes = Columns * 128, positions = positions_of_lines<Columns, First, Second>;
  static_assert(Columns == 128 || Second == 0);
  extern __shared__ __align__(1024) char memory[];
  char* const weight_memory = memory + p.voxel_stages * p.stage_bytes;
  auto& shared = *reinterpret_cast<LinesMemory<positions>*>(weight_memory + p.weight_stages * weight_bytes);
  const int first_item = static_cast<int>(blockIdx.x), items = static_cast<int>(gridDim.x);
  sm90::Turn<most_line_voxel_stages> voxel_turn;
  sm90::Turn<most_line_weight_stages> weight_turn;

  Corner at{};
  int first_column;
  const auto begin_item = [&](int item) {
    int column_block = item;
    at = p.tiling.corner(p.column_blocks.take(column_block));
    first_column = column_block * Columns;
  };
  constexpr auto keep = static_cast<std::uint64_t>(sm90::Keep::last);
  const auto load_box = [&](const LoadedFrame& frame, int block) {
    shared.voxels.expect(voxel_turn, frame.halo ? p.halo_bytes : p.box_bytes);
    cute::SM90_TMA_LOAD_5D::copy(frame.halo ? &p.box_with_halo : &p.box, &shared.voxels.full[voxel_turn.stage], keep,
                                 memory + voxel_turn.stage * p.stage_bytes, block * 64, p.first_w,
                                 at.t * p.tiling.step[0] + frame.t, at.b, at.h + frame.h);
  };
  const auto load_weights = [&](int map, int number, int block) {
    shared.weights.expect(weight_turn, weight_bytes);
    for (int panel = 0; panel < (Transposed ? Columns / 64 : 1); ++panel)
      cute::SM90_TMA_LOAD_3D::copy(&p.weights[map], &shared.weights.full[weight_turn.stage], keep,
                                   weight_memory + weight_turn.stage * weight_bytes + panel * 64 * 128,
                                   Transposed ? first_column + panel * 64 : block * 64, number,
                                   Transposed ? block * 64 : first_column);
  };
  if (threadIdx.x == line_consumers) {
    // The first box and weights are asked for before anything else: what comes before them is nobody's time.
    sm90::Barrier::init(&shared.voxels.full[0], 1);
    sm90::Barrier::init(&shared.weights.full[0], 1);
    cutlass::arch::fence_barrier_init();
    begin_item(first_item);
    if (!p.packed) wait_for_kernel_before();
    load_box(p.frame[0], 0);
    if (p.packed) wait_for_kernel_before();  // which packs the weights, and began behind the one that wrote the voxels
    load_weights(p.tap[0].map, p.tap[0].number, 0);
  }
  if (threadIdx.x == line_consumers + 32) {
    init_behind(shared.voxels, 1, 2);
    init_behind(shared.weights, 1, 2);
    cutlass::arch::fence_barrier_init();
  }

  const int warpgroup = sm90::uniform(static_cast<int>(threadIdx.x) / 128);
  if (warpgroup == 2) {
    cutlass::arch::warpgroup_reg_dealloc<line_fetching_registers>();
    __syncwarp();
    if (threadIdx.x >= line_consumers + 64) return;
    asm volatile("bar.arrive 0, 320;" ::: "memory");
    if (threadIdx.x >= line_consumers + 32) {
      asm volatile("bar.arrive 2, 64;" ::: "memory");
      return;
    }
    asm volatile("bar.sync 2, 64;" ::: "memory");  // the barriers are there
    if (threadIdx.x != line_consumers) return;

    bool begun = true;  // with the first box and weights
    const auto next_weights = [&](int map, int number, int block) {
      if (!begun) {
        shared.weights.wait_empty(weight_turn);
        load_weights(map, number, block);
      }
      begun = false;
      weight_turn.next(p.weight_stages);
    };
    for (int item = first_item; item < p.items; item += items) {
      if (!begun) begin_item(item);
      for (int block = 0; block < p.blocks; ++block)
        for (int i = 0; i < p.frames_of_taps; ++i) {
          const LoadedFrame& frame = p.frame[i];
          if (!begun) {
            shared.voxels.wait_empty(voxel_turn);
            load_box(frame, block);
          }
          voxel_turn.next(p.voxel_stages);
          for (int j = frame.first; j < frame.first + frame.taps; ++j) {
            const LoadedTap& tap = p.tap[j];
            next_weights(tap.map, tap.number, block);
            if (tap.added >= 0) next_weights(1, tap.added, block);
          }
        }
    }
    // Where blocks have one tile each, little hides their beginning: the next kernel's may pass theirs meanwhile.
    if (p.items <= items) let_next_kernel_begin();
    return;
  }

  // The last line's right margin, which no box writes.
  for (int stage = 0; stage < p.voxel_stages; ++stage)
#pragma unroll 1
    for (int i = p.zero_from + static_cast<int>(threadIdx.x) * 4; i < p.stage_bytes; i += line_consumers * 4)
      *reinterpret_cast<int*>(memory + stage * p.stage_bytes + i) = 0;
  sm90::fence_async();
  asm volatile("bar.sync 0, 320;" ::: "memory");
  cutlass::arch::warpgroup_reg_alloc<line_registers>();
  const int own_column = Columns == 128 ? warpgroup * 64 : 0, own_position = Columns == 128 ? 0 : warpgroup * First;
  for (int item = first_item; item < p.items; item += items) {
    begin_item(item);
    asm volatile("bar.sync 1, 256;" ::: "memory");  // the last tile's offsets have been read
#pragma unroll 1
    for (int r = threadIdx.x; r < positions; r += line_consumers) {
      const Corner position = p.tiling.position(at, r);
      const bool exists = r < p.tiling.box.rows() && p.tiling.holds(position);
      const std::int64_t offset = position.b * p.out_stride[0] + position.t * p.out_stride[1] + position.h * p.out_stride[2] +
                                  position.w * p.out_stride[3];
      shared.offset[r] = exists ? static_cast<int>(offset / 8) : -1;
    }

    float first[First / 2], second[Second > 0 ? Second / 2 : 1];
#pragma unroll
    for (float& x : first) x = 0.0f;
#pragma unroll
    for (float& x : second) x = 0.0f;
    const auto pin = [&] {
      sm90::pin(first);
      if constexpr (Second > 0) sm90::pin(second);
    };
    // Stages that the product under way reads are released behind the next one.
    int read_weights = -1, read_voxels = -1;
    const auto release = [&] {
      if (threadIdx.x % 128 != 0) return;
      if (read_weights >= 0) sm90::Barrier::arrive(&shared.weights.empty[read_weights]);
      if (read_voxels >= 0) sm90::Barrier::arrive(&shared.voxels.empty[read_voxels]);
    };
    // Blocks of channels of which Depth * 16 exist.
    const auto sum_blocks = [&]<int Depth>(int count, std::integral_constant<int, Depth>) {
      for (int i = 0; i < count * p.frames_of_taps; ++i) {
        const LoadedFrame& frame = p.frame[i % p.frames_of_taps];
        shared.voxels.wait_full(voxel_turn);
        const std::uint32_t voxels = shared_address(memory + voxel_turn.stage * p.stage_bytes);
        const int end = frame.first + frame.taps;
        for (int tap = frame.first; tap < end; ++tap) {
          const auto weights_at = [&](int stage) { return weight_memory + stage * weight_bytes + own_column * 128; };
          shared.weights.wait_full(weight_turn);
          const int stage = weight_turn.stage;
          weight_turn.next(p.weight_stages);
          if (p.tap[tap].added >= 0) {
            shared.weights.wait_full(weight_turn);
            constexpr int threads = Columns == 128 ? 128 : line_consumers;  // who share these weights
            add_weights<T, threads>(weights_at(stage), weights_at(weight_turn.stage));
            sm90::fence_async();
            asm volatile("bar.sync %0, %1;" ::"r"(3 + warpgroup * 128 / threads), "n"(threads) : "memory");
            if (threadIdx.x % 128 == 0) sm90::Barrier::arrive(&shared.weights.empty[weight_turn.stage]);
            weight_turn.next(p.weight_stages);
          }
          const std::uint32_t rows = voxels + static_cast<std::uint32_t>((p.tap[tap].shift + own_position) * 128);
          const sm90::SharedOperand<Transposed> a(shared_address(weights_at(stage)), 64, false);
          const sm90::SharedOperand<false> b(rows, First, false), c(rows + First * 128, Second, false);
          pin();
          sm90::wgmma_begin();
          sm90::multiply<T, First, Depth, Transposed, false>(first, a, b, true);
          if constexpr (Second > 0) sm90::multiply<T, Second, Depth, Transposed, false>(second, a, c, true);
          sm90::wgmma_commit();
          sm90::wgmma_wait<1>();
          release();
          read_weights = stage, read_voxels = tap + 1 == end ? voxel_turn.stage : -1;
        }
        voxel_turn.next(p.voxel_stages);
      }
      sm90::wgmma_wait<0>();
      pin();
    };
    sum_blocks(p.blocks - p.half_blocks, std::integral_constant<int, 4>{});
    if (p.half_blocks != 0) sum_blocks(1, std::integral_constant<int, 2>{});
    release();

    const int lane = threadIdx.x % 32, row = first_column + own_column + threadIdx.x % 128 / 32 * 16;
    const T* const bias = static_cast<const T*>(p.bias);
    float add[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (const int n = row + lane / 4 + 8 * half; bias != nullptr && n < p.columns)
        add[half] = to_float(bias[n * p.bias_stride]);
    asm volatile("bar.sync 1, 256;" ::: "memory");  // the offsets are there
    const int column = row + lane % 4 / 2 * 4 + lane % 2 * 8;
    T* const to = static_cast<T*>(p.out) + column;
    const bool columns_exist = column < p.columns;
    store_lines<T, 0, First>(first, shared.offset + own_position, to, add, columns_exist);
    if constexpr (Second > 0) store_lines<T, 0, Second>(second, shared.offset + First, to, add, columns_exist);
  }
}

}  // namespace effcore::cuda::conv3d::hopper
