// Gram matrices of ragged groups on sm_90a (what is computed, segments of tokens and their sums: ../gram.cu).
//
// Bound: T * D^2 FLOPs on the tensor cores (4096 a cycle and multiprocessor).
//
// A block computes a pair of tiles of one segment at a time (pairs.cuh), a warpgroup the 128 x 128 sums of one of them. x
// streams by TMA through a ring of stages of 64 tokens, in panels of 64 columns (wgmma.cuh) that serve as either operand, each
// read with the depth running down its rows. The last stage of a segment may hold tokens of the next one: the consumers
// overwrite them with zeros (what a token of another expert holds, NaN or not, must not be multiplied). Results leave through
// shared memory by TMA, once as they are and once transposed, while the next pair's tokens arrive.
//
// Blocks stay and draw the next pair from a counter: experts' loads differ. On an H200 at 60 experts, 131072 tokens, 1408
// columns: stages of 32 tokens, twice as many, take 1.04 times as long, single tiles by two blocks a multiprocessor, in any
// order of segments, 1.09 times, and products alone, no result written, 0.83.
#pragma once
#include <cuda.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "hopper/pipeline.cuh"
#include "hopper/wgmma.cuh"
#include "kronecker/gram.cuh"
#include "kronecker/hopper/pairs.cuh"

namespace effcore::cuda::kronecker::hopper {

namespace sm90 = effcore::cuda::hopper;

constexpr int consumers = 2 * 128, pair_threads = consumers + 32, steps = 64, stages = 4;
constexpr int panel_bytes = steps * sm90::panel_row_bytes, operand_bytes = 2 * panel_bytes, stage_bytes = 3 * operand_bytes;
// Results on their way out: a piece of 64 x 32 of a tile as two boxes of 32 x 32; each warpgroup has two pieces.
constexpr int half = 64, quarter = 32, box_bytes = quarter * quarter * 4, piece_bytes = 2 * box_bytes;

struct PairGramParams {
  GramParams gram;
  int pairs, work;              // pairs of a segment, and of all of them
  bool copies_out;              // by TMA
  CUtensorMap x;                // boxes of 64 tokens x 64 columns
  CUtensorMap result, partial;  // boxes of 32 x 32 of matrices [D, D] and tiles [128, 128]
};

struct Work {
  Segment segment;  // expert -1: there is no more
  Pair pair;
};

struct PairGramShared {
  char tokens[stages][stage_bytes];
  char pieces[2][2][piece_bytes];
  Work work[2];
  sm90::Ring<stages> ring;
  sm90::Ring<2> draws;
};

__device__ __forceinline__ void meet_warpgroup() {
  asm volatile("bar.sync %0, 128;" ::"r"(2 + static_cast<int>(threadIdx.x) / 128) : "memory");
}

// By the consumers: no token from `begin` on in a stage.
__device__ __forceinline__ void clear_tokens(char* stage, int begin) {
  const int chunks = (steps - begin) * sm90::panel_row_bytes / 16;
  for (int panel = 0; panel < stage_bytes / panel_bytes; ++panel)
    for (int i = threadIdx.x; i < chunks; i += consumers)
      reinterpret_cast<uint4*>(stage + panel * panel_bytes + begin * sm90::panel_row_bytes)[i] = make_uint4(0, 0, 0, 0);
  sm90::fence_async();
  asm volatile("bar.sync 1, 256;" ::: "memory");
}

using Sums = float[2][block / 2];  // of a thread: rows 0-63 and 64-127 of its warpgroup's tile, laid out as wgmma.cuh says

// A warpgroup's tile, summed over the segment's tokens.
template <class T>
__device__ __forceinline__ void sum_tokens(Sums& sums, const Work& work, int warpgroup, PairGramShared& shared,
                                           sm90::Turn<stages>& turn) {
  const int tokens = work.segment.end - work.segment.begin;
  const std::uint32_t rows = sm90::uniform(work.pair.alone() ? 0 : warpgroup) * operand_bytes;
  const std::uint32_t columns = sm90::uniform(work.pair.alone() ? 0 : work.pair.operand(warpgroup)) * operand_bytes;
#pragma unroll
  for (int i = 0; i < block; ++i) sums[i / half][i % half] = 0.0f;
  sm90::Turn<stages> read;
  for (int first = 0; first < tokens; first += steps) {
    shared.ring.wait_full(turn);
    char* const stage = shared.tokens[turn.stage];
    if (tokens - first < steps) clear_tokens(stage, tokens - first);
    const std::uint32_t address = shared_address(stage);
    const sm90::SharedOperand<true> upper(address + rows, steps, false), lower(address + rows + panel_bytes, steps, false);
    const sm90::SharedOperand<true> across(address + columns, steps, false);
    sm90::pin(sums[0]);
    sm90::pin(sums[1]);
    sm90::wgmma_begin();
    sm90::multiply<T, block, steps / 16, true, true>(sums[0], upper, across, true);
    sm90::multiply<T, block, steps / 16, true, true>(sums[1], lower, across, true);
    sm90::wgmma_commit();
    sm90::wgmma_wait<1>();
    if (first > 0 && threadIdx.x % 128 == 0) shared.ring.release(read);
    read = turn;
    turn.next();
  }
  sm90::wgmma_wait<0>();
  sm90::pin(sums[0]);
  sm90::pin(sums[1]);
  if (tokens > 0 && threadIdx.x % 128 == 0) shared.ring.release(read);
}

// Where a thread's sums lie in a tile.
struct Place {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  int row = warp * 16 + lane / 4, column = lane % 4 * 2;
};

// alpha * sums + beta * previous; of previous values the upper triangle is read.
__device__ __forceinline__ void scale(const GramParams& p, int expert, int row0, int column0, Sums& sums) {
  const Place at;
  const float* const previous =
      p.previous == nullptr ? nullptr : p.previous + static_cast<std::int64_t>(expert) * p.dim * p.dim;
#pragma unroll
  for (int i = 0; i < block; ++i) {
    float& sum = sums[i / half][i % half];
    sum *= p.alpha;
    if (previous == nullptr) continue;
    const int row = row0 + i / half * half + at.row + i / 2 % 2 * 8, column = column0 + i % half / 4 * 8 + at.column + i % 2;
    if (max(row, column) < p.dim)
      sum = fmaf(p.beta, previous[static_cast<std::int64_t>(min(row, column)) * p.dim + max(row, column)], sum);
  }
}

// 64 rows and 32 columns of the tile, sums 4 n .. 4 n + 3 of a thread those of columns 8 n + .., in the 128-byte swizzle of the
// piece's boxes: one box below the other or, `mirrored`, side by side with columns as rows.
template <bool mirrored>
__device__ __forceinline__ void stage_piece(char* piece, const float (&sums)[block / 2], int part) {
  const Place at;
  char* const box = piece + at.warp / 2 * box_bytes;
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* const two = sums + 16 * part + 4 * n + 2 * i;  // (row + 8 i, 8 n + column) and its neighbour
      if (mirrored) {
        const int chunk = at.warp % 2 * 4 + i * 2 + at.lane / 16;
#pragma unroll
        for (int j = 0; j < 2; ++j)
          *reinterpret_cast<float*>(box + (8 * n + at.column + j) * 128 + (chunk ^ (at.column + j)) * 16 +
                                    at.lane / 4 % 4 * 4) = two[j];
      } else {
        const int chunk = n * 2 + at.lane % 4 / 2;
        *reinterpret_cast<float2*>(box + (at.row % quarter + 8 * i) * 128 + (chunk ^ at.lane / 4) * 16 + at.lane % 2 * 8) =
            make_float2(two[0], two[1]);
      }
    }
}

// The tile and, off the diagonal, its mirror; on the diagonal the two are the same bits.
__device__ __forceinline__ void copy_out(const PairGramParams& p, const Segment& segment, int row, int column, int warpgroup,
                                         const Sums& sums, PairGramShared& shared) {
  const bool is_partial = segment.slot >= 0, leader = threadIdx.x % 128 == 0;
  const int n = (p.gram.dim + block - 1) / block;
  const CUtensorMap& map = is_partial ? p.partial : p.result;
  const int matrix = is_partial ? segment.slot * p.gram.tiles + triangle_number(row, column, n) : segment.expert;
  const int row0 = is_partial ? 0 : row * block, column0 = is_partial ? 0 : column * block;
  int buffer = 0;
  const auto send = [&]<bool mirrored>(int down, int part, const float (&half_sums)[block / 2]) {
    char* const piece = shared.pieces[warpgroup][buffer];
    buffer ^= 1;
    if (leader) cute::tma_store_wait<1>();
    meet_warpgroup();
    stage_piece<mirrored>(piece, half_sums, part);
    sm90::fence_async();
    meet_warpgroup();
    if (!leader) return;
    for (int i = 0; i < 2; ++i) {
      const int y = row0 + down * half + i * quarter, x = column0 + part * quarter;
      cute::SM90_TMA_STORE_3D::copy(&map, piece + i * box_bytes, mirrored ? y : x, mirrored ? x : y, matrix);
    }
    cute::tma_store_arrive();
  };
  const bool both = !is_partial && row != column;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    send.template operator()<false>(i / 4, i % 4, sums[i / 4]);
    if (both) send.template operator()<true>(i / 4, i % 4, sums[i / 4]);
  }
}

// Where rows of the result do not start at multiples of 16 bytes.
__device__ __forceinline__ void store_elements(const GramParams& p, int expert, int row0, int column0, const Sums& sums) {
  const Place at;
#pragma unroll
  for (int i = 0; i < block; ++i)
    store_element(p, expert, row0 + i / half * half + at.row + i / 2 % 2 * 8, column0 + i % half / 4 * 8 + at.column + i % 2,
                  sums[i / half][i % half]);
}

template <class T>
__device__ __forceinline__ void consume(const PairGramParams& p, PairGramShared& shared) {
  const int warpgroup = sm90::uniform(threadIdx.x / 128);
  sm90::Turn<stages> turn;
  for (sm90::Turn<2> draw;; draw.next()) {
    shared.draws.wait_full(draw);
    const Work work = shared.work[draw.stage];
    shared.draws.release(draw);
    if (work.segment.expert < 0) break;
    Sums sums;
    sum_tokens<T>(sums, work, warpgroup, shared, turn);
    if (warpgroup == 1 && work.pair.alone()) continue;
    const int row = work.pair.rows[warpgroup], column = work.pair.columns[warpgroup];
    if (work.segment.slot < 0 && !p.copies_out) {
      store_elements(p.gram, work.segment.expert, row * block, column * block, sums);
      continue;
    }
    if (work.segment.slot < 0) scale(p.gram, work.segment.expert, row * block, column * block, sums);
    copy_out(p, work.segment, row, column, warpgroup, sums, shared);
  }
  if (threadIdx.x % 128 == 0) cute::tma_store_wait<0>();
}

// By one warp: a lane for each panel.
__device__ __forceinline__ void produce(const PairGramParams& p, PairGramShared& shared) {
  const int n = (p.gram.dim + block - 1) / block, lane = threadIdx.x % 32;
  sm90::Turn<stages> turn;
  sm90::Turn<2> draw;
  const auto hand_over = [&](const Work& work) {
    shared.draws.wait_empty(draw);
    if (lane == 0) {
      shared.work[draw.stage] = work;
      sm90::Barrier::arrive(&shared.draws.full[draw.stage]);
    }
    draw.next();
  };
  const auto draw_next = [&] { return lane == 0 ? atomicAdd(p.gram.groups.drawn, 1) : 0; };
  for (int drawn = draw_next();;) {
    const int number = __shfl_sync(~0u, drawn, 0);
    if (number >= p.work) break;
    drawn = draw_next();  // known by the time that it is needed
    const Work work{p.gram.groups.segments[number / p.pairs], pair(number % p.pairs, n)};
    if (work.segment.expert < 0) continue;
    hand_over(work);
    const int panels = 2 * work.pair.operands();
    const int block_column = lane < 2 ? work.pair.rows[0] : lane < 4 ? work.pair.rows[1] : work.pair.columns[0];
    const int column = block_column * block + lane % 2 * sm90::panel_columns;
    for (int token = work.segment.begin; token < work.segment.end; token += steps) {
      shared.ring.wait_empty(turn);
      if (lane == 0) shared.ring.expect(turn, panels * panel_bytes);
      __syncwarp();
      if (lane < panels)
        cute::SM90_TMA_LOAD_2D::copy(&p.x, &shared.ring.full[turn.stage], static_cast<std::uint64_t>(sm90::Keep::last),
                                     shared.tokens[turn.stage] + lane * panel_bytes, column, token);
      turn.next();
    }
  }
  hand_over(Work{{-1, 0, 0, -1}, {}});
}

template <class T>
__global__ void __launch_bounds__(pair_threads, 1) pair_gram_kernel(const __grid_constant__ PairGramParams p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<PairGramShared*>(memory);
  if (threadIdx.x == 0) {
    shared.ring.init(2);
    shared.draws.init(consumers);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < consumers)
    consume<T>(p, shared);
  else
    produce(p, shared);
}

}  // namespace effcore::cuda::kronecker::hopper
