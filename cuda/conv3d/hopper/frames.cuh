// The products of lines.cuh where these would be too few tiles for the device: lines of one frame and 64 columns a block, with
// the taps taken in turns by two warpgroups, which add their sums in the end.
//
// Clusters of two blocks take neighbouring frames and the same columns, so all weights and what is the middle of one block's
// taps and at the end of the other's are fetched once for both, by multicast: each block fetches half of every tile of weights
// and its own middle frame for the two, and for itself the outer frames that the other does not read. For 3 x 3 + 2 taps of 256
// channels and 14 lines of 14 voxels these are about 350 KB a block, less than the second-level cache gives it while it
// multiplies.
//
// A barrier tells odd laps from even ones alone: whoever waits at a ring must see every lap of it, and be waited for. So each
// warpgroup has a ring of weights, and a box is waited for by both. One thread releases what all warps of its warpgroup have
// multiplied by; where they only waited, each warp does, for a late one would wait for ever for a lap that has passed.
#pragma once
#include <cuda.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "common/overlap.cuh"
#include "common/tile.cuh"
#include "conv3d/hopper/boxes.h"
#include "conv3d/hopper/frames_results.cuh"
#include "conv3d/hopper/middle_weights.cuh"
#include "conv3d/hopper/rings.cuh"
#include "hopper/wgmma_sizes.cuh"

namespace effcore::cuda::conv3d::hopper {

constexpr int frame_columns = 64, frame_weight_bytes = frame_columns * 128, half_weights = frame_weight_bytes / 2;
constexpr int frames_threads = line_consumers + 128;
constexpr int first_weights = 2;  // taps whose weights are asked for first of all, one of each warpgroup
constexpr int middle_stages = 2, most_frame_weight_stages = 8;  // stages: of a block's own frames, of a warpgroup's weights

// Where a tap's weights lie, and those that are added to them (-1 for none, among the temporal ones).
struct alignas(8) FramesTap {
  std::int16_t map, number, added;
};

// A box that one block alone reads: its offset from the first frame of a pair, before which tap it is asked for, and for which.
struct OuterFrame {
  std::int16_t t, h, before, tap;
};

// What is special about a block's tap, and the row of the box from which on it reads, in one word.
struct TapCode {
  std::uint32_t bits;

  enum : std::uint32_t { other_middle = 1, outer = 2, rare = 3, added = 4, wait = 8 };
  static TapCode of(int shift, std::uint32_t what) { return {static_cast<std::uint32_t>(shift) << 4 | what}; }
#if defined(__CUDACC__)
  __device__ __forceinline__ bool is(std::uint32_t what) const { return (bits & what) != 0; }
  __device__ __forceinline__ std::uint32_t shift() const { return bits >> 4; }
#endif
};

struct FramesParams {
  CUtensorMap middle, outer, weights[2];  // weights: spatial and temporal, or packed; in halves of a tile
  Tiling tiling;                          // of a frame's positions; t counts pairs of frames
  Divider column_blocks;
  int first_w, middle_t[2], middle_h;  // offsets of the blocks' middle frames
  int middle_bytes, middle_box_bytes, outer_bytes, outer_box_bytes, weight_stages;
  int blocks;  // of 64 channels
  int taps;
  int middle_at;  // the tap before which the next middle frame is asked for
  int outers[2];  // of each block, for 64 channels
  bool packed;
  int columns;
  void* out;
  std::int64_t out_stride[4];  // b, t, h, w
  const void* bias;
  std::int64_t bias_stride;
  FramesTap tap[max_taps];
  TapCode code[max_taps][2];
  OuterFrame outer_frame[2][max_taps];
};

struct FramesMemory {
  sm90::BarrierWord middle_full[2][middle_stages];  // of each block's frames
  sm90::BarrierWord middle_empty[middle_stages];    // of this block's
  sm90::Ring<1> outer;
  sm90::Ring<most_frame_weight_stages> weights[2];  // of each warpgroup
  int offset[frame_positions];                      // of a position's results, in pieces of 8, or -1
};

// Transposed: weights stand as rows of columns (the gradient of the data, kernels where they lie).
template <class T, bool Transposed>
__global__ void __launch_bounds__(frames_threads, 1) conv3d_frames_kernel(const __grid_constant__ FramesParams p) {
  extern __shared__ __align__(1024) char memory[];
  char* const outer_memory = memory + 2 * middle_stages * p.middle_bytes;
  char* const weight_memory = outer_memory + p.outer_bytes;
  auto& shared = *reinterpret_cast<FramesMemory*>(weight_memory + 2 * p.weight_stages * frame_weight_bytes);
  const int rank = static_cast<int>(cute::block_rank_in_cluster());
  int column_block = static_cast<int>(blockIdx.x) / 2;
  const int tile = p.column_blocks.take(column_block), first_column = column_block * frame_columns;
  const auto middle_memory = [&](int of, int block) {
    return memory + (of * middle_stages + block % middle_stages) * p.middle_bytes;
  };
  const auto weights_at = [&](int ring, int stage) {
    return weight_memory + (ring * p.weight_stages + stage) * frame_weight_bytes;
  };
  using WeightTurn = sm90::Turn<most_frame_weight_stages>;

  constexpr auto keep = static_cast<std::uint64_t>(sm90::Keep::last);
  Corner at{};
  // `to`: which blocks of the cluster get it, by bits.
  const auto load_middle = [&](int block, std::uint16_t to) {
    cute::SM90_TMA_LOAD_MULTICAST_5D::copy(&p.middle, &shared.middle_full[rank][block % middle_stages], to, keep,
                                           middle_memory(rank, block), block * 64, p.first_w,
                                           2 * at.t * p.tiling.step[0] + p.middle_t[rank], at.b, at.h + p.middle_h);
  };
  const auto load_weights = [&](int ring, int stage, int map, int number, int block, int half, std::uint16_t to) {
    const int row = half * (frame_columns / 2);
    cute::SM90_TMA_LOAD_MULTICAST_3D::copy(
        &p.weights[map], &shared.weights[ring].full[stage], to, keep, weights_at(ring, stage) + half * half_weights,
        Transposed ? first_column : block * 64, number, Transposed ? block * 64 + row : first_column + row);
  };
  const std::uint16_t this_block = static_cast<std::uint16_t>(1 << rank), both_blocks = 3;
  if (threadIdx.x == line_consumers) {
    // The first voxels and weights are asked for before anything else, by each block for itself: what comes before them is
    // nobody's time.
    sm90::Barrier::init(&shared.middle_full[rank][0], 1);
    cutlass::arch::fence_barrier_init();
    at = p.tiling.corner(tile);
    if (!p.packed) wait_for_kernel_before();
    sm90::Barrier::arrive_and_expect_tx(&shared.middle_full[rank][0], static_cast<std::uint32_t>(p.middle_box_bytes));
    load_middle(0, this_block);
    if (p.packed) wait_for_kernel_before();  // which packs the weights, and began behind the one that wrote the voxels
    for (auto& ring : shared.weights) sm90::Barrier::init(&ring.full[0], 1);
    cutlass::arch::fence_barrier_init();
#pragma unroll 1
    for (int i = 0; i < first_weights; ++i) {
      sm90::Barrier::arrive_and_expect_tx(&shared.weights[i].full[0], frame_weight_bytes);
      for (int half = 0; half < 2; ++half) load_weights(i, 0, p.tap[i].map, p.tap[i].number, 0, half, this_block);
    }
  } else if (threadIdx.x == line_consumers + 32) {
    for (int stage = 0; stage < middle_stages; ++stage) {
      if (stage > 0) sm90::Barrier::init(&shared.middle_full[rank][stage], 1);
      sm90::Barrier::init(&shared.middle_full[rank ^ 1][stage], 1);
      // The warpgroups of this block, the one of the other that multiplies by it, and the other one's warps.
      sm90::Barrier::init(&shared.middle_empty[stage], 2 + 1 + 4);
    }
    shared.outer.init(1 + 4);
    for (auto& ring : shared.weights) init_behind(ring, 1, 2);
    cutlass::arch::fence_barrier_init();
  }
  __syncwarp();
  arrive_in_cluster();

  const int warpgroup = sm90::uniform(static_cast<int>(threadIdx.x) / 128);
  if (warpgroup == 2) {
    if (threadIdx.x != line_consumers) return;
    wait_in_cluster();  // the barriers are there, in both blocks
    load_middle(0, this_block ^ both_blocks);

    const auto expect_other = [&](int block) {
      sm90::BarrierWord* const full = &shared.middle_full[rank ^ 1][block % middle_stages];
      if (block >= middle_stages) sm90::Barrier::wait(full, (block / middle_stages - 1) & 1);
      sm90::Barrier::arrive_and_expect_tx(full, static_cast<std::uint32_t>(p.middle_box_bytes));
    };
    expect_other(0);
    WeightTurn turn[2];
    sm90::Turn<1> outer_turn;
    bool asked_for[2] = {true, true};  // the first of each ring
    const auto next_weights = [&](int ring, WeightTurn& turn, int map, int number, int block) {
      if (!asked_for[ring]) {
        shared.weights[ring].wait_empty(turn);
        shared.weights[ring].expect(turn, frame_weight_bytes);
        load_weights(ring, turn.stage, map, number, block, rank, both_blocks);
      }
      asked_for[ring] = false;
      turn.next(p.weight_stages);
    };
    const auto next_tap = [&](int ring, WeightTurn& turn, const FramesTap& tap, int block) {
      next_weights(ring, turn, tap.map, tap.number, block);
      if (tap.added >= 0) next_weights(ring, turn, 1, tap.added, block);
    };
    const OuterFrame* const outer_frames = p.outer_frame[rank];
    const int first_outer_at = p.outers[rank] > 0 ? outer_frames[0].before : -1;
    bool odd = false;
    for (int block = 0; block < p.blocks; ++block) {
      int outer = 0, outer_at = first_outer_at;
      for (int i = 0; i < p.taps; ++i) {
        if (const int next = block + 1; i == p.middle_at && next < p.blocks) {
          const int stage = next % middle_stages;
          if (next >= middle_stages) sm90::Barrier::wait(&shared.middle_empty[stage], (next / middle_stages - 1) & 1);
          sm90::Barrier::arrive_and_expect_tx(&shared.middle_full[rank][stage], static_cast<std::uint32_t>(p.middle_box_bytes));
          load_middle(next, both_blocks);
          expect_other(next);
        }
        while (i == outer_at) {
          shared.outer.wait_empty(outer_turn);
          shared.outer.expect(outer_turn, p.outer_box_bytes);
          cute::SM90_TMA_LOAD_5D::copy(&p.outer, &shared.outer.full[0], keep, outer_memory, block * 64, p.first_w,
                                       2 * at.t * p.tiling.step[0] + outer_frames[outer].t, at.b, at.h + outer_frames[outer].h);
          outer_turn.next();
          outer_at = ++outer < p.outers[rank] ? outer_frames[outer].before : -1;
        }
        const FramesTap tap = p.tap[i];
        if (odd)
          next_tap(1, turn[1], tap, block);
        else
          next_tap(0, turn[0], tap, block);
        odd = !odd;
      }
    }
    // Little hides a block's beginning: the next kernel's may pass theirs meanwhile.
    let_next_kernel_begin();
    return;
  }

  // The last line's right margin, which no box writes.
  const auto zero = [&](char* stages, int count, int bytes, int box_bytes) {
    for (int stage = 0; stage < count; ++stage)
#pragma unroll 1
      for (int i = box_bytes + static_cast<int>(threadIdx.x) * 4; i < bytes; i += line_consumers * 4)
        *reinterpret_cast<int*>(stages + stage * bytes + i) = 0;
  };
  zero(memory, 2 * middle_stages, p.middle_bytes, p.middle_box_bytes);
  zero(outer_memory, 1, p.outer_bytes, p.outer_box_bytes);
  sm90::fence_async();
  at = p.tiling.corner(tile);
  at.t = 2 * at.t + rank;
  if (const int r = static_cast<int>(threadIdx.x); r < frame_positions) {
    const Corner position = p.tiling.position(at, r);
    const bool exists = r < p.tiling.box.rows() && p.tiling.holds(position);
    const std::int64_t offset = position.b * p.out_stride[0] + position.t * p.out_stride[1] + position.h * p.out_stride[2] +
                                position.w * p.out_stride[3];
    shared.offset[r] = exists ? static_cast<int>(offset / 8) : -1;
  }
  asm volatile("bar.sync 1, 256;" ::: "memory");
  wait_in_cluster();  // the barriers are there, in both blocks

  float sums[frame_positions / 2];
#pragma unroll
  for (float& x : sums) x = 0.0f;
  auto& ring = shared.weights[warpgroup];
  WeightTurn weight_turn;
  sm90::Turn<1> outer_turn;
  // What the product under way reads is released behind the next one: a stage of weights here and in the other block; this
  // block's middle frame, the other's, and an outer one.
  int read_weights = -1, read_own = -1, read_other = -1;
  bool read_outer = false;
  const int other = rank ^ 1, thread = static_cast<int>(threadIdx.x) % 128;
  const auto release = [&] {
    if (thread == 0) {
      if (read_weights >= 0) sm90::Barrier::arrive(&ring.empty[read_weights]);
      if (read_own >= 0) sm90::Barrier::arrive(&shared.middle_empty[read_own]);
      if (read_outer) sm90::Barrier::arrive(&shared.outer.empty[0]);
    } else if (thread == 32) {
      if (read_weights >= 0) arrive_at(&ring.empty[read_weights], other);
      if (read_other >= 0) arrive_at(&shared.middle_empty[read_other], other);
    }
    read_own = -1, read_other = -1, read_outer = false;
  };
  bool mine = warpgroup == 0;
  for (int block = 0; block < p.blocks; ++block) {
    const int stage_of_middle = block % middle_stages;
    const std::uint32_t lap = static_cast<std::uint32_t>(block / middle_stages) & 1;
    sm90::Barrier::wait(&shared.middle_full[rank][stage_of_middle], lap);
    const std::uint32_t middle = shared_address(middle_memory(rank, block));
    for (int i = 0; i < p.taps; ++i, mine = !mine) {
      const TapCode code = p.code[i][rank];
      std::uint32_t voxels = middle;
      bool from_other = false, from_outer = false;
      if (code.is(TapCode::rare)) {
        if (code.is(TapCode::other_middle)) {
          sm90::Barrier::wait(&shared.middle_full[other][stage_of_middle], lap);
          voxels = shared_address(middle_memory(other, block)), from_other = true;
          if (!mine && thread % 32 == 0) arrive_at(&shared.middle_empty[stage_of_middle], other);
        } else {
          shared.outer.wait_full(outer_turn);
          voxels = shared_address(outer_memory), from_outer = true;
          outer_turn.next();
          if (!mine && thread % 32 == 0) sm90::Barrier::arrive(&shared.outer.empty[0]);
        }
      }
      if (!mine) continue;
      ring.wait_full(weight_turn);
      const int stage = weight_turn.stage;
      char* const weights = weights_at(warpgroup, stage);
      weight_turn.next(p.weight_stages);
      if (code.is(TapCode::added)) {
        ring.wait_full(weight_turn);
        add_weights<T, 128>(weights, weights_at(warpgroup, weight_turn.stage));
        sm90::fence_async();
        asm volatile("bar.sync %0, 128;" ::"r"(3 + warpgroup) : "memory");
        if (thread % 32 == 0 && thread < 64) arrive_at(&ring.empty[weight_turn.stage], thread / 32);
        weight_turn.next(p.weight_stages);
      }
      const sm90::SharedOperand<Transposed> a(shared_address(weights), 64, false);
      const sm90::SharedOperand<false> b(voxels + code.shift() * 128, frame_positions, false);
      sm90::pin(sums);
      sm90::wgmma_begin();
      sm90::multiply<T, frame_positions, 4, Transposed, false>(sums, a, b, true);
      sm90::wgmma_commit();
      sm90::wgmma_wait<1>();
      release();
      read_weights = stage, read_outer = from_outer;
      if (from_other) read_other = stage_of_middle;
      if (code.is(TapCode::wait)) {
        sm90::wgmma_wait<0>();
        release();
        read_weights = -1;
      }
    }
    read_own = stage_of_middle;
  }
  sm90::wgmma_wait<0>();
  sm90::pin(sums);
  release();
  arrive_in_cluster();  // nothing is said to the other block any more

  // Each warpgroup adds up one part of the positions. What it gives goes where nothing is read any more: the middle frame
  // before the last, and outer frames.
  char* const for_first = outer_memory;
  char* const for_second = middle_memory(rank, p.blocks);
  char* const results = middle_memory(other, p.blocks);
  const int row = first_column + thread / 32 * 16 + thread % 32 / 4;
  const T* const bias = static_cast<const T*>(p.bias);
  float add[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (const int n = row + 8 * half; bias != nullptr && n < p.columns) add[half] = to_float(bias[n * p.bias_stride]);
  if (warpgroup == 0) {
    if (const int before = p.blocks - 2; before >= 0)
      sm90::Barrier::wait(&shared.middle_empty[p.blocks % middle_stages], (before / middle_stages) & 1);
    give_sums<part_of_positions, frame_positions>(sums, for_second);
  } else {
    if (const int outers = p.blocks * p.outers[rank]; outers > 0) sm90::Barrier::wait(&shared.outer.empty[0], (outers - 1) & 1);
    give_sums<0, part_of_positions>(sums, for_first);
  }
  asm volatile("bar.sync 1, 256;" ::: "memory");
  if (warpgroup == 0) {
    add_sums<0, part_of_positions>(sums, for_first);
    stage_lines<T, 0, part_of_positions>(sums, results, add);
  } else {
    add_sums<part_of_positions, frame_positions>(sums, for_second);
    stage_lines<T, part_of_positions, frame_positions>(sums, results, add);
  }
  asm volatile("bar.sync 1, 256;" ::: "memory");
  store_staged<T, frame_positions>(results, shared.offset, static_cast<T*>(p.out) + first_column, p.columns - first_column);
  wait_in_cluster();
}

}  // namespace effcore::cuda::conv3d::hopper
