// Backward of a consumer's layer on sm_90a: dv = P^T dout, summed over the query heads of a kv head, D = Dv = 64 or 128,
// 16-bit; P from lse (from kept P: backward_probs.cuh).
//
// Bound: 2 products of 2 * queries * keys * dim FLOPs (half causal). A warpgroup owns 64 keys and computes their scores
// transposed, S^T = K Q^T, so that P^T is the A operand of the product that gives dv. The next step's S^T is started together
// with this step's P^T dout, and exponentiated while that runs. Shared memory: K [128 keys x D], a ring of Q and dout [128 x
// D].
#pragma once
#include "attention/hopper/backward_tiles.cuh"

namespace effcore::cuda::hopper {

template <int D>
struct ValuesTiles {
  static constexpr int keys = 128, queries = 128;
  using Registers = hopper::Registers<24, 240>;
  static constexpr int keys_bytes = keys * D * 2, queries_bytes = queries * D * 2, stages = D == 64 ? 4 : 3;
  static constexpr int q_at = keys_bytes, dout_at = q_at + stages * queries_bytes;
  static constexpr int lse_at = dout_at + stages * queries_bytes;  // [stage][queries], times log2 e
  static constexpr int control_at = lse_at + stages * queries * 4;
  static constexpr int shared_bytes = control_at + 256;
  static_assert(shared_bytes <= shared_limit);
};

template <class Tiles>
struct ValuesControl {
  Ring<Tiles::stages> ring;
  BarrierWord k;
  StepInfo info[Tiles::stages];
  bool more[Tiles::stages];
};

template <class T, int D>
__device__ __forceinline__ void values_produce(const ValuesParams& p, char* shared, ValuesControl<ValuesTiles<D>>& control,
                                               const Visibility& seen, int batch, int kv_head, int block) {
  using Tiles = ValuesTiles<D>;
  constexpr int queries = Tiles::queries, keys = Tiles::keys;
  const Shape& s = p.shape;
  const int lane = threadIdx.x % 32, key0 = block * keys;
  attention::Steps<queries, keys> steps(seen, s.queries, s.group, block);
  attention::Step step = steps.next();
  if (step.exists() && lane == 0) {
    Barrier::arrive_and_expect_tx(&control.k, Tiles::keys_bytes);
    load_panels<D>(p.k, &control.k, shared, keys, key0, kv_head, batch, Keep::first);
  }
  Turn<Tiles::stages> item;
  for (; step.exists(); step = steps.next(), item.next()) {
    const int head = kv_head * s.group + step.head, query0 = step.block * queries;
    control.ring.wait_empty(item);
    BarrierWord* const full = &control.ring.full[item.stage];
    if (lane == 0) {
      control.ring.expect(item, 2 * Tiles::queries_bytes);
      load_panels<D>(p.q, full, shared + Tiles::q_at + item.stage * Tiles::queries_bytes, queries, query0, head, batch,
                     Keep::last);
      load_panels<D>(p.dout, full, shared + Tiles::dout_at + item.stage * Tiles::queries_bytes, queries, query0, head, batch,
                     Keep::last);
    }
  }
  control.ring.wait_empty(item);
  if (lane == 0) Barrier::arrive(&control.ring.full[item.stage]);
}

// Warp 1: a step's lse, and what is to be known about it.
template <int D>
__device__ __forceinline__ void values_describe(const ValuesParams& p, char* shared, ValuesControl<ValuesTiles<D>>& control,
                                                const Visibility& seen, int batch, int kv_head, int block) {
  using Tiles = ValuesTiles<D>;
  constexpr int queries = Tiles::queries, keys = Tiles::keys;
  const Shape& s = p.shape;
  const int lane = threadIdx.x % 32, key0 = block * keys, row0 = batch * s.heads + kv_head * s.group;
  attention::Steps<queries, keys> steps(seen, s.queries, s.group, block);
  attention::Step step = steps.next();
  Turn<Tiles::stages> item;
  RowStatistics<queries> statistics;
  const auto read = [&] {
    if (step.exists()) statistics.read(s, p.lse, -INFINITY, nullptr, row0 + step.head, step.block * queries);
  };
  for (read(); step.exists(); item.next()) {
    const int query0 = step.block * queries;
    const bool masked = key0 + keys > seen.end(query0) || key0 < seen.begin(min(query0 + queries, s.queries) - 1);
    control.ring.wait_empty(item);
    if (lane == 0) {
      control.info[item.stage] = {0, query0, masked ? step_masked : 0};
      control.more[item.stage] = true;
    }
    statistics.store_lse(reinterpret_cast<float*>(shared + Tiles::lse_at) + item.stage * queries);
    Barrier::arrive(&control.ring.full[item.stage]);  // each lane answers for its own stores
    step = steps.next();
    read();
  }
  control.ring.wait_empty(item);
  if (lane == 0) control.more[item.stage] = false;
  Barrier::arrive(&control.ring.full[item.stage]);
}

template <class T, int D>
__device__ __forceinline__ void values_consume(const ValuesParams& p, char* shared, ValuesControl<ValuesTiles<D>>& control,
                                               const Visibility& seen, int batch, int kv_head, int block) {
  using Tiles = ValuesTiles<D>;
  constexpr int queries = Tiles::queries, keys = Tiles::keys;
  const Shape& s = p.shape;
  const int thread = threadIdx.x - helper_threads, warpgroup = thread / 128, warp = thread / 32 % 4, lane = threadIdx.x % 32;
  const int key0 = block * keys + 64 * warpgroup + 16 * warp;
  const std::uint32_t base = shared_address(shared);
  const SharedOperand<false> k_rows(base + 64 * warpgroup * panel_row_bytes, keys);
  float dv[D / 2], st[queries / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) dv[i] = 0.0f;

  Turn<Tiles::stages> item;
  const auto start_scores = [&] {
    pin(st);
    wgmma_begin();
    multiply<T, queries, D / 16>(st, k_rows,
                                 SharedOperand<false>(base + Tiles::q_at + item.stage * Tiles::queries_bytes, queries), false);
    wgmma_commit();
  };
  control.ring.wait_full(item);
  bool more = control.more[item.stage];
  if (more) {
    Barrier::wait(&control.k, 0);
    clear_unseen_keys<D, keys>(shared, block * keys, seen.begin(0), seen.length, thread);
    start_scores();
    wgmma_wait<0>();
    pin(st);
    int before = -1;  // the stage whose dout is still being multiplied
    do {
      const StepInfo info = control.info[item.stage];
      if (info.flags & step_masked) hide_unseen<queries>(st, s.negative, seen, key0, info.query0, s.queries - 1);
      const float* const lse = reinterpret_cast<const float*>(shared + Tiles::lse_at) + item.stage * queries + 2 * (lane % 4);
      exponentiate<queries>(st, s.negative ? -s.scale_log2 : s.scale_log2,
                            [&](int n) { return *reinterpret_cast<const float2*>(lse + 8 * n); });
      wgmma_wait<0>();
      pin(dv);
      __syncwarp();  // every lane has read lse
      if (before >= 0 && lane == 0) Barrier::arrive(&control.ring.empty[before]);
      before = item.stage;
      std::uint32_t pa[queries / 16][4];
      round_operand<T, queries>(pa, st);
      const SharedOperand<true> dout(base + Tiles::dout_at + item.stage * Tiles::queries_bytes, queries);
      item.next();
      control.ring.wait_full(item);
      more = control.more[item.stage];
      start_scores();  // without a next step, of something else, for nobody
      wgmma_begin();
      multiply<T, D, queries / 16>(dv, pa, dout, true);
      wgmma_commit();
      wgmma_wait<1>();
      pin(st);
    } while (more);
    wgmma_wait<0>();
    pin(dv);
  }
  store_keys<T, D>(p.dv, p.float_dv, batch, kv_head, key0, s.keys, dv, 1.0f);
}

template <class T, int D>
__global__ void __launch_bounds__(backward_threads, 1) values_kernel(const __grid_constant__ ValuesParams p) {
  using Tiles = ValuesTiles<D>;
  extern __shared__ __align__(1024) char shared[];
  auto& control = *reinterpret_cast<ValuesControl<Tiles>*>(shared + Tiles::control_at);
  static_assert(sizeof(control) <= 256);
  if (threadIdx.x == 0) {
    control.ring.init(consumer_warps, 1 + 32);
    Barrier::init(&control.k, 1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const attention::Work work(p.schedule, blockIdx.x, false);
  const int batch = work.head / p.shape.kv_heads, kv_head = work.head % p.shape.kv_heads;
  const Visibility seen(p.shape, batch);
  if (threadIdx.x < helper_threads) {
    cutlass::arch::warpgroup_reg_dealloc<Tiles::Registers::helper>();
    if (threadIdx.x < 32)
      values_produce<T, D>(p, shared, control, seen, batch, kv_head, work.block);
    else if (threadIdx.x < 64)
      values_describe<D>(p, shared, control, seen, batch, kv_head, work.block);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Tiles::Registers::consumer>();
    values_consume<T, D>(p, shared, control, seen, batch, kv_head, work.block);
  }
}

}  // namespace effcore::cuda::hopper
