// A group's backward (backward.cuh) where P is kept and the values of all layers stay in shared memory: what the warpgroups do
// that multiply.
//
// No scores and no exponentials: a step is dP of the layers, from the last to the first, dv, dS, dq, dk. P^T comes into
// registers as the A operand of the product that gives dv. What bounds a step is the way of its tiles from L2, so they stand in
// one ring, in the order in which they are wanted, each for as short a time as can be:
//
//   D = 128:  P, dout of the layers, an empty one for dS, Q     (P has been read before the first dP)
//   D = 64:   dout of the layers, Q                             (P comes into dS's place, and is read behind dP)
//
// (H200, D = 128, the owner of four layers, 4096 keys: with P in dS's place and Q in memory of its own, a ring of three instead
// of four, a third of a step is waiting, and it is as fast as from lse, 2.27 ms; so it takes 1.98.)
#pragma once
#include "attention/hopper/backward_sums.cuh"

namespace effcore::cuda::hopper {

template <class T, int D>
__device__ __forceinline__ void kept_consume(const OwnerParams& p, char* shared,
                                             OwnerControl<OwnerTiles<D, Values::kept>>& control, const Visibility& seen,
                                             int batch, int kv_head, int block) {
  using Tiles = OwnerTiles<D, Values::kept>;
  constexpr int queries = Tiles::queries, keys = Tiles::keys;
  const int thread = threadIdx.x - helper_threads, warp = thread / 32 % 4, lane = threadIdx.x % 32;
  const int warpgroup = uniform(thread / 128);
  const int key0 = block * keys + 64 * warpgroup;
  const std::uint32_t base = shared_address(shared), rows_at = 64 * warpgroup * panel_row_bytes;
  const SharedOperand<true> k_depth(base + Tiles::k_at + (D == 128 ? warpgroup * keys * panel_row_bytes : 0), keys);
  const SharedOperand<false> v_rows(base + Tiles::dout_at + p.dout_stages * Tiles::queries_bytes + rows_at, keys);
  // P and dS in tiles of 64 x 64, [block of queries][warpgroup of keys]; this warpgroup's dq takes its queries (D = 64) or all
  // (D = 128).
  constexpr int tile_bytes = 64 * panel_row_bytes;
  const std::uint32_t place = warpgroup * tile_bytes + transposed_place(warp);
  const std::uint32_t dq_rows_at = queries == 128 ? warpgroup * 2 * tile_bytes : 0;

  float dv[D / 2], dk[D / 2], dq[32], dp[queries / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) dv[i] = 0.0f, dk[i] = 0.0f;
  Turn<Tiles::q_stages> q;  // of what is known about a step
  Turn<Tiles::most_stages> item;
  Turn<Tiles::scores_stages> scores;
  DqParts<T, D, Values::kept> dq_parts(p, control, base, warpgroup);
  std::uint32_t count = 0;  // of steps

  const auto item_at = [&](const Turn<Tiles::most_stages>& turn) {
    return base + Tiles::dout_at + turn.stage * Tiles::queries_bytes;
  };
  const auto release = [&](const Turn<Tiles::most_stages>& turn) {
    if (lane == 0) control.dout.release(turn);
  };

  const auto start_dp = [&](int layer, bool accumulate) {
    SharedOperand<false> v = v_rows;
    v.low += layer * (Tiles::keys_bytes / 16);
    control.dout.wait_full(item);
    if (!accumulate) pin(dp);
    wgmma_begin();
    multiply<T, queries, D / 16>(dp, v, SharedOperand<false>(item_at(item), queries, false), accumulate);
    wgmma_commit();
  };

  // Whether there is another step. Read by the lane that releases the stage.
  const auto more_steps = [&] {
    control.dout.wait_full(item);
    return __shfl_sync(~0u, lane == 0 && control.more[item.stage] ? 1 : 0, 0) != 0;
  };

  bool more = more_steps();
  if (more) {
    Barrier::wait(&control.k, 0);
    clear_unseen_keys<D, keys>(shared + Tiles::k_at, block * keys, seen.begin(0), seen.length, thread);
  }
  while (more) {
    std::uint32_t pa[queries / 16][4], ds[queries / 16][4];
    const float* const factor =  // of the queries' probabilities
        reinterpret_cast<const float*>(shared + Tiles::statistics_at) + q.stage * 2 * queries + 2 * (lane % 4);
    const float* const delta = factor + queries;
    const auto take_probs = [&](std::uint32_t at) { load_transposed<queries>(pa, at + place, 2 * tile_bytes); };
    if constexpr (Tiles::pooled) {
      take_probs(item_at(item));
      fence_async();  // or the tile that TMA brings next overtakes these reads
      __syncwarp();
      release(item);
      item.next(p.dout_stages);
    }
    Turn<Tiles::most_stages> before = item;
    start_dp(p.layers - 1, false);
    for (int layer = p.layers - 2; layer >= 0; --layer) {
      item.next(p.dout_stages);
      start_dp(layer, true);
      wgmma_wait<1>();
      release(before);
      before = item;
    }
    item.next(p.dout_stages);
    control.q.wait_full(q);
    const StepInfo info = control.info[q.stage];
    std::uint32_t slot_at = base + Tiles::scores_at;
    if constexpr (!Tiles::pooled) {
      control.scores.wait_full(scores);
      take_probs(slot_at);
    }
#pragma unroll
    for (int i = 0; i < queries / 4; ++i) {
      const float2 probs = widen<T>(pa[i / 4][i % 4]), f = *reinterpret_cast<const float2*>(factor + 8 * (i / 2));
      pa[i / 4][i % 4] = cuda::pack<T>(probs.x * f.x, probs.y * f.y);
    }
    pin(dv);
    wgmma_begin();
    multiply<T, D, queries / 16>(dv, pa, SharedOperand<true>(item_at(before), queries, false), true);
    wgmma_commit();
    wgmma_wait<1>();
    pin(dp);
    differentiate_scores<T, queries>(ds, pa, dp, delta, info.flags & step_masked);
    const Turn<Tiles::most_stages> slot = item;
    if constexpr (Tiles::pooled) {
      control.dout.wait_full(slot);
      slot_at = item_at(slot);
      item.next(p.dout_stages);
    }
    store_transposed<queries>(slot_at + place, 2 * tile_bytes, ds);
    __syncwarp();
    if (lane == 0) Barrier::arrive(&control.ds[count % 2]);
    wgmma_wait<0>();
    pin(dv);
    release(before);
    Barrier::wait(&control.ds[count % 2], count / 2 % 2);
    fence_async();
    pin(dq);
    wgmma_begin();
    multiply<T, 64, keys / 16>(dq, SharedOperand<false>(slot_at + dq_rows_at, 64, false), k_depth, false);
    wgmma_commit();
    control.dout.wait_full(item);
    pin(dk);
    wgmma_begin();
    multiply<T, D, queries / 16>(dk, ds, SharedOperand<true>(item_at(item), queries, false), true);
    wgmma_commit();
    wgmma_wait<1>();
    pin(dq);
    if constexpr (Tiles::pooled) {
      release(slot);
    } else {
      if (lane == 0) control.scores.release(scores);
      scores.next();
    }
    dq_parts.add(info, dq);  // under the product that gives dk
    ++count;
    wgmma_wait<0>();
    pin(dk);
    release(item);
    if (lane == 0) control.q.release(q);
    item.next(p.dout_stages);
    q.next();
    more = more_steps();
  }
  store_block<T, D, Values::kept>(p, shared, control, batch, kv_head, key0, warpgroup, dk, dv);
}

}  // namespace effcore::cuda::hopper
