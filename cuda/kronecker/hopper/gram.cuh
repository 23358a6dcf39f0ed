// Gram matrices of ragged groups on sm_90a (what is computed, segments of tokens and their sums: ../gram.cu).
//
// Bound: T * D^2 FLOPs on the tensor cores (4096 a cycle and multiprocessor).
//
// A block computes one tile of the upper triangle, 128 x 128, of one segment. x streams by TMA through a ring of stages of 64
// tokens, in panels of 64 columns (wgmma.cuh) that serve as either operand, each read with the depth running down its rows; on
// the diagonal two panels are both. Two warpgroups hold 64 rows each. The last stage of a segment may hold tokens of the next
// one: the consumers overwrite them with zeros (what a token of another expert holds, NaN or not, must not be multiplied).
//
// Two blocks share a multiprocessor, so that one multiplies while the other writes its results, twice 64 KiB. On an H200 at 60
// experts, 131072 tokens, 1408 columns: tiles of 128 x 256, which read a quarter less but stand alone, take 1.2 times as long,
// and pairs of blocks in a cluster that load their common rows once, 1.04 times.
#pragma once
#include <cuda.h>

#include <cute/arch/copy_sm90_tma.hpp>

#include "hopper/pipeline.cuh"
#include "hopper/wgmma.cuh"
#include "kronecker/gram.cuh"

namespace effcore::cuda::kronecker::hopper {

namespace sm90 = effcore::cuda::hopper;

constexpr int consumers = 2 * 128, tile_threads = consumers + 32, steps = 64, stages = 3;
constexpr int panel_bytes = steps * sm90::panel_row_bytes, stage_panels = 2 * block / 64;
constexpr int stage_bytes = stage_panels * panel_bytes;
constexpr int tile_shared_bytes = stages * stage_bytes + static_cast<int>(sizeof(sm90::Ring<stages>));

struct TiledGramParams {
  GramParams gram;
  CUtensorMap x;  // boxes of 64 tokens x 64 columns
};

// By the consumers: no token from `begin` on in a stage.
__device__ __forceinline__ void clear_tokens(char* stage, int begin) {
  const int chunks = (steps - begin) * sm90::panel_row_bytes / 16;
  for (int panel = 0; panel < stage_panels; ++panel)
    for (int i = threadIdx.x; i < chunks; i += consumers)
      reinterpret_cast<uint4*>(stage + panel * panel_bytes + begin * sm90::panel_row_bytes)[i] = make_uint4(0, 0, 0, 0);
  sm90::fence_async();
  asm volatile("bar.sync 1, 256;" ::: "memory");
}

// A warpgroup's 64 rows of the tile, summed over the segment's tokens.
template <class T>
__device__ __forceinline__ void sum_tokens(float (&sums)[block / 2], const Segment& segment, bool diagonal, char* memory,
                                           sm90::Ring<stages>& ring) {
  const int warpgroup = threadIdx.x / 128;
  const int tokens = segment.end - segment.begin;
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  sm90::Turn<stages> turn, read;
  for (int first = 0; first < tokens; first += steps) {
    ring.wait_full(turn);
    char* const rows = memory + turn.stage * stage_bytes;
    char* const columns = diagonal ? rows : rows + stage_bytes / 2;
    if (tokens - first < steps) clear_tokens(rows, tokens - first);
    const sm90::SharedOperand<true> a(shared_address(rows + warpgroup * panel_bytes), steps, false);
    const sm90::SharedOperand<true> b(shared_address(columns), steps, false);
    sm90::pin(sums);
    sm90::wgmma_begin();
    sm90::multiply<T, block, steps / 16, true, true>(sums, a, b, true);
    sm90::wgmma_commit();
    sm90::wgmma_wait<1>();
    if (first > 0 && threadIdx.x % 128 == 0) ring.release(read);
    read = turn;
    turn.next();
  }
  sm90::wgmma_wait<0>();
  sm90::pin(sums);
}

// Four lanes write 32 bytes of a row, eight lanes 32 bytes of a column; results leave the second-level cache first, where
// tokens are read again.
__device__ __forceinline__ void store_tile(const GramParams& p, const Segment& segment, int number, int2 place,
                                           const float (&sums)[block / 2]) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int row = threadIdx.x / 128 * 64 + thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const auto each = [&](const auto& store) {
#pragma unroll
    for (int i = 0; i < block / 4; ++i) store(row + i % 2 * 8, i / 2 * 8 + column, sums[2 * i], sums[2 * i + 1]);
  };
  if (segment.slot >= 0) {
    float* const partial = p.partial + (static_cast<std::int64_t>(segment.slot) * p.tiles + number) * block * block;
    each([&](int r, int c, float x, float y) { *reinterpret_cast<float2*>(partial + r * block + c) = make_float2(x, y); });
  } else if (p.dim % 2 == 0 && p.previous == nullptr && place.x != place.y) {
    float* const matrix = p.result + static_cast<std::int64_t>(segment.expert) * p.dim * p.dim;
    each([&](int r, int c, float x, float y) {
      const std::int64_t i = place.x * block + r, j = place.y * block + c;
      if (j >= p.dim) return;
      x *= p.alpha, y *= p.alpha;
      __stcs(reinterpret_cast<float2*>(matrix + i * p.dim + j), make_float2(x, y));
      __stcs(matrix + j * p.dim + i, x);
      __stcs(matrix + (j + 1) * p.dim + i, y);
    });
  } else {
    each([&](int r, int c, float x, float y) {
      store_element(p, segment.expert, place.x * block + r, place.y * block + c, x);
      store_element(p, segment.expert, place.x * block + r, place.y * block + c + 1, y);
    });
  }
}

template <class T>
__global__ void __launch_bounds__(tile_threads, 2) tiled_gram_kernel(const __grid_constant__ TiledGramParams p) {
  extern __shared__ __align__(1024) char memory[];
  const Segment segment = p.gram.groups.segments[blockIdx.x / p.gram.tiles];
  if (segment.expert < 0) return;
  const int number = blockIdx.x % p.gram.tiles;
  const int2 place = triangle(number, (p.gram.dim + block - 1) / block);
  const bool diagonal = place.x == place.y;
  auto& ring = *reinterpret_cast<sm90::Ring<stages>*>(memory + stages * stage_bytes);
  if (threadIdx.x == 0) {
    ring.init(2);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  if (threadIdx.x < consumers) {
    float sums[block / 2];
    sum_tokens<T>(sums, segment, diagonal, memory, ring);
    store_tile(p.gram, segment, number, place, sums);
  } else if (threadIdx.x == consumers) {
    sm90::Turn<stages> turn;
    const int panels = diagonal ? stage_panels / 2 : stage_panels;
    for (int token = segment.begin; token < segment.end; token += steps) {
      ring.wait_empty(turn);
      ring.expect(turn, panels * panel_bytes);
      for (int panel = 0; panel < panels; ++panel) {
        const int column = (panel < 2 ? place.x : place.y) * block + panel % 2 * 64;
        cute::SM90_TMA_LOAD_2D::copy(&p.x, &ring.full[turn.stage], static_cast<std::uint64_t>(sm90::Keep::last),
                                     memory + turn.stage * stage_bytes + panel * panel_bytes, column, token);
      }
      turn.next();
    }
  }
}

}  // namespace effcore::cuda::kronecker::hopper
