// out[position, n] = bias[n] + sum over taps and channels of x[position moved by the tap, c] W[(tap, c), n] on sm_90a, where
// positions are one apart.
//
// Bound: 2 * taps * channels FLOPs an output on the tensor cores (4096 a cycle and multiprocessor). The second-level cache (5 to
// 6 TB/s) bounds what reads its voxels anew for each tap, so here a box of voxels with a halo all around stands in shared
// memory, and all taps read it there: a tap is a distance between rows. Rows at any distance are no operand of wgmma in shared
// memory (whose rows come in blocks of 8), therefore A is gathered into registers by ldmatrix.
//
// A block computes Subtiles x 128 positions x Columns outputs, each sub-tile a box of at most 128 positions; two warpgroups take
// 64 positions of every sub-tile, so that a tile of weights [Columns, 64 channels] serves them all. Two producer warps fill the
// rings of boxes and of weights by TMA.
//
// Rows of a box in shared memory: t fastest, then w, h, b; 128 bytes (64 channels) each. Where a box covers all frames it has no
// halo in t, and rows beyond are read from a row of zeros: runs of rows stay free of bank conflicts.
#pragma once
#include <cuda.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "common/overlap.cuh"
#include "conv3d/params.h"
#include "hopper/cluster.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/wgmma.cuh"

namespace effcore::cuda::conv3d::hopper {

namespace sm90 = effcore::cuda::hopper;

constexpr int boxed_consumers = 2 * 128, boxed_threads = 3 * 128, rows_of_subtile = 128;
constexpr int most_box_stages = 4, most_tile_stages = 12, zero_bytes = 1024;

// Where a tap reads: rows from a position's own, its frame from the position's, and its place among the packed weights.
struct BoxedTap {
  std::int16_t rows, t, number;
};

struct BoxedRowsParams {
  CUtensorMap box, weights;
  int side[4], tiles[3], grid[4];  // t, w, h, b; tiles: t, w, h
  Divider side_t, side_w, side_h;
  int pitch_w, pitch_h, pitch_b, frames;  // rows of a box; frames: its extent in t
  int first[3];                           // of a box from a tile's corner: t, w, h
  int box_stages, tile_stages, blocks, taps;
  int box_rows, box_bytes;  // box_bytes: with alignment
  int padded_columns, columns;
  void* out;
  std::int64_t out_stride[4];  // t, w, h, b
  bool out_aligned;
  const void* bias;
  std::int64_t bias_stride;
  BoxedTap tap[max_taps];
};

struct BoxedRings {
  sm90::Ring<most_box_stages> boxes;
  sm90::Ring<most_tile_stages> weights;
};

struct Place {
  int t, w, h, b;
};

__device__ __forceinline__ Place corner_of(const BoxedRowsParams& p, int tile) {
  Place at;
  at.t = tile % p.tiles[0] * p.side[0];
  tile /= p.tiles[0];
  at.w = tile % p.tiles[1] * p.side[1];
  tile /= p.tiles[1];
  at.h = tile % p.tiles[2] * p.side[2];
  at.b = tile / p.tiles[2] * p.side[3];
  return at;
}

__device__ __forceinline__ void load_operand(std::uint32_t (&a)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}

template <class T, int Subtiles, int Columns, int Split>
__global__ void __launch_bounds__(boxed_threads, 1) conv3d_boxed_kernel(const __grid_constant__ BoxedRowsParams p) {
  constexpr int tile_bytes = Columns * 128;
  extern __shared__ __align__(1024) char memory[];
  const int stage_bytes = Subtiles * p.box_bytes;
  char* const zeros = memory;
  char* const boxes = memory + zero_bytes;
  char* const tiles = boxes + p.box_stages * stage_bytes;
  auto& rings = *reinterpret_cast<BoxedRings*>(tiles + p.tile_stages * tile_bytes);
  if (threadIdx.x == 0) {
    rings.boxes.init(boxed_consumers / 32);
    rings.weights.init(2);
    cutlass::arch::fence_barrier_init();
  }
  if (threadIdx.x < zero_bytes / 16) reinterpret_cast<uint4*>(zeros)[threadIdx.x] = uint4{};
  __syncthreads();

  const int first_column = blockIdx.y * Columns, first_tile = blockIdx.x * Subtiles;
  const int part = Split > 1 ? static_cast<int>(blockIdx.z) : 0;
  const int first_block = part * p.blocks / Split, blocks = (part + 1) * p.blocks / Split;
  sm90::Turn<most_box_stages> box_turn;
  sm90::Turn<most_tile_stages> tile_turn;
  const int warpgroup = sm90::uniform(static_cast<int>(threadIdx.x) / 128), thread = threadIdx.x % 128;

  if (warpgroup == 2) {
    cutlass::arch::warpgroup_reg_dealloc<24>();
    constexpr auto keep = static_cast<std::uint64_t>(sm90::Keep::last);
    if (thread == 0) {
      for (int block = first_block; block < blocks; ++block) {
        rings.boxes.wait_empty(box_turn);
        rings.boxes.expect(box_turn, Subtiles * p.box_rows * 128);
#pragma unroll
        for (int r = 0; r < Subtiles; ++r) {
          const Place at = corner_of(p, first_tile + r);
          cute::SM90_TMA_LOAD_5D::copy(&p.box, &rings.boxes.full[box_turn.stage], keep,
                                       boxes + box_turn.stage * stage_bytes + r * p.box_bytes, block * 64, at.t + p.first[0],
                                       at.w + p.first[1], at.h + p.first[2], at.b);
        }
        box_turn.next(p.box_stages);
      }
    } else if (thread == 32) {
      wait_for_kernel_before();  // which packs the weights
      for (int block = first_block; block < blocks; ++block)
        for (int tap = 0; tap < p.taps; ++tap) {
          rings.weights.wait_empty(tile_turn);
          rings.weights.expect(tile_turn, tile_bytes);
          cute::SM90_TMA_LOAD_2D::copy(&p.weights, &rings.weights.full[tile_turn.stage], keep,
                                       tiles + tile_turn.stage * tile_bytes, block * 64,
                                       p.tap[tap].number * p.padded_columns + first_column);
          tile_turn.next(p.tile_stages);
        }
    }
    return;
  }
  cutlass::arch::warpgroup_reg_alloc<240>();

  const int lane = thread % 32, own = warpgroup * 64 + thread / 32 * 16;  // the first of the warp's 16 rows in each sub-tile
  int own_row, own_frame;
  {
    int t = own + lane % 16;
    int w = p.side_t.take(t), h = p.side_w.take(w), b = p.side_h.take(h);
    if (b >= p.side[3]) t = w = h = b = 0;  // beyond the box's positions
    own_row = t + w * p.pitch_w + h * p.pitch_h + b * p.pitch_b;
    own_frame = t;
  }
  const std::uint32_t half = static_cast<std::uint32_t>(lane / 16);

  float sums[Subtiles][Columns / 2];
#pragma unroll
  for (int r = 0; r < Subtiles; ++r)
#pragma unroll
    for (int i = 0; i < Columns / 2; ++i) sums[r][i] = 0.0f;
  using Atom = typename sm90::Instruction<T, Columns, sm90::gmma::Major::K, sm90::gmma::Major::K>::Registers;

  int before = -1;  // the stage of the tile before
  for (int block = first_block; block < blocks; ++block) {
    rings.boxes.wait_full(box_turn);
    const std::uint32_t box = shared_address(boxes + box_turn.stage * stage_bytes);
    for (int tap = 0; tap < p.taps; ++tap) {
      const int row = own_row + p.tap[tap].rows;
      const bool valid = static_cast<unsigned>(own_frame + p.tap[tap].t) < static_cast<unsigned>(p.frames);
      const std::uint32_t phase = static_cast<std::uint32_t>(row) & 7;
      const std::uint32_t address = (valid ? box + static_cast<std::uint32_t>(row) * 128 : shared_address(zeros) + phase * 128) +
                                    ((half ^ phase) << 4);
      const std::uint32_t next = valid ? static_cast<std::uint32_t>(p.box_bytes) : 0;
      rings.weights.wait_full(tile_turn);
      const sm90::SharedOperand<false> b(shared_address(tiles + tile_turn.stage * tile_bytes), Columns, false);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        std::uint32_t a[Subtiles][4];
#pragma unroll
        for (int r = 0; r < Subtiles; ++r) load_operand(a[r], (address ^ static_cast<std::uint32_t>(k << 5)) + r * next);
#pragma unroll
        for (int r = 0; r < Subtiles; ++r) sm90::pin(sums[r]);
        sm90::wgmma_begin();
#pragma unroll
        for (int r = 0; r < Subtiles; ++r)
          [&]<int... I>(std::integer_sequence<int, I...>) {
            Atom::fma(a[r][0], a[r][1], a[r][2], a[r][3], b.at(k), sums[r][I]..., sm90::gmma::ScaleOut::One);
          }(std::make_integer_sequence<int, Columns / 2>{});
        sm90::wgmma_commit();
        sm90::wgmma_wait<Subtiles * Columns < 384 ? 1 : 0>();  // registers for two products' operands, or for one's
        if (k == 0 && before >= 0 && thread == 0) {
          sm90::Turn<most_tile_stages> read;
          read.stage = before;
          rings.weights.release(read);
        }
      }
      before = tile_turn.stage;
      tile_turn.next(p.tile_stages);
    }
    __syncwarp();
    if (lane == 0) rings.boxes.release(box_turn);
    box_turn.next(p.box_stages);
  }
  sm90::wgmma_wait<0>();
#pragma unroll
  for (int r = 0; r < Subtiles; ++r) sm90::pin(sums[r]);

  // Both warpgroups are done with voxels and weights: their memory takes the results, of which whole lines leave.
  asm volatile("bar.sync 1, 256;" ::: "memory");
  char* results = boxes;
  if constexpr (Split == 2) {
    // Each block of the pair finishes one of the two sub-tiles, with the sums that the other block leaves in its memory.
    static_assert(Subtiles == 2);
    float4* const left = reinterpret_cast<float4*>(boxes) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < Columns / 8; ++i) {
      const int e = 4 * i;
      left[i * boxed_consumers] = part == 0 ? make_float4(sums[1][e], sums[1][e + 1], sums[1][e + 2], sums[1][e + 3])
                                            : make_float4(sums[0][e], sums[0][e + 1], sums[0][e + 2], sums[0][e + 3]);
    }
    sm90::cluster_arrive();
    sm90::cluster_wait();
#pragma unroll
    for (int i = 0; i < Columns / 8; ++i) {
      const float4 x = sm90::load_of_block(left + i * boxed_consumers, 1 - part);
      const float other[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[0][4 * i + j] = (part == 0 ? sums[0][4 * i + j] : sums[1][4 * i + j]) + other[j];
    }
    sm90::cluster_arrive();
    results += boxed_consumers * Columns / 2 * sizeof(float);
  }
  constexpr int finished = Split == 2 ? 1 : Subtiles;
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
    for (int r = 0; r < finished; ++r) {
      const Tile<T, Columns> result(results + r * rows_of_subtile * Columns * sizeof(T));
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair(result.at(own + 8 * half + lane / 4, column), 0, 2, true, sums[r][4 * n + 2 * half] + add[0],
                   sums[r][4 * n + 2 * half + 1] + add[1]);
    }
  }
  asm volatile("bar.sync 1, 256;" ::: "memory");
  constexpr int pieces = Columns / 8;
  T* const out = static_cast<T*>(p.out) + first_column;
  for (int i = threadIdx.x; i < rows_of_subtile * pieces; i += boxed_consumers) {
    const int local = i / pieces, column = i % pieces * 8;
    int t = local;
    int w = p.side_t.take(t), h = p.side_w.take(w);
    const int b = p.side_h.take(h);
    if (b >= p.side[3]) continue;
#pragma unroll
    for (int r = 0; r < finished; ++r) {
      const Place at = corner_of(p, first_tile + r + (Split == 2 ? part : 0));
      if (at.t + t >= p.grid[0] || at.w + w >= p.grid[1] || at.h + h >= p.grid[2] || at.b + b >= p.grid[3]) continue;
      T* const to = out + (at.t + t) * p.out_stride[0] + (at.w + w) * p.out_stride[1] + (at.h + h) * p.out_stride[2] +
                    (at.b + b) * p.out_stride[3] + column;
      const Tile<T, Columns> result(results + r * rows_of_subtile * Columns * sizeof(T));
      const T* const from = result.at(local, column);
      if (p.out_aligned) {
        if (first_column + column < p.columns) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (first_column + column + e < p.columns) to[e] = from[e];
      }
    }
  }
  if constexpr (Split > 1) sm90::cluster_wait();  // nobody reads this block's memory any more
}

}  // namespace effcore::cuda::conv3d::hopper
