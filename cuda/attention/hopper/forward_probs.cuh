// Forward of a consumer layer from kept probabilities on sm_90a: O = P V, a block matrix product, times the factors of P's
// rows. With dS and K in place of P and V, and one factor, this is also dq (backward_scores.cuh).
//
// Bound: P is read once from device memory, 2 bytes an element (half of the elements causal); V, `keys` rows for each `rows` of
// P, comes from L2. The product, 2 * D FLOPs an element, is a fifth of that time at D = 128.
//
// A producer warp fills a ring of stages by TMA, each a column of P tiles [strips][64 x 64] and a V tile [64 x D]; a warpgroup
// owns a strip of 64 queries, that is a row of kept tiles, and multiplies out of shared memory. Blocks stay, one a processor,
// and draw their next piece of work: while the last output is stored, the tiles of the next arrive.
#pragma once
#include "attention/hopper/softmax.cuh"
#include "attention/hopper/tiles.cuh"
#include "attention/hopper/work_queue.cuh"

namespace effcore::cuda::hopper {

using attention::probs_tile;

struct TiledForwardProbsParams {
  attention::ForwardParams args;
  float factor;
  int* ticket;        // the counter that work is drawn from, zeroed; null: one block a piece
  CUtensorMap probs;  // rows of 64 elements, all tiles of all heads; boxes of 64 rows
  CUtensorMap v;      // boxes of 64 keys
};

template <int D>
struct ForwardProbsTiles {
  static constexpr int strips = D == 256 ? 2 : 4, rows = 64 * strips, keys = probs_tile;  // D = 256: 128 registers for O
  static constexpr int stages = D == 64 ? 5 : 4;
  static constexpr int threads = 128 * (strips + 1);
};

template <class T, int D>
struct ForwardProbsShared {
  using Tiles = ForwardProbsTiles<D>;
  T probs[Tiles::stages][Tiles::strips][64 * Tiles::keys];
  T v[Tiles::stages][Tiles::keys * D];
  Ring<Tiles::stages> ring;
  WorkQueue queue;
};

// The kept tiles of strip w of a block that hold anything.
struct StripTiles : TileRange {
  __device__ StripTiles(const Shape& s, const Visibility& seen, int row0)
      : TileRange(KeyRange(seen, min(row0, s.queries - 1), min(row0 + 64, s.queries) - 1), attention::probs_tile) {
    if (row0 >= s.queries) end = first;
  }
};

// The producer warp.
template <class T, int D>
struct ForwardProbsProducer {
  using Tiles = ForwardProbsTiles<D>;
  static constexpr int keys = Tiles::keys, strips = Tiles::strips, strip_bytes = 64 * keys * static_cast<int>(sizeof(T));

  ForwardProbsShared<T, D>& shared;
  const TiledForwardProbsParams& p;
  const int lane = threadIdx.x % 32;
  Turn<Tiles::stages> turn;

  __device__ __forceinline__ void load(const Work& work) {
    const Shape& s = p.args.shape;
    const int batch = work.head / s.heads, head = work.head % s.heads, block0 = work.block * Tiles::rows;
    const Visibility seen(s, batch);
    const TileRange tiles(KeyRange(seen, block0, min(block0 + Tiles::rows, s.queries) - 1), keys);
    const ValueLoader<T, D, keys> values(p.v, p.args.v, seen, batch, head / s.group);
    const std::int64_t head_tiles = work.head * (attention::probs_elements_of(s) / (probs_tile * probs_tile));
    int first[strips], end[strips], tile0[strips];
#pragma unroll
    for (int w = 0; w < strips; ++w) {
      const StripTiles own(s, seen, block0 + 64 * w);
      first[w] = own.first, end[w] = own.end;
      tile0[w] = static_cast<int>(head_tiles + attention::probs_tiles_before(s, block0 / probs_tile + w));
    }
    for (int tile = tiles.first; tile < tiles.end; ++tile, turn.next()) {
      BarrierWord* const full = &shared.ring.full[turn.stage];
      const bool by_hand = values.by_hand(tile);
      if (lane == 0) {
        shared.ring.wait_empty(turn);
        int bytes = by_hand ? 0 : values.bytes;
#pragma unroll
        for (int w = 0; w < strips; ++w) bytes += tile >= first[w] && tile < end[w] ? strip_bytes : 0;
        // By hand, the stage is announced when the values are there.
        if (!by_hand)
          shared.ring.expect(turn, bytes);
        else
          Barrier::expect_transaction(full, bytes);
#pragma unroll
        for (int w = 0; w < strips; ++w)
          if (tile >= first[w] && tile < end[w])
            cute::SM90_TMA_LOAD_2D::copy(&p.probs, full, static_cast<std::uint64_t>(Keep::first), shared.probs[turn.stage][w],
                                         0, (tile0[w] + tile) * probs_tile);
      }
      __syncwarp();
      values.load(shared.v[turn.stage], full, tile);
      if (by_hand && lane == 0) Barrier::arrive(full);
    }
  }
};

// A warpgroup.
template <class T, int D>
struct ForwardProbsConsumer {
  using Tiles = ForwardProbsTiles<D>;
  static constexpr int keys = Tiles::keys;

  ForwardProbsShared<T, D>& shared;
  const TiledForwardProbsParams& p;
  const int warpgroup, lane = threadIdx.x % 32;
  Turn<Tiles::stages> turn, done;  // done: the stage whose product may still be under way

  __device__ __forceinline__ void multiply_values(const Work& work) {
    const Shape& s = p.args.shape;
    const int batch = work.head / s.heads, head = work.head % s.heads, block0 = work.block * Tiles::rows;
    const int row0 = block0 + 64 * warpgroup, row = row0 + threadIdx.x % 128 / 32 * 16 + lane / 4;
    const Visibility seen(s, batch);
    const TileRange tiles(KeyRange(seen, block0, min(block0 + Tiles::rows, s.queries) - 1), keys);
    const StripTiles own(s, seen, row0);
    float out[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
    for (int tile = tiles.first; tile < tiles.end; ++tile, turn.next()) {
      shared.ring.wait_full(turn);
      const bool mine = tile >= own.first && tile < own.end;
      if (mine) {
        pin(out);
        wgmma_begin();
        multiply<T, D, keys / 16>(out, SharedOperand<false>(shared_address(shared.probs[turn.stage][warpgroup]), 64),
                                  SharedOperand<true>(shared_address(shared.v[turn.stage]), keys), true);
        wgmma_commit();
      }
      if (tile > tiles.first) {
        if (mine)
          wgmma_wait<1>();
        else
          wgmma_wait<0>();
        release();
      }
    }
    wgmma_wait<0>();
    pin(out);
    if (tiles.first < tiles.end) release();
    float factor[2] = {p.factor, p.factor};
    if (p.args.factors != nullptr)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        factor[i] *=
            row + 8 * i < s.queries ? p.args.factors[static_cast<std::int64_t>(work.head) * s.queries + row + 8 * i] : 0.0f;
    clear_unseeing(out, seen, row0, min(row0 + 64, s.queries) - 1, row);
    store_rows<T, D>(p.args.out, batch, head, row, s.queries, 0, out, factor);
  }

 private:
  __device__ __forceinline__ void release() {
    if (lane == 0) shared.ring.release(done);
    done.next();
  }
};

template <class T, int D>
__global__ void __launch_bounds__(ForwardProbsTiles<D>::threads, 1)
    forward_probs_kernel(const __grid_constant__ TiledForwardProbsParams p) {
  using Tiles = ForwardProbsTiles<D>;
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<ForwardProbsShared<T, D>*>(memory);
  if (threadIdx.x == 0) {
    shared.ring.init(4 * Tiles::strips);
    shared.queue.ring.init(4 * Tiles::strips);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const auto& schedule = p.args.schedule;
  const int all = schedule.blocks * schedule.heads, warpgroup = uniform(static_cast<int>(threadIdx.x) / 128) - 1;
  if (warpgroup < 0) {
    if (threadIdx.x >= 32) return;
    ForwardProbsProducer<T, D> producer{shared, p};
    WorkSource(shared.queue, p.ticket, all).for_each([&](int number) {
      producer.load(Work(schedule, number, p.args.shape.causal));
    });
  } else {
    ForwardProbsConsumer<T, D> consumer{shared, p, warpgroup};
    WorkSink(shared.queue, all).for_each([&](int number) {
      consumer.multiply_values(Work(schedule, number, p.args.shape.causal));
    });
  }
}

}  // namespace effcore::cuda::hopper
