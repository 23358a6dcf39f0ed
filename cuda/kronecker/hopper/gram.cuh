// Gram matrices of ragged groups on sm_90a (what is computed, segments of tokens and their sums: ../gram.cu).
//
// Bound: T * D^2 FLOPs on the tensor cores (4096 a cycle and multiprocessor), or the second-level cache, from which a tile of
// 128 x `Columns` reads 2 * (128 + Columns) bytes a token: 64 FLOPs a byte at 128 columns, 85 at 256.
//
// A block computes one tile, in rows i of the upper triangle from the diagonal on, so that all but halves of the diagonal's
// blocks are wanted; a row with an odd number of blocks ends with a tile of 128. x streams by TMA through a ring of stages of 64
// tokens, in panels of 64 columns (wgmma.cuh) that serve as both operands, each read with the depth running down its rows. On
// the diagonal the rows' panels are the first two of the columns'. Two warpgroups hold 64 rows each. The last stage of a segment
// may hold tokens of the next one: the consumers overwrite them with zeros (what a token of another expert holds, NaN or not,
// must not be multiplied).
#pragma once
#include <cuda.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "attention/hopper/pipeline.cuh"
#include "attention/hopper/wgmma.cuh"
#include "kronecker/gram.cuh"

namespace effcore::cuda::kronecker::hopper {

namespace sm90 = effcore::cuda::hopper;

constexpr int consumers = 2 * 128, tile_threads = consumers + 32, steps = 64;
constexpr int panel_bytes = steps * sm90::panel_row_bytes;

struct TiledGramParams {
  GramParams gram;
  CUtensorMap x;  // boxes of 64 tokens x 64 columns
  int items;      // tiles of a segment
};

template <int Columns>
struct Stages {
  static constexpr int count = Columns == 256 ? 4 : 3;
  static constexpr int bytes = (block + Columns) / 64 * panel_bytes;
  static constexpr int shared_bytes = count * bytes + static_cast<int>(sizeof(sm90::Ring<count>));
};

// Of a segment's tiles, row by row; how many blocks of 128 columns it has.
struct Place {
  int row, column, blocks;
};
template <int Columns>
__device__ __forceinline__ Place place_of(int item, int n) {
  constexpr int most = Columns / block;
  int row = 0;
  for (int length = n; item >= (length + most - 1) / most; ++row, --length) item -= (length + most - 1) / most;
  const int column = row + item * most;
  return {row, column, min(most, n - column)};
}

// One tile by the two warpgroups of consumers.
template <class T, int Columns, int Wide, class Release>
__device__ __forceinline__ void consume(const GramParams& p, const Segment& segment, const Place& place, char* memory,
                                        sm90::Ring<Stages<Wide>::count>& ring, const Release& release) {
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32;
  const bool diagonal = place.row == place.column;
  const int count = (segment.end - segment.begin + steps - 1) / steps;
  const int tail = segment.end - segment.begin - (count - 1) * steps;  // tokens of the last stage
  float sums[Columns / 2];
#pragma unroll
  for (float& sum : sums) sum = 0.0f;

  sm90::Turn<Stages<Wide>::count> turn, read;
  for (int step = 0; step < count; ++step) {
    ring.wait_full(turn);
    char* const stage = memory + turn.stage * Stages<Wide>::bytes;
    char* const rows = diagonal && Wide > block ? stage : stage + Wide / 64 * panel_bytes;
    char* const columns = diagonal && Wide == block ? rows : stage;
    if (step + 1 == count && tail < steps) {
      const int chunks = (steps - tail) * sm90::panel_row_bytes / 16;
      for (int panel = 0; panel < (Wide + block) / 64; ++panel)
        for (int i = threadIdx.x; i < chunks; i += consumers)
          reinterpret_cast<uint4*>(stage + panel * panel_bytes + tail * sm90::panel_row_bytes)[i] = make_uint4(0, 0, 0, 0);
      sm90::fence_async();
      asm volatile("bar.sync 1, 256;" ::: "memory");
    }
    const sm90::SharedOperand<true> a(shared_address(rows + warpgroup * panel_bytes), steps, false);
    const sm90::SharedOperand<true> b(shared_address(columns), steps, false);
    sm90::pin(sums);
    sm90::wgmma_begin();
    sm90::multiply<T, Columns, steps / 16, true, true>(sums, a, b, true);
    sm90::wgmma_commit();
    sm90::wgmma_wait<1>();
    if (step > 0) release(read);
    read = turn;
    turn.next();
  }
  sm90::wgmma_wait<0>();
  sm90::pin(sums);

  const int row = warpgroup * 64 + thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  if (segment.slot >= 0) {
    const int n = (p.dim + block - 1) / block;
    const int number = place.row * n - place.row * (place.row - 1) / 2 + place.column - place.row;  // in the triangle
    float* const partial = p.partial + (static_cast<std::int64_t>(segment.slot) * p.tiles + number) * block * block;
#pragma unroll
    for (int i = 0; i < Columns / 4; ++i) {
      const int r = row + i % 2 * 8, c = i / 2 * 8 + column;
      *reinterpret_cast<float2*>(partial + (c / block * block + r) * block + c % block) =
          make_float2(sums[2 * i], sums[2 * i + 1]);
    }
    return;
  }
  const bool paired = p.dim % 2 == 0 && p.previous == nullptr && !diagonal;
  float* const matrix = p.result + static_cast<std::int64_t>(segment.expert) * p.dim * p.dim;
#pragma unroll
  for (int i = 0; i < Columns / 4; ++i) {
    const int r = place.row * block + row + i % 2 * 8, c = place.column * block + i / 2 * 8 + column;
    if (paired) {
      if (c >= p.dim) continue;
      const float2 value = make_float2(p.alpha * sums[2 * i], p.alpha * sums[2 * i + 1]);
      *reinterpret_cast<float2*>(matrix + static_cast<std::int64_t>(r) * p.dim + c) = value;
      matrix[static_cast<std::int64_t>(c) * p.dim + r] = value.x;
      matrix[static_cast<std::int64_t>(c + 1) * p.dim + r] = value.y;
    } else {
      store_element(p, segment.expert, r, c, sums[2 * i]);
      store_element(p, segment.expert, r, c + 1, sums[2 * i + 1]);
    }
  }
}

template <class T, int Columns>
__global__ void __launch_bounds__(tile_threads, Columns == 256 ? 1 : 2) tiled_gram_kernel(
    const __grid_constant__ TiledGramParams p) {
  extern __shared__ __align__(1024) char memory[];
  const Segment segment = p.gram.groups.segments[blockIdx.x / p.items];
  if (segment.expert < 0) return;
  const Place place = place_of<Columns>(blockIdx.x % p.items, (p.gram.dim + block - 1) / block);
  constexpr int stages = Stages<Columns>::count;
  auto& ring = *reinterpret_cast<sm90::Ring<stages>*>(memory + stages * Stages<Columns>::bytes);
  if (threadIdx.x == 0) {
    ring.init(2);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  if (threadIdx.x < consumers) {
    const auto release = [&](const sm90::Turn<stages>& turn) {
      if (threadIdx.x % 128 == 0) ring.release(turn);
    };
    if (place.blocks * block == Columns)
      consume<T, Columns, Columns>(p.gram, segment, place, memory, ring, release);
    else
      consume<T, block, Columns>(p.gram, segment, place, memory, ring, release);
  } else if (threadIdx.x == consumers) {
    const bool diagonal = place.row == place.column;
    const int panels = diagonal && Columns == block ? 0 : 2 * place.blocks;
    const int row_panels = diagonal && Columns > block ? 0 : 2;
    sm90::Turn<stages> turn;
    for (int token = segment.begin; token < segment.end; token += steps) {
      ring.wait_empty(turn);
      ring.expect(turn, (panels + row_panels) * panel_bytes);
      char* const stage = memory + turn.stage * Stages<Columns>::bytes;
      const auto load = [&](int to, int column) {
        cute::SM90_TMA_LOAD_2D::copy(&p.x, &ring.full[turn.stage], static_cast<std::uint64_t>(sm90::Keep::last),
                                     stage + to * panel_bytes, column, token);
      };
      for (int panel = 0; panel < row_panels; ++panel) load(Columns / 64 + panel, place.row * block + panel * 64);
      for (int panel = 0; panel < panels; ++panel) load(panel, place.column * block + panel * 64);
      turn.next();
    }
  }
}

// Two tiles of 128 columns, neighbours in a row, by two blocks of a cluster that share the row's panels.
template <class T>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(tile_threads, 2) paired_gram_kernel(
    const __grid_constant__ TiledGramParams p) {
  constexpr int Columns = block;
  extern __shared__ __align__(1024) char memory[];
  const int rank = static_cast<int>(cute::block_rank_in_cluster());
  const int item = blockIdx.x / 2;
  const Segment segment = p.gram.groups.segments[item / p.items];
  if (segment.expert < 0) return;
  Place place = place_of<2 * block>(item % p.items, (p.gram.dim + block - 1) / block);
  const bool alone = place.blocks == 1;
  if (alone && rank == 1) return;
  place.column += rank;
  const bool diagonal = place.row == place.column;
  constexpr int stages = Stages<Columns>::count;
  auto& ring = *reinterpret_cast<sm90::Ring<stages>*>(memory + stages * Stages<Columns>::bytes);
  if (threadIdx.x == 0) {
    ring.init(alone ? 2 : 4);
    cutlass::arch::fence_barrier_init();
  }
  if (alone)
    __syncthreads();
  else
    cute::cluster_sync();

  if (threadIdx.x < consumers) {
    const auto release = [&](const sm90::Turn<stages>& turn) {
      const int thread = threadIdx.x % 128;
      if (alone) {
        if (thread == 0) ring.release(turn);
      } else if (thread < 2) {
        sm90::Barrier::arrive(&ring.empty[turn.stage], static_cast<std::uint32_t>(thread), 1u);
      }
    };
    consume<T, Columns, Columns>(p.gram, segment, place, memory, ring, release);
  } else if (threadIdx.x == consumers) {
    sm90::Turn<stages> turn;
    for (int token = segment.begin; token < segment.end; token += steps) {
      ring.wait_empty(turn);
      ring.expect(turn, (diagonal ? 2 : 4) * panel_bytes);
      char* const stage = memory + turn.stage * Stages<Columns>::bytes;
      if (alone) {
        for (int panel = 0; panel < 2; ++panel)
          cute::SM90_TMA_LOAD_2D::copy(&p.x, &ring.full[turn.stage], static_cast<std::uint64_t>(sm90::Keep::last),
                                       stage + (2 + panel) * panel_bytes, place.row * block + panel * 64, token);
      } else {
        cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&p.x, &ring.full[turn.stage], 3, static_cast<std::uint64_t>(sm90::Keep::last),
                                               stage + (2 + rank) * panel_bytes, place.row * block + rank * 64, token);
      }
      for (int panel = 0; panel < (diagonal ? 0 : 2); ++panel)
        cute::SM90_TMA_LOAD_2D::copy(&p.x, &ring.full[turn.stage], static_cast<std::uint64_t>(sm90::Keep::last),
                                     stage + panel * panel_bytes, place.column * block + panel * 64, token);
      turn.next();
    }
  }
  __syncwarp();
  if (!alone) cute::cluster_sync();  // a block's memory must be there as long as its partner writes to it
}

}  // namespace effcore::cuda::kronecker::hopper
