// The warps of the owner's backward (backward.cuh) that multiply nothing: one brings tiles, two wait for turns of dq, one
// brings what a step needs besides.
#pragma once
#include "attention/hopper/backward_tiles.cuh"
#include "attention/turns.cuh"

namespace effcore::cuda::hopper {

// Warp 0: brings tiles. It must have nothing to wait for but stages: what a step needs besides, warp 3 brings.
template <class T, int D, Values values>
__device__ __forceinline__ void owner_produce(const OwnerParams& p, char* shared, OwnerControl<OwnerTiles<D, values>>& control,
                                              const Visibility& seen, int batch, int kv_head, int block) {
  using Tiles = OwnerTiles<D, values>;
  constexpr int queries = Tiles::queries, keys = Tiles::keys;
  const Shape& s = p.shape;
  const int lane = threadIdx.x % 32, key0 = block * keys;
  attention::Steps<queries, keys> steps(seen, s.queries, s.group, block);
  attention::Step step = steps.next();
  if (step.exists() && lane == 0) {
    const int resident = values == Values::streamed ? 0 : p.layers;
    Barrier::arrive_and_expect_tx(&control.k, Tiles::keys_bytes * (1 + resident));
    load_panels<D>(p.k, &control.k, shared + Tiles::k_at, keys, key0, kv_head, batch, Keep::first);
    for (int l = 0; l < resident; ++l)
      load_panels<D>(p.v[l], &control.k, shared + Tiles::dout_at + p.dout_stages * Tiles::queries_bytes + l * Tiles::keys_bytes,
                     keys, key0, kv_head, batch, Keep::first);
  }
  Turn<Tiles::q_stages> q;
  Turn<Tiles::most_stages> item;
  const auto dout_tile = [&] { return shared + Tiles::dout_at + item.stage * Tiles::queries_bytes; };
  char* const values_at = shared + Tiles::dout_at + p.dout_stages * Tiles::queries_bytes;
  for (; step.exists(); step = steps.next()) {
    const int head = kv_head * s.group + step.head, query0 = step.block * queries;
    const auto load_item = [&](int layer) {
      control.dout.wait_empty(item);
      if (lane == 0) {
        BarrierWord* const full = &control.dout.full[item.stage];
        control.more[item.stage] = true;
        control.dout.expect(item, Tiles::queries_bytes + (values == Values::streamed ? Tiles::keys_bytes : 0));
        load_panels<D>(p.dout[layer], full, dout_tile(), queries, query0, head, batch, Keep::last);
        if constexpr (values == Values::streamed)
          load_panels<D>(p.v[layer], full, values_at + item.stage * Tiles::keys_bytes, keys, key0, kv_head, batch, Keep::last);
      }
      item.next(p.dout_stages);
    };
    const auto load_slot = [&] {  // the slot for dS where it stands in dout's ring
      if constexpr (Tiles::pooled) {
        control.dout.wait_empty(item);
        if (lane == 0) {
          control.more[item.stage] = true;
          Barrier::arrive(&control.dout.full[item.stage]);
        }
        item.next(p.dout_stages);
      }
    };
    if constexpr (values == Values::kept) {
      if constexpr (Tiles::pooled) {  // else warp 3 brings P
        control.dout.wait_empty(item);
        if (lane == 0) {
          BarrierWord* const full = &control.dout.full[item.stage];
          control.more[item.stage] = true;
          control.dout.expect(item, Tiles::scores_bytes);
          load_probs_tiles(p.probs, full, dout_tile(), s, batch * s.heads + head, query0, key0, queries, keys);
        }
        item.next(p.dout_stages);
      }
      for (int l = p.layers - 1; l >= 0; --l) load_item(l);
      load_slot();
      control.dout.wait_empty(item);
      if (lane == 0) {
        control.dout.expect(item, Tiles::queries_bytes);
        load_panels<D>(p.q, &control.dout.full[item.stage], dout_tile(), queries, query0, head, batch, Keep::last);
      }
      item.next(p.dout_stages);
    } else {
      // The first item before Q: with one stage of Q, the one before is released only behind the first product.
      if constexpr (values != Values::one) load_item(p.layers - 1);
      control.q.wait_empty(q);
      if (lane == 0) {
        control.q.expect(q, Tiles::queries_bytes);
        load_panels<D>(p.q, &control.q.full[q.stage], shared + Tiles::q_at + q.stage * Tiles::queries_bytes, queries, query0,
                       head, batch, Keep::last);
      }
      if constexpr (values == Values::one) load_item(0);
      if constexpr (values != Values::one)
        for (int l = p.layers - 2; l >= 0; --l) load_item(l);
      load_slot();
      q.next();
    }
  }
  control.dout.wait_empty(item);
  if (lane == 0) {
    control.more[item.stage] = false;
    Barrier::arrive(&control.dout.full[item.stage]);
  }
  // What dk and dv are added to comes while the last part of dq leaves.
  if constexpr (values == Values::one) {
    const int sums = (p.dk_sum.data != nullptr) + (p.dv_sum.data != nullptr);
    if (sums == 0) return;
    Barrier::wait(&control.ended, 0);
    if (lane != 0) return;
    Barrier::arrive_and_expect_tx(&control.sums, sums * Tiles::sums_bytes);
    const auto load = [&](const CUtensorMap& map, int at) {
      for (int panel = 0; panel < D / 32; ++panel)
        cute::SM90_TMA_LOAD_4D::copy(&map, &control.sums, static_cast<std::uint64_t>(Keep::first),
                                     shared + at + panel * Tiles::sum_panel_bytes, panel * 32, key0, kv_head, batch);
    };
    if (p.dv_sum.data != nullptr) load(p.dv_sum_map, Tiles::dv_at);
    if (p.dk_sum.data != nullptr) load(p.dk_sum_map, Tiles::dk_at);
  }
}

// Warp 3: a step's lse, or kept probabilities and their factors, its delta, and what is to be known about it.
template <int D, Values values>
__device__ __forceinline__ void owner_describe(const OwnerParams& p, char* shared, OwnerControl<OwnerTiles<D, values>>& control,
                                               const Visibility& seen, int batch, int kv_head, int block) {
  using Tiles = OwnerTiles<D, values>;
  constexpr bool kept = values == Values::kept;
  constexpr int queries = Tiles::queries, keys = Tiles::keys;
  const Shape& s = p.shape;
  const int key0 = block * keys, query_blocks = (s.queries + queries - 1) / queries, row0 = batch * s.heads + kv_head * s.group;
  attention::Steps<queries, keys> steps(seen, s.queries, s.group, block);
  attention::Step step = steps.next();
  Turn<Tiles::q_stages> q;
  RowStatistics<queries> statistics;
  const auto read = [&] {
    if (!step.exists()) return;
    statistics.read(s, kept ? p.factors : p.lse, kept ? 0.0f : -INFINITY, p.delta, row0 + step.head, step.block * queries);
    if constexpr (kept)  // P comes from device memory: to L2, a step ahead
      if (threadIdx.x % 32 == 0)
        for_probs_tiles(s, row0 + step.head, step.block * queries, key0, queries, keys, [&](int token) {
          if (token != behind_probs) cute::SM90_TMA_LOAD_2D::PREFETCH::copy(&p.probs, 0, token);
        });
  };
  Turn<Tiles::scores_stages> scores;
  for (read(); step.exists(); q.next()) {
    const int query0 = step.block * queries;
    const attention::KeyBlocks met(seen, s.queries, step.block, queries, keys);
    const bool masked = key0 + keys > seen.end(query0) || key0 < seen.begin(min(query0 + queries, s.queries) - 1);
    if constexpr (kept && !Tiles::pooled) {
      control.scores.wait_empty(scores);
      if (threadIdx.x % 32 == 0) {
        control.scores.expect(scores, Tiles::scores_bytes);
        load_probs_tiles(p.probs, &control.scores.full[scores.stage], shared + Tiles::scores_at, s, row0 + step.head, query0,
                         key0, queries, keys);
      }
      __syncwarp();
      scores.next();
    }
    control.q.wait_empty(q);
    if (threadIdx.x % 32 == 0)
      control.info[q.stage] = {
          (row0 + step.head) * query_blocks + step.block, query0,
          (masked ? step_masked : 0) | (block == met.first ? step_first : 0) | (block == met.last ? step_last : 0)};
    float* const to = reinterpret_cast<float*>(shared + Tiles::statistics_at) + q.stage * 2 * queries;
    kept ? statistics.store_factors(to) : statistics.store_lse(to);
    if constexpr (Tiles::starts_from_delta) statistics.negate_delta();
    statistics.store_delta(to + queries);
    Barrier::arrive(&control.q.full[q.stage]);  // each lane answers for its own stores
    step = steps.next();
    read();
  }
}

// Where the sums of a block's dq [queries x D] stand: two halves of 64 rows or, at D = 128, of 64 columns, each in the order of
// a warpgroup's accumulators: piece n of 8 stands n * 128 float4 on. This thread's first piece.
template <int dq_elements>
__device__ __forceinline__ float4* sums_of(float* dq_sums, int slot, int warpgroup) {
  return reinterpret_cast<float4*>(dq_sums + static_cast<std::int64_t>(slot) * dq_elements) + warpgroup * (dq_elements / 8) +
         threadIdx.x % 128;
}

// Adds 4 * elements bytes of shared memory to the sums, or stores them there with the `first` part; returns when the shared
// memory has been read, and the sums are complete after sums_complete.
__device__ __forceinline__ void send_to_sums(float* sums, std::uint32_t from, int bytes, bool first) {
  asm volatile("fence.proxy.async.global;" ::: "memory");  // behind what other blocks have added
  if (first)
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(sums), "r"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(sums), "r"(from), "r"(bytes)
                 : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void sums_complete() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Warps 1 and 2, a step each: wait for this block's turn to add to dq, add what stands in shared memory or let the consumers
// add, who also round with the last part, and pass the turn on.
template <int D, Values values>
__device__ __forceinline__ void owner_take_turns(const OwnerParams& p, char* shared,
                                                 OwnerControl<OwnerTiles<D, values>>& control, const Visibility& seen,
                                                 int batch, int kv_head, int block) {
  using Tiles = OwnerTiles<D, values>;
  const Shape& s = p.shape;
  const int query_blocks = (s.queries + Tiles::queries - 1) / Tiles::queries;
  attention::Steps<Tiles::queries, Tiles::keys> steps(seen, s.queries, s.group, block);
  std::uint32_t count = 0;
  for (attention::Step step = steps.next(); step.exists(); step = steps.next(), ++count) {
    const std::uint32_t parity = count % 2, phase = count / 2 % 2;
    if (threadIdx.x == 32 * (1 + parity)) {
      const attention::KeyBlocks met(seen, s.queries, step.block, Tiles::queries, Tiles::keys);
      const std::int64_t slot =
          (batch * s.heads + kv_head * s.group + step.head) * static_cast<std::int64_t>(query_blocks) + step.block;
      int* const turns = p.turns + slot;
      const int turn = block - met.first;
      if (block != met.last && (values == Values::one || p.dq_at > 0)) {
        if (turn > 0) attention::wait_for_turn(turns, turn);  // while the consumers still compute
        Barrier::wait(&control.added[parity], phase);         // to shared memory
        fence_async();
        const int stage = count % Tiles::dq_stages;
        send_to_sums(p.dq_sums + slot * Tiles::dq_elements, shared_address(shared + p.dq_at) + stage * Tiles::dq_bytes,
                     Tiles::dq_bytes, turn == 0);
        Barrier::arrive(&control.dq_free[stage]);
        sums_complete();
      } else {
        if (turn > 0) attention::wait_for_turn(turns, turn);
        Barrier::arrive(&control.turn[parity]);
        Barrier::wait(&control.added[parity], phase);
      }
      if (block != met.last) attention::store_release(turns, turn + 1);
    }
    __syncwarp();
  }
}

}  // namespace effcore::cuda::hopper
