// Backward of a layer group's owner on sm_90a in one kernel (one layer is plain attention), D = Dv = 64 or 128, 16-bit:
//
//   P = exp(S - lse), or as it is kept;   dv = P^T dout_0;   dP = sum_l dout_l v_l^T;   dS = P * (dP - delta)
//   dk = scale dS^T q;   dq = scale dS k
//
// Bound: 4 + layers products of 2 * queries * keys * dim FLOPs (half causal), one less where P is kept. Where many layers share
// P, dS goes through device memory instead (backward_scores.cuh).
//
// Scores are computed transposed, S^T = K Q^T and dP^T = V dO^T: a warpgroup owns 64 keys, and P^T and dS^T leave the
// accumulators as the A operand of the products that give dv and dk, which stay in registers. dS alone passes through shared
// memory, since dq sums over both warpgroups' keys; each then computes half of dq [queries x D]. One layer has a kernel's body
// of its own (backward_layer.cuh), and so have several with kept P (backward_kept.cuh). Here, with several from lse, a step is:
// dP of the layers from the last to the second, S, dP of the first, exponentials, dS, dv, dq, dk; the part of dq leaves under
// the product that gives dk. (H200, groups of 4, forward and backward at D = 64, against one layer's order: 1 to 2 % faster.)
//
// dq is added up in device memory over the blocks of keys, in turns (turns.cuh). A pass of its own for dq would recompute S and
// every dP: layers + 2 products more. Where shared memory has 32 KiB to spare (all but four layers and more at D = 128, five
// and more at D = 64; one layer has room for two), a part of dq waits there for its turn, one helper warp adds it by a bulk
// reduction and passes the turn on, and the consumers go on. Else the consumers add from registers. With the last part, for
// which they wait in either case, they scale and round the sum: causal, that is one step in a block's walk at D = 64 and two at
// 128. No unit is the bound but a warpgroup's own chain: by ncu, one layer, the tensor cores are busy 62 % of the time, shared
// memory 71 % (of a build with 16 blocks of keys of a head together; the products' operands are two thirds of its traffic), and
// without exponentials, or without waiting for turns, a step takes about as long. Blocks that stay and take piece after piece
// were slower (one layer, 8192: 1.23 times as long at D = 128, 1.07 at 64): the others wait for the first parts of a piece that
// is taken but not begun.
//
// Shared memory (OwnerTiles): K; V of all layers, or a ring of them; rings of Q, of dout_l, and of slots that hold dS
// [queries x keys]. Where there are several layers, dP comes before S: one stage of Q is then enough,
// since the next Q arrives behind layers - 1 products. dout wants a deep ring: an item is multiplied in less time than it takes
// to arrive (four layers at D = 128: 348 TFLOP/s with two stages, 387 with three).
#pragma once
#include "attention/hopper/backward_kept.cuh"
#include "attention/hopper/backward_layer.cuh"

namespace effcore::cuda::hopper {

template <class T, int D, Values values>
__device__ __forceinline__ void group_consume(const OwnerParams& p, char* shared, OwnerControl<OwnerTiles<D, values>>& control,
                                              const Visibility& seen, int batch, int kv_head, int block) {
  using Tiles = OwnerTiles<D, values>;
  constexpr int queries = Tiles::queries, keys = Tiles::keys;
  const Shape& s = p.shape;
  const int thread = threadIdx.x - helper_threads, warp = thread / 32 % 4, lane = threadIdx.x % 32;
  const int warpgroup = uniform(thread / 128);
  const int key0 = block * keys + 64 * warpgroup;
  const float scale_log2 = s.negative ? -s.scale_log2 : s.scale_log2;
  const std::uint32_t base = shared_address(shared), rows_at = 64 * warpgroup * panel_row_bytes;
  const SharedOperand<false> k_rows(base + Tiles::k_at + rows_at, keys);
  const SharedOperand<true> k_depth(base + Tiles::k_at + (D == 128 ? warpgroup * keys * panel_row_bytes : 0), keys);
  // dS in tiles of 64 x 64, [block of queries][warpgroup of keys]; this warpgroup's dq takes its queries (D = 64) or all
  // (D = 128).
  constexpr int tile_bytes = 64 * panel_row_bytes;
  const std::uint32_t place = warpgroup * tile_bytes + transposed_place(warp);
  const std::uint32_t dq_rows_at = queries == 128 ? warpgroup * 2 * tile_bytes : 0;
  const SharedOperand<false> v_rows(base + Tiles::dout_at + p.dout_stages * Tiles::queries_bytes + rows_at, keys);

  float dv[D / 2], dk[D / 2], dq[32], st[queries / 2], dp[queries / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) dv[i] = 0.0f, dk[i] = 0.0f;
  Turn<Tiles::q_stages> q;
  Turn<Tiles::most_stages> item;
  Turn<Tiles::pooled ? Tiles::most_stages : Tiles::scores_stages> scores;
  DqParts<T, D, values> dq_parts(p, control, base, warpgroup);
  std::uint32_t count = 0;  // of steps

  const auto dout_at = [&] { return base + Tiles::dout_at + item.stage * Tiles::queries_bytes; };
  const auto start_dp = [&](int layer, bool accumulate) {
    SharedOperand<false> v = v_rows;
    v.low += (values == Values::streamed ? item.stage : layer) * (Tiles::keys_bytes / 16);
    control.dout.wait_full(item);
    if (!accumulate) pin(dp);
    wgmma_begin();
    multiply<T, queries, D / 16>(dp, v, SharedOperand<false>(dout_at(), queries, false), accumulate);
    wgmma_commit();
  };

  control.dout.wait_full(item);
  bool more = control.more[item.stage];
  if (more) {
    Barrier::wait(&control.k, 0);
    clear_unseen_keys<D, keys>(shared + Tiles::k_at, block * keys, seen.begin(0), seen.length, thread);
  }
  while (more) {
    const std::uint32_t q_at = base + Tiles::q_at + q.stage * Tiles::queries_bytes;
    Turn<Tiles::most_stages> done = item;
    start_dp(p.layers - 1, false);
    item.next(p.dout_stages);
    for (int layer = p.layers - 2; layer > 0; --layer) {
      start_dp(layer, true);
      wgmma_wait<1>();
      if (lane == 0) control.dout.release(done);
      done = item;
      item.next(p.dout_stages);
    }
    control.q.wait_full(q);
    pin(st);
    wgmma_begin();
    multiply<T, queries, D / 16>(st, k_rows, SharedOperand<false>(q_at, queries, false), false);
    wgmma_commit();
    const StepInfo info = control.info[q.stage];
    start_dp(0, true);
    const float* const lse =
        reinterpret_cast<const float*>(shared + Tiles::statistics_at) + q.stage * 2 * queries + 2 * (lane % 4);
    const float* const delta = lse + queries;
    wgmma_wait<1>();
    pin(st);
    if (lane == 0) control.dout.release(done);
    if (info.flags & step_masked) hide_unseen<queries>(st, s.negative, seen, key0 + 16 * warp, info.query0, s.queries - 1);
    exponentiate<queries>(st, scale_log2, [&](int n) { return *reinterpret_cast<const float2*>(lse + 8 * n); });
    std::uint32_t pa[queries / 16][4], ds[queries / 16][4];
    round_operand<T, queries>(pa, st);
    wgmma_wait<0>();
    pin(dp);
    differentiate_scores<T, queries>(ds, pa, dp, delta, info.flags & step_masked);
    std::uint32_t slot_at = base + Tiles::scores_at + scores.stage * Tiles::scores_bytes;
    if constexpr (Tiles::pooled) {
      scores = item, scores.next(p.dout_stages);
      control.dout.wait_full(scores);
      slot_at = base + Tiles::dout_at + scores.stage * Tiles::scores_bytes;
    } else {
      control.scores.wait_empty(scores);
    }
    store_transposed<queries>(slot_at + place, 2 * tile_bytes, ds);
    __syncwarp();
    if (lane == 0) Barrier::arrive(&control.ds[count % 2]);
    pin(dv);
    wgmma_begin();
    multiply<T, D, queries / 16>(dv, pa, SharedOperand<true>(dout_at(), queries, false), true);
    wgmma_commit();
    Barrier::wait(&control.ds[count % 2], count / 2 % 2);
    fence_async();
    pin(dq);
    wgmma_begin();
    multiply<T, 64, keys / 16>(dq, SharedOperand<false>(slot_at + dq_rows_at, 64, false), k_depth, false);
    wgmma_commit();
    wgmma_wait<1>();
    pin(dv);
    if (lane == 0) control.dout.release(item);
    item.next(p.dout_stages);
    if constexpr (Tiles::pooled) item.next(p.dout_stages);
    pin(dk);
    wgmma_begin();
    multiply<T, D, queries / 16>(dk, ds, SharedOperand<true>(q_at, queries, false), true);
    wgmma_commit();
    wgmma_wait<1>();
    pin(dq);
    if constexpr (Tiles::pooled) {
      if (lane == 0) control.dout.release(scores);
    } else {
      if (lane == 0) control.scores.release(scores);
      scores.next();
    }
    dq_parts.add(info, dq);  // under the product that gives dk
    ++count;
    wgmma_wait<0>();
    pin(dk);
    if (lane == 0) control.q.release(q);
    q.next();
    control.dout.wait_full(item);
    more = control.more[item.stage];
  }
  store_block<T, D, values>(p, shared, control, batch, kv_head, key0, warpgroup, dk, dv);
}

template <class T, int D, Values values>
__global__ void __launch_bounds__(backward_threads, 1) owner_kernel(const __grid_constant__ OwnerParams p) {
  using Tiles = OwnerTiles<D, values>;
  extern __shared__ __align__(1024) char shared[];
  auto& control = *reinterpret_cast<OwnerControl<Tiles>*>(shared + Tiles::control_at);
  static_assert(sizeof(control) <= Tiles::control_bytes);
  if (threadIdx.x == 0) {
    // In the order in which blocks start, so that nobody waits for a block that has not.
    control.number = atomicAdd(p.ticket, 1);
    control.q.init(consumer_warps, (Tiles::q_in_ring ? 0 : 1) + 32);
    control.dout.init(consumer_warps), control.scores.init(consumer_warps);
    for (BarrierWord& ds : control.ds) Barrier::init(&ds, consumer_warps);
    for (BarrierWord& turn : control.turn) Barrier::init(&turn, 1);
    for (BarrierWord& added : control.added) Barrier::init(&added, consumer_warps);
    for (BarrierWord& free : control.dq_free) Barrier::init(&free, 1);
    Barrier::init(&control.k, 1), Barrier::init(&control.ended, consumer_warps), Barrier::init(&control.sums, 1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const attention::Work work(p.schedule, control.number, false);
  const int batch = work.head / p.shape.kv_heads, kv_head = work.head % p.shape.kv_heads;
  const Visibility seen(p.shape, batch);
  if (threadIdx.x < helper_threads) {
    cutlass::arch::warpgroup_reg_dealloc<Tiles::Registers::helper>();
    if (threadIdx.x < 32)
      owner_produce<T, D, values>(p, shared, control, seen, batch, kv_head, work.block);
    else if (threadIdx.x < 96)
      owner_take_turns<D, values>(p, shared, control, seen, batch, kv_head, work.block);
    else
      owner_describe<D, values>(p, shared, control, seen, batch, kv_head, work.block);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Tiles::Registers::consumer>();
    if constexpr (values == Values::one)
      layer_consume<T, D>(p, shared, control, seen, batch, kv_head, work.block);
    else if constexpr (values == Values::kept)
      kept_consume<T, D>(p, shared, control, seen, batch, kv_head, work.block);
    else
      group_consume<T, D, values>(p, shared, control, seen, batch, kv_head, work.block);
  }
}

}  // namespace effcore::cuda::hopper
