// A product with the transpose of a kept matrix on sm_90a, summed over the query heads of a kv head, D = 64 or 128, 16-bit:
// dv = P^T dout, and with dS and Q in place of P and dout, and a factor, dk = scale dS^T Q (backward_scores.cuh).
//
// Bound: the kept matrix is read once. A block owns 256 keys, 128 a warpgroup, so that dout, which comes out of L2 once for
// each block, is half as much as P (at D = 128). P's tiles are the A operand as they lie in memory. Shared memory: a ring of P
// [64 queries x 256 keys] and dout [64 x D], 192 KiB of it on its way. Blocks stay, one a processor, and draw their next piece
// of work: while the last sums are stored, the tiles of the next arrive.
#pragma once
#include "attention/hopper/backward_tiles.cuh"
#include "attention/hopper/work_queue.cuh"

namespace effcore::cuda::hopper {

using attention::Work;

struct ProbsValuesParams {
  Shape shape;
  Schedule schedule;
  Tensor4 dv;
  bool float_dv;
  float factor;
  int* ticket;  // the counter that work is drawn from, zeroed; null: one block a piece
  CUtensorMap probs, dout;
};

template <int D>
struct ProbsValuesTiles {
  static constexpr int keys = 256, queries = 64, stages = D == 64 ? 5 : 4;
  using Registers = hopper::Registers<56, 224>;
  static constexpr int probs_bytes = queries * keys * 2, dout_bytes = queries * D * 2;
  static constexpr int dout_at = stages * probs_bytes, control_at = dout_at + stages * dout_bytes;
  static constexpr int shared_bytes = control_at + 256;
  static_assert(shared_bytes <= shared_limit);
};

template <class Tiles>
struct ProbsValuesControl {
  Ring<Tiles::stages> ring;
  bool more[Tiles::stages];  // else the stage is empty, and the piece of work has ended
  WorkQueue queue;
};

// The producer warp.
template <int D>
struct ProbsValuesProducer {
  using Tiles = ProbsValuesTiles<D>;

  const ProbsValuesParams& p;
  char* const shared;
  ProbsValuesControl<Tiles>& control;
  Turn<Tiles::stages> turn;

  __device__ __forceinline__ void load(const Work& work) {
    const Shape& s = p.shape;
    const int batch = work.head / s.kv_heads, kv_head = work.head % s.kv_heads, key0 = work.block * Tiles::keys;
    const Visibility seen(s, batch);
    attention::Steps<Tiles::queries, Tiles::keys> steps(seen, s.queries, s.group, work.block);
    for (attention::Step step = steps.next(); step.exists(); step = steps.next(), turn.next()) {
      if (threadIdx.x % 32 != 0) continue;
      const int head = kv_head * s.group + step.head, query0 = step.block * Tiles::queries;
      control.ring.wait_empty(turn);
      BarrierWord* const full = &control.ring.full[turn.stage];
      control.more[turn.stage] = true;
      control.ring.expect(turn, Tiles::probs_bytes + Tiles::dout_bytes);
      load_probs_tiles(p.probs, full, shared + turn.stage * Tiles::probs_bytes, s, batch * s.heads + head, query0, key0,
                       Tiles::queries, Tiles::keys);
      load_panels<D>(p.dout, full, shared + Tiles::dout_at + turn.stage * Tiles::dout_bytes, Tiles::queries, query0, head,
                     batch, Keep::last);
    }
    if (threadIdx.x % 32 == 0) {
      control.ring.wait_empty(turn);
      control.more[turn.stage] = false;
      Barrier::arrive(&control.ring.full[turn.stage]);
    }
    turn.next();
  }
};

// A warpgroup: 128 keys.
template <class T, int D>
struct ProbsValuesConsumer {
  using Tiles = ProbsValuesTiles<D>;

  const ProbsValuesParams& p;
  const std::uint32_t base;
  ProbsValuesControl<Tiles>& control;
  const int warpgroup, lane = threadIdx.x % 32;
  Turn<Tiles::stages> turn;

  __device__ __forceinline__ void multiply_values(const Work& work) {
    constexpr int queries = Tiles::queries, tile_bytes = 64 * panel_row_bytes;
    const Shape& s = p.shape;
    const int batch = work.head / s.kv_heads, kv_head = work.head % s.kv_heads;
    float low[D / 2], high[D / 2];  // dv of the first and of the second 64 keys
#pragma unroll
    for (int i = 0; i < D / 2; ++i) low[i] = 0.0f, high[i] = 0.0f;
    pin(low), pin(high);
    Turn<Tiles::stages> before = turn;
    for (bool first = true; more(); first = false) {
      const std::uint32_t tiles = base + turn.stage * Tiles::probs_bytes + 2 * warpgroup * tile_bytes;
      const SharedOperand<true> dout(base + Tiles::dout_at + turn.stage * Tiles::dout_bytes, queries);
      wgmma_begin();
      multiply<T, D, queries / 16>(low, SharedOperand<true>(tiles, queries), dout, true);
      multiply<T, D, queries / 16>(high, SharedOperand<true>(tiles + tile_bytes, queries), dout, true);
      wgmma_commit();
      wgmma_wait<1>();
      if (!first && lane == 0) control.ring.release(before);
      before = turn;
      turn.next();
    }
    wgmma_wait<0>();
    pin(low), pin(high);
    if (lane == 0) {
      if (before.stage != turn.stage) control.ring.release(before);
      control.ring.release(turn);  // the empty one
    }
    turn.next();
    const int key0 = work.block * Tiles::keys + 128 * warpgroup + 16 * (threadIdx.x / 32 % 4);
    store_keys<T, D>(p.dv, p.float_dv, batch, kv_head, key0, s.keys, low, p.factor);
    store_keys<T, D>(p.dv, p.float_dv, batch, kv_head, key0 + 64, s.keys, high, p.factor);
  }

 private:
  // Whether the next stage has tiles. Read by the lane that releases the stage.
  __device__ __forceinline__ bool more() const {
    control.ring.wait_full(turn);
    return __shfl_sync(~0u, lane == 0 && control.more[turn.stage] ? 1 : 0, 0) != 0;
  }
};

template <class T, int D>
__global__ void __launch_bounds__(backward_threads, 1) values_from_probs_kernel(const __grid_constant__ ProbsValuesParams p) {
  using Tiles = ProbsValuesTiles<D>;
  extern __shared__ __align__(1024) char shared[];
  auto& control = *reinterpret_cast<ProbsValuesControl<Tiles>*>(shared + Tiles::control_at);
  static_assert(sizeof(control) <= Tiles::shared_bytes - Tiles::control_at);
  if (threadIdx.x == 0) {
    control.ring.init(consumer_warps);
    control.queue.ring.init(consumer_warps);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const int all = p.schedule.blocks * p.schedule.heads;
  if (threadIdx.x < helper_threads) {
    cutlass::arch::warpgroup_reg_dealloc<Tiles::Registers::helper>();
    if (threadIdx.x >= 32) return;
    ProbsValuesProducer<D> producer{p, shared, control};
    WorkSource(control.queue, p.ticket, all).for_each([&](int number) { producer.load(Work(p.schedule, number, false)); });
  } else {
    cutlass::arch::warpgroup_reg_alloc<Tiles::Registers::consumer>();
    const int warpgroup = uniform(static_cast<int>(threadIdx.x - helper_threads) / 128);
    ProbsValuesConsumer<T, D> consumer{p, shared_address(shared), control, warpgroup};
    WorkSink(control.queue, all).for_each([&](int number) { consumer.multiply_values(Work(p.schedule, number, false)); });
  }
}

}  // namespace effcore::cuda::hopper
