// dW[n, (tap, c)] = sum over positions of dout[position, n] x[position moved by the tap, c] on sm_90a: a product whose depth is
// the positions, cut into `splits` ranges of boxes whose sums a second kernel adds in order: deterministic, without atomics.
//
// Bound: the second-level cache (boxes.h), 24 bytes a cycle and multiprocessor, and the registers, which hold 12 accumulators
// of 64 x 64. A block takes 64 output channels x 64 channels for (almost) all taps at once, so that one box of dout serves 11
// taps, and a box of x with a halo those of a column of the kernel: 54 KB for 64 positions, 104 FLOPs a byte. Or, where there
// are enough output channels, 128 of them for half of the taps: 36 and 42 KB, 144 FLOPs a byte.
//
// Three warpgroups sum up to four taps of 64 output channels each, in one or two sequences that read x at equal distances:
// lines of one box, or boxes of equal size. Of 128 output channels two warpgroups take the halves for the same four taps, the
// third both halves of two more. Both operands stand in shared memory with the positions as rows, and wgmma reads them
// transposed. Its B operand of 64 columns a panel takes the distance of the taps as that of its panels: the panels overlap, and
// a sequence is one instruction, m64 n(64 * taps) k16. Positions of a box beyond the grid are zeros in dout.
#pragma once
#include <cuda.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "common/overlap.cuh"
#include "conv3d/hopper/boxes.h"
#include "conv3d/hopper/weights.h"
#include "hopper/pipeline.cuh"
#include "hopper/wgmma.cuh"

namespace effcore::cuda::conv3d::hopper {

namespace sm90 = effcore::cuda::hopper;

constexpr int summing_warpgroups = 3, taps_of_warpgroup = 4;
constexpr int weights_threads = (summing_warpgroups + 1) * 128, summing_registers = 160, fetching_registers = 24;
constexpr int most_weights_stages = 4, most_tap_blocks = 16;

// A box of x in a stage.
struct LoadedBox {
  std::int16_t t, h, w, row;  // offset from a position, and where it stands in the stage, behind dout
  bool halo;
};

// Taps that read rows first, first + distance, ... of a stage, and which 64 of the output channels they meet.
struct Sequence {
  std::int16_t first, distance, taps, half;
};

// What one warpgroup sums.
struct Unit {
  Sequence sequence[2];  // of at most 3 taps, and 2
  std::int16_t number[taps_of_warpgroup];
};

struct TapBlock {
  int boxes, units, bytes;  // of a stage
  LoadedBox box[summing_warpgroups * taps_of_warpgroup];
  Unit unit[summing_warpgroups];
};

struct TiledWeightsParams {
  CUtensorMap dout, box, box_with_halo;
  Tiling tiling;
  int stages, stage_bytes;
  int halves, column_panels, channel_panels, splits;  // panels of halves * 64, and of 64
  float* partial;                                     // PartialSums
  std::int64_t panel_sums;                            // of 64 output channels: their tiles
  TapBlock tap_block[most_tap_blocks];
};

using WeightsRing = sm90::Ring<most_weights_stages>;
using WeightsTurn = sm90::Turn<most_weights_stages>;

template <int Taps>
struct Sums {
  float of[32 * Taps];
};
template <>
struct Sums<0> {};

// One sequence's products of a stage.
template <class T, int Depth, int Taps>
__device__ __forceinline__ void multiply_stage(Sums<Taps>& sums, std::uint32_t stage, const Sequence& sequence,
                                               std::uint32_t half) {
  if constexpr (Taps > 0) {
    const sm90::SharedOperand<true> a(stage + half, Depth, false);
    const sm90::SharedOperand<true> b(stage + static_cast<std::uint32_t>(sequence.first * 128), sequence.distance, false);
    sm90::multiply<T, 64 * Taps, Depth / 16, true, true>(sums.of, a, b, true);
  }
}

template <int Taps>
__device__ __forceinline__ void pin(Sums<Taps>& sums) {
  if constexpr (Taps > 0) sm90::pin(sums.of);
}

template <int Taps>
__device__ __forceinline__ void store(const Sums<Taps>& sums, const std::uint32_t* offset, float* partial) {
#pragma unroll
  for (int n = 0; n < 8 * Taps; ++n) {
    auto* const to = reinterpret_cast<float2*>(partial + offset[n / 8]) + n % 8 * 256;
    to[0] = make_float2(sums.of[4 * n], sums.of[4 * n + 1]);
    to[128] = make_float2(sums.of[4 * n + 2], sums.of[4 * n + 3]);
  }
}

// One warpgroup's sums over `steps` stages, as tiles at `partial`.
template <class T, int Depth, int First, int Second>
__device__ __forceinline__ void sum_taps(const TiledWeightsParams& p, const Unit& unit, char* memory, WeightsRing& ring,
                                         int steps, float* partial) {
  Sums<First> first{};
  Sums<Second> second{};
  WeightsTurn turn, read;
  const auto half_of = [&](int which) { return static_cast<std::uint32_t>(unit.sequence[which].half * Depth * 128); };
  const std::uint32_t halves[2] = {half_of(0), half_of(1)};
  std::uint32_t offset[First + Second];
#pragma unroll
  for (int i = 0; i < First + Second; ++i)
    offset[i] = static_cast<std::uint32_t>(unit.sequence[i < First ? 0 : 1].half * p.panel_sums +
                                           unit.number[i] * p.channel_panels * sums_of_tile + threadIdx.x % 128 * 2);
  for (int s = 0; s < steps; ++s) {
    ring.wait_full(turn);
    const std::uint32_t stage = shared_address(memory + turn.stage * p.stage_bytes);
    pin(first), pin(second);
    sm90::wgmma_begin();
    multiply_stage<T, Depth>(first, stage, unit.sequence[0], halves[0]);
    multiply_stage<T, Depth>(second, stage, unit.sequence[1], halves[1]);
    sm90::wgmma_commit();
    sm90::wgmma_wait<1>();
    if (s > 0 && threadIdx.x % 128 == 0) ring.release(read);  // what the product before has read
    read = turn;
    turn.next(p.stages);
  }
  sm90::wgmma_wait<0>();
  pin(first), pin(second);
  store(first, offset, partial);
  if constexpr (Second > 0) store(second, offset + First, partial);
}

// Depth: positions of a step.
template <class T, int Depth>
__global__ void __launch_bounds__(weights_threads, 1) conv3d_weights_kernel(const __grid_constant__ TiledWeightsParams p) {
  extern __shared__ __align__(1024) char memory[];
  auto& ring = *reinterpret_cast<WeightsRing*>(memory + p.stages * p.stage_bytes);
  int panel = blockIdx.x;  // output channels fastest: neighbours share x
  const int column_panel = panel % p.column_panels;
  panel /= p.column_panels;
  const int channel_panel = panel % p.channel_panels;
  const TapBlock& taps = p.tap_block[panel / p.channel_panels];
  const std::int64_t tiles = p.tiling.tiles;
  const int begin = static_cast<int>(blockIdx.y * tiles / p.splits),
            steps = static_cast<int>((blockIdx.y + 1) * tiles / p.splits) - begin;

  if (threadIdx.x == 0) {
    ring.init(taps.units);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  wait_for_kernel_before();
  let_next_kernel_begin();  // which adds the sums up

  const int warpgroup = sm90::uniform(static_cast<int>(threadIdx.x) / 128);
  if (warpgroup == summing_warpgroups) {
    cutlass::arch::warpgroup_reg_dealloc<fetching_registers>();
    if (threadIdx.x == summing_warpgroups * 128) {
      constexpr auto keep = static_cast<std::uint64_t>(sm90::Keep::last);
      WeightsTurn turn;
      for (int s = 0; s < steps; ++s) {
        const Corner at = p.tiling.corner(begin + s);
        ring.wait_empty(turn);
        ring.expect(turn, taps.bytes);
        char* const stage = memory + turn.stage * p.stage_bytes;
        sm90::BarrierWord* const full = &ring.full[turn.stage];
        for (int half = 0; half < p.halves; ++half)
          cute::SM90_TMA_LOAD_5D::copy(&p.dout, full, keep, stage + half * Depth * 128, (column_panel * p.halves + half) * 64,
                                       at.w, at.t, at.b, at.h);
        for (int i = 0; i < taps.boxes; ++i) {
          const LoadedBox& box = taps.box[i];
          const CUtensorMap* const map = box.halo ? &p.box_with_halo : &p.box;
          const int w = at.w * p.tiling.step[2] + box.w, t = at.t * p.tiling.step[0] + box.t,
                    h = at.h * p.tiling.step[1] + box.h;
          cute::SM90_TMA_LOAD_5D::copy(map, full, keep, stage + box.row * 128, channel_panel * 64, w, t, at.b, h);
        }
        turn.next(p.stages);
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<summing_registers>();
    if (warpgroup < taps.units) {
      const Unit& unit = taps.unit[warpgroup];
      float* const partial =
          p.partial + (static_cast<std::int64_t>(blockIdx.y) * p.column_panels + column_panel) * p.halves * p.panel_sums +
          channel_panel * sums_of_tile;
      const auto sum = [&]<int First, int Second>(std::integer_sequence<int, First, Second>) {
        sum_taps<T, Depth, First, Second>(p, unit, memory, ring, steps, partial);
      };
      switch (unit.sequence[0].taps * 4 + unit.sequence[1].taps) {
        case 3 * 4 + 1: sum(std::integer_sequence<int, 3, 1>{}); break;
        case 3 * 4: sum(std::integer_sequence<int, 3, 0>{}); break;
        case 2 * 4 + 2: sum(std::integer_sequence<int, 2, 2>{}); break;
        case 2 * 4 + 1: sum(std::integer_sequence<int, 2, 1>{}); break;
        case 2 * 4: sum(std::integer_sequence<int, 2, 0>{}); break;
        case 1 * 4 + 1: sum(std::integer_sequence<int, 1, 1>{}); break;
        default: sum(std::integer_sequence<int, 1, 0>{});
      }
    }
  }
}

}  // namespace effcore::cuda::conv3d::hopper
