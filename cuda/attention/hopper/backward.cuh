// Backward of a layer group's owner on sm_90a in one kernel (one layer is plain attention), P from lse, D = Dv = 64 or 128,
// 16-bit:
//
//   P = exp(S - lse);   dv = P^T dout_0;   dP = sum_l dout_l v_l^T;   dS = P * (dP - delta)
//   dk = scale dS^T q;   dq = scale dS k
//
// Bound: 4 + layers products of 2 * queries * keys * dim FLOPs (half causal). Where many layers share P, and where it is kept
// at D = 128, dS goes through device memory instead (backward_scores.cuh).
//
// Scores are computed transposed, S^T = K Q^T and dP^T = V dO^T: a warpgroup owns 64 keys, and P^T and dS^T leave the
// accumulators as the A operand of the products that give dv and dk, which stay in registers. dS alone passes through shared
// memory, since dq sums over both warpgroups' keys; each then computes half of dq [queries x D]. That product lags one step
// behind: by then the other warpgroup's dS is there, nobody waits for it, and the two warpgroups need not run in step, so that
// one multiplies while the other exponentiates.
//
// dq is added up in device memory over the blocks of keys, in turns (turns.cuh). A pass of its own for dq would recompute S and
// every dP: layers + 2 products more. Where shared memory has 32 KiB to spare (all but four layers and more at D = 128, five
// and more at D = 64), a part of dq waits there for its turn, one helper warp adds it by a bulk reduction and passes the turn
// on, and the consumers go on. Else the consumers add from registers. With the last part, for which they wait in either case,
// they scale and round the sum: causal, that is one step in a block's walk at D = 64 and two at 128.
// No unit is the bound but a warpgroup's own chain: by ncu the tensor cores are busy 62 % of the time, shared memory 71 % (of a
// build with 16 blocks of keys of a head together; the products' operands are two thirds of its traffic), and without
// exponentials, or without waiting for turns, a step takes about as long. Products block the warp that issues them, so what is
// done beside them has to stand between them: the exponentials between those of dP, a part of dq on its way to shared memory
// between those of S, and dS of one half of the queries between those of dk of the other. lse and delta are read ahead. H200,
// one process, length 8192, 16k tokens of H * D = 2048, causal, with the kernel for delta: D = 128 2.48 ms, D = 64 3.00; in
// another process 2.57 and 3.05, and with each of these behind its products 2.81 and 3.53. Blocks that stay and take piece
// after piece were slower (3.05, 3.22): the others wait for the first parts of a piece that is taken but not begun.
//
// Shared memory (OwnerTiles): K; V of all layers, or a ring of them; rings of Q, of dout_l, and of slots that hold dS
// [queries x keys]. Layers go from the last to the first, and dP before S where there are several: one stage of Q is then
// enough, since the next Q arrives behind layers - 1 products. dout wants a deep ring: an item is multiplied in less time than
// it takes to arrive (four layers at D = 128: 348 TFLOP/s with two stages, 387 with three).
#pragma once
#include "attention/hopper/backward_helpers.cuh"

namespace effcore::cuda::hopper {

// The warpgroup's half of a block's dq [queries x D], 64 rows or 64 columns of it, to the sums.
template <class T, int D, int queries>
__device__ __forceinline__ void add_dq(const OwnerParams& p, const StepInfo& info, float (&dq)[32], int warpgroup) {
  float4* const sums = sums_of<queries * D>(p.dq_sums, info.slot, warpgroup);
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float part[4] = {dq[4 * n], dq[4 * n + 1], dq[4 * n + 2], dq[4 * n + 3]};
    if (info.flags & step_first)
      __stcg(sums + n * 128, make_float4(part[0], part[1], part[2], part[3]));
    else
      attention::add_in_turn(sums + n * 128, part);
  }
}

// The last part, and with it all of dq, scaled and rounded.
template <class T, int D, int queries>
__device__ __forceinline__ void store_dq(const OwnerParams& p, const StepInfo& info, float (&dq)[32], int warpgroup) {
  const Shape& s = p.shape;
  if (!(info.flags & step_first)) {
    const float4* const sums = sums_of<queries * D>(p.dq_sums, info.slot, warpgroup);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float4 before = __ldcg(sums + n * 128);
      dq[4 * n] += before.x, dq[4 * n + 1] += before.y, dq[4 * n + 2] += before.z, dq[4 * n + 3] += before.w;
    }
  }
  const float scale = s.negative ? -s.scale : s.scale, factor[2] = {scale, scale};
  const int row = info.slot / ((s.queries + queries - 1) / queries), lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int query = info.query0 + (queries == 128 ? 64 * warpgroup : 0) + 16 * warp + lane / 4;
  store_rows<T, 64>(p.dq, row / s.heads, row % s.heads, query, s.queries, D == 128 ? 64 * warpgroup : 0, dq, factor);
}

template <class T, int D, Values values>
__device__ __forceinline__ void owner_consume(const OwnerParams& p, char* shared, OwnerControl<OwnerTiles<D, values>>& control,
                                              const Visibility& seen, int batch, int kv_head, int block) {
  using Tiles = OwnerTiles<D, values>;
  constexpr int queries = Tiles::queries, keys = Tiles::keys, half = queries / 2;
  const Shape& s = p.shape;
  const int thread = threadIdx.x - helper_threads, warp = thread / 32 % 4, lane = threadIdx.x % 32;
  const int warpgroup = uniform(thread / 128);
  const int key0 = block * keys + 64 * warpgroup;
  const float scale_log2 = s.negative ? -s.scale_log2 : s.scale_log2;
  const std::uint32_t base = shared_address(shared), rows_at = 64 * warpgroup * panel_row_bytes;
  const SharedOperand<false> k_rows(base + Tiles::k_at + rows_at, keys);
  const SharedOperand<true> k_depth(base + Tiles::k_at + (D == 128 ? warpgroup * keys * panel_row_bytes : 0), keys);
  // dS and P in tiles of 64 x 64, [block of queries][warpgroup of keys]; this warpgroup's dq takes its queries (D = 64) or all
  // (D = 128).
  constexpr int tile_bytes = 64 * panel_row_bytes;
  const std::uint32_t place = warpgroup * tile_bytes + transposed_place(warp);
  const std::uint32_t dq_rows_at = queries == 128 ? warpgroup * 2 * tile_bytes : 0;
  const std::uint32_t values_at = base + Tiles::dout_at + p.dout_stages * Tiles::queries_bytes + rows_at;
  const bool staged = values == Values::one || p.dq_at > 0;  // a part of dq waits in shared memory for its turn
  const std::uint32_t part_at = base + p.dq_at + (warpgroup * (Tiles::dq_elements / 8) + thread % 128) * 16;

  float dv[D / 2], dk[D / 2], dq[32], dp[queries / 2];
  float2 ahead[8];  // lse or delta of the next 64 queries, read before they are waited for
#pragma unroll
  for (int i = 0; i < D / 2; ++i) dv[i] = 0.0f, dk[i] = 0.0f;
  Turn<Tiles::q_stages> q, q_before;
  Turn<Tiles::most_stages> item;
  Turn<Tiles::pooled ? Tiles::most_stages : Tiles::scores_stages> scores, scores_before;
  auto& scores_ring = [&]() -> auto& {
    if constexpr (Tiles::pooled)
      return control.dout;
    else
      return control.scores;
  }();
  const auto scores_at = [&](int stage) {
    return base + (Tiles::pooled ? Tiles::dout_at : Tiles::scores_at) + stage * Tiles::scores_bytes;
  };
  StepInfo before{};
  std::uint32_t count = 0, parts = 0, turns = 0;  // of steps; of parts of dq in shared memory; bits: phases of control.turn

  const auto start_dq = [&] {
    if (count > 0) Barrier::wait(&control.ds[(count - 1) % 2], (count - 1) / 2 % 2);
    // Nothing comes before the first step: a product of something else, for nobody.
    const std::uint32_t from = count > 0 ? scores_at(scores_before.stage) + dq_rows_at : base + Tiles::k_at;
    pin(dq);
    wgmma_begin();
    multiply<T, 64, keys / 16>(dq, SharedOperand<false>(from, 64, false), k_depth, false);
    wgmma_commit();
  };
  const auto pass_on_dq = [&] {
    __syncwarp();
    if (lane == 0) Barrier::arrive(&control.added[(count - 1) % 2]);
  };
  // Behind the product: returns whether a part is to be stored, in eight pieces by store_part, and to be passed on.
  const auto finish_dq = [&] {
    pin(dq);
    if (count == 0) return false;
    if (lane == 0) control.q.release(q_before), scores_ring.release(scores_before);
    const bool last = before.flags & step_last;
    if (!last && staged) {
      Barrier::wait(&control.dq_free, parts++ % 2 ^ 1);
      return true;
    }
    const std::uint32_t parity = (count - 1) % 2;
    Barrier::wait(&control.turn[parity], turns >> parity & 1);
    turns ^= 1u << parity;
    if (last)
      store_dq<T, D, queries>(p, before, dq, warpgroup);
    else
      add_dq<T, D, queries>(p, before, dq, warpgroup);
    pass_on_dq();
    return false;
  };
  const auto store_part = [&](int n, bool wanted) {
    asm volatile(
        "{\n"
        ".reg .pred wanted;\n"
        "setp.ne.b32 wanted, %5, 0;\n"
        "@wanted st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n"
        "}" ::"r"(part_at + n * 128 * 16),
        "f"(dq[4 * n]), "f"(dq[4 * n + 1]), "f"(dq[4 * n + 2]), "f"(dq[4 * n + 3]), "r"(static_cast<int>(wanted)));
  };
  const auto pass_on_part = [&](int stored) {
#pragma unroll
    for (int n = stored; n < 8; ++n) store_part(n, true);
    fence_async();
    pass_on_dq();
  };
  const auto start_dp = [&](int layer, bool accumulate) {
    const int v_stage = values == Values::streamed ? item.stage : layer;
    if (!accumulate) pin(dp);
    wgmma_begin();
    multiply<T, queries, D / 16>(
        dp, SharedOperand<false>(values_at + v_stage * Tiles::keys_bytes, keys, false),
        SharedOperand<false>(base + Tiles::dout_at + item.stage * Tiles::queries_bytes, queries, false), accumulate);
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
    const float* const statistics =
        reinterpret_cast<const float*>(shared + Tiles::statistics_at) + q.stage * 2 * queries + 2 * (lane % 4);
    const auto look_ahead = [&](int from) {
#pragma unroll
      for (int n = 0; n < 8; ++n) ahead[n] = *reinterpret_cast<const float2*>(statistics + from + 8 * n);
    };
    StepInfo info;
    float st[queries / 2];
    const auto start_scores = [&](auto&& between) {
      control.q.wait_full(q);
      const SharedOperand<false> q_rows(q_at, queries, false);
      pin(st);
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        multiply<T, queries, 1>(st, block_of(k_rows, k), block_of(q_rows, k), k > 0);
        between(k);
      }
      wgmma_commit();
      info = control.info[q.stage];
      look_ahead(0);
    };
    const auto finish_scores = [&] {
      wgmma_wait<0>();
      pin(st);
      if (info.flags & step_masked) hide_unseen<queries>(st, s.negative, seen, key0 + 16 * warp, info.query0, s.queries - 1);
    };
    start_dq();
    if constexpr (values == Values::one) {
      wgmma_wait<0>();
      const bool part = finish_dq();
      start_scores([&](int k) { store_part(k, part); });  // in the shadow of the products
      if (part) pass_on_part(D / 16);
      finish_scores();
      start_dp(0, false);
    } else {
      start_dp(p.layers - 1, false);
      wgmma_wait<1>();
      if (finish_dq()) pass_on_part(0);
      // S stands before the last product of dP, under which it is exponentiated.
      const auto next_layer = [&](int layer) {
        const Turn<Tiles::most_stages> done = item;
        item.next(p.dout_stages);
        control.dout.wait_full(item);
        if (layer == 0) {
          start_scores([](int) {});
          finish_scores();
        }
        start_dp(layer, true);
        if (layer > 0) wgmma_wait<1>();
        if (lane == 0) control.dout.release(done);
      };
      for (int layer = p.layers - 2; layer > 0; --layer) next_layer(layer);
      next_layer(0);
    }
    // What follows is done by halves of the queries, so that ptxas puts the exponentials of one between the products of
    // another.
    const std::uint32_t dout_at = base + Tiles::dout_at + item.stage * Tiles::queries_bytes;
    std::uint32_t pa[2][half / 16][4];  // P^T, rounded
    const auto exponentiate_half = [&]<int h>() {
      float* const x = st + h * half / 2;
      exponentiate<half>(x, scale_log2, [&](int n) { return ahead[(h * half / 8 + n) % 8]; });
      round_operand<T, half>(pa[h], x);
      if ((h + 1) * half % 64 == 0) look_ahead((h + 1) * half);
      if (h == 0) pin(dv);
      wgmma_begin();
      multiply<T, D, half / 16>(dv, pa[h], SharedOperand<true>(dout_at + h * half * panel_row_bytes, queries, false), true);
    };
    exponentiate_half.template operator()<0>();
    exponentiate_half.template operator()<1>();
    wgmma_commit();
    if constexpr (Tiles::pooled) {
      scores = item, scores.next(p.dout_stages);
      scores_ring.wait_full(scores);
    } else {
      scores_ring.wait_empty(scores);
    }
    wgmma_wait<1>();
    pin(dp);
    if (info.flags & step_masked) {  // values that nobody sees may be NaN
#pragma unroll
      for (int i = 0; i < queries / 4; ++i) {
        const float2 probs = widen<T>(pa[i / (half / 4)][i % (half / 4) / 4][i % 4]);
        if (probs.x == 0.0f) dp[2 * i] = 0.0f;
        if (probs.y == 0.0f) dp[2 * i + 1] = 0.0f;
      }
    }
    // dS^T = P^T * (dP^T - delta), with P as it was rounded, so that from lse and from kept P it is the same number.
    std::uint32_t ds[2][half / 16][4];
    const auto differentiate_half = [&]<int h>() {
      float* const x = dp + h * half / 2;
#pragma unroll
      for (int i = 0; i < half / 4; ++i) {
        const float2 probs = widen<T>(pa[h][i / 4][i % 4]), delta = ahead[(h * half / 8 + i / 2) % 8];
        ds[h][i / 4][i % 4] = cuda::pack<T>(probs.x * (x[2 * i] - delta.x), probs.y * (x[2 * i + 1] - delta.y));
      }
      if (h == 0 && half == 64) look_ahead(queries + half);
      store_transposed<half>(scores_at(scores.stage) + place + h * half / 64 * 2 * tile_bytes + h * half % 64 * panel_row_bytes,
                             2 * tile_bytes, ds[h]);
      if (h == 0) pin(dk);
      wgmma_begin();
      multiply<T, D, half / 16>(dk, ds[h], SharedOperand<true>(q_at + h * half * panel_row_bytes, queries, false), true);
    };
    differentiate_half.template operator()<0>();
    differentiate_half.template operator()<1>();
    wgmma_commit();
    fence_async();
    __syncwarp();
    if (lane == 0) Barrier::arrive(&control.ds[count % 2]);
    const Turn<Tiles::most_stages> done = item;
    item.next(p.dout_stages);
    before = info;
    q_before = q, q.next();
    scores_before = scores;
    if constexpr (Tiles::pooled)
      item.next(p.dout_stages);
    else
      scores.next();
    ++count;
    control.dout.wait_full(item);
    more = control.more[item.stage];
    wgmma_wait<1>();
    pin(dv);
    if (lane == 0) control.dout.release(done);
  }
  wgmma_wait<0>();
  pin(dk), pin(dv);
  if (count > 0) {
    start_dq();
    wgmma_wait<0>();
    if (finish_dq()) pass_on_part(0);
  }
  const float scale = s.negative ? -s.scale : s.scale;
  const int key = key0 + 16 * warp;
  constexpr int panel_bytes = keys * panel_row_bytes;
  char* const rows = shared + (64 * warpgroup + 16 * warp) * panel_row_bytes;
  if (!Tiles::hastens_end || p.float_dv)
    store_keys<T, D>(p.dv, p.float_dv, p.dv_sum, batch, kv_head, key, s.keys, dv, 1.0f);
  else  // over values, of which each warpgroup reads its own rows
    send_keys<T, D>(p.dv_map, rows + Tiles::dout_at + p.dout_stages * Tiles::queries_bytes, panel_bytes, dv, 1.0f, key, kv_head,
                    batch);
  if (!Tiles::hastens_end || p.float_dk) {
    store_keys<T, D>(p.dk, p.float_dk, p.dk_sum, batch, kv_head, key, s.keys, dk, scale);
  } else {
    cutlass::arch::NamedBarrier::sync(32 * consumer_warps, 1);  // both have read all keys
    send_keys<T, D>(p.dk_map, rows + Tiles::k_at, panel_bytes, dk, scale, key, kv_head, batch);
  }
  if constexpr (Tiles::hastens_end) cute::tma_store_wait<0>();
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
    control.q.init(consumer_warps, 32), control.dout.init(consumer_warps), control.scores.init(consumer_warps);
    for (BarrierWord& ds : control.ds) Barrier::init(&ds, consumer_warps);
    for (BarrierWord& turn : control.turn) Barrier::init(&turn, 1);
    for (BarrierWord& added : control.added) Barrier::init(&added, consumer_warps);
    Barrier::init(&control.k, 1), Barrier::init(&control.dq_free, 1);
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
  } else {
    cutlass::arch::warpgroup_reg_alloc<Tiles::Registers::consumer>();
    owner_consume<T, D, values>(p, shared, control, seen, batch, kv_head, work.block);
  }
}

}  // namespace effcore::cuda::hopper
