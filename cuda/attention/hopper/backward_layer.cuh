// One layer's backward (backward.cuh): what the warpgroups do that multiply.
//
// The product that gives dq lags one step behind: by then the other warpgroup's dS is there, nobody waits for it, and the two
// warpgroups need not run in step, so that one multiplies while the other exponentiates. Products block the warp that issues
// them, so what is done beside them has to stand between them: the exponentials between those of dP, a part of dq on its way to
// shared memory between those of S, and dS of one half of the queries between those of dk of the other (with each of them
// behind its products 1.09 times as long at D = 128, 1.16 at 64). lse is read while dq is multiplied, or its reads would stand
// behind the stores of dq's part; delta, where dP is not accumulated on it, is read ahead. Who reads dS or adds a part of dq
// fences (backward_helpers.cuh), not who stores it: that warp would stand still until its stores are done. Times and counters
// of this order and of others: benchmarks/results/attention_backward_ncu_h200.txt, attention_backward_delta.json,
// attention_backward_fences.json.
#pragma once
#include "attention/hopper/backward_sums.cuh"

namespace effcore::cuda::hopper {

template <class T, int D>
__device__ __forceinline__ void layer_consume(const OwnerParams& p, char* shared,
                                              OwnerControl<OwnerTiles<D, Values::one>>& control, const Visibility& seen,
                                              int batch, int kv_head, int block) {
  using Tiles = OwnerTiles<D, Values::one>;
  constexpr int queries = Tiles::queries, keys = Tiles::keys, half = queries / 2;
  const Shape& s = p.shape;
  const int thread = threadIdx.x - helper_threads, warp = thread / 32 % 4;
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
  const std::uint32_t part_at = base + p.dq_at + (warpgroup * (Tiles::dq_elements / 8) + thread % 128) * 16;

  float dv[D / 2], dk[D / 2], dq[32], dp[queries / 2];
  float2 ahead[8];  // lse or delta of the next 64 queries, read before they are waited for
#pragma unroll
  for (int i = 0; i < D / 2; ++i) dv[i] = 0.0f, dk[i] = 0.0f;
  Turn<Tiles::q_stages> q, q_before;
  Turn<Tiles::most_stages> item;
  Turn<Tiles::scores_stages> scores, scores_before;
  const auto leads = [] { return cute::elect_one_sync() != 0; };
  const auto scores_at = [&](int stage) { return base + Tiles::scores_at + stage * Tiles::scores_bytes; };
  int flags_before = 0;                           // of StepInfo
  std::uint32_t count = 0, parts = 0, turns = 0;  // of steps; of parts of dq in shared memory; bits: phases of control.turn

  const auto start_dq = [&] {
    if (count > 0) {
      Barrier::wait(&control.ds[(count - 1) % 2], (count - 1) / 2 % 2);
      fence_async();
    }
    // Nothing comes before the first step: a product of something else, for nobody.
    const std::uint32_t from = count > 0 ? scores_at(scores_before.stage) + dq_rows_at : base + Tiles::k_at;
    pin(dq);
    wgmma_begin();
    multiply<T, 64, keys / 16>(dq, SharedOperand<false>(from, 64, false), k_depth, false);
    wgmma_commit();
  };
  const auto pass_on_dq = [&] {
    __syncwarp();
    if (leads()) Barrier::arrive(&control.added[(count - 1) % 2]);
  };
  // Behind the product: returns whether a part is to be stored, in eight pieces by store_part, and to be passed on.
  const auto finish_dq = [&] {
    pin(dq);
    if (count == 0) return false;
    const auto release = [&] {
      if (leads()) control.q.release(q_before), control.scores.release(scores_before);
    };
    const std::uint32_t parity = (count - 1) % 2;
    if (!(flags_before & step_last)) {
      release();
      Barrier::wait(&control.dq_free[parity], ~parts >> parity & 1);
      parts ^= 1u << parity;
      return true;
    }
    Barrier::wait(&control.turn[parity], turns >> parity & 1);
    turns ^= 1u << parity;
    store_dq<T, D, queries>(p, control.info[q_before.stage], dq, warpgroup);
    pass_on_dq();
    release();
    return false;
  };
  const auto store_part = [&](int n, bool wanted) {
    asm volatile(
        "{\n"
        ".reg .pred wanted;\n"
        "setp.ne.b32 wanted, %5, 0;\n"
        "@wanted st.shared.v4.f32 [%0], {%1, %2, %3, %4};\n"
        "}" ::"r"(part_at + n * 128 * 16 + (count - 1) % 2 * Tiles::dq_bytes),
        "f"(dq[4 * n]), "f"(dq[4 * n + 1]), "f"(dq[4 * n + 2]), "f"(dq[4 * n + 3]), "r"(static_cast<int>(wanted)));
  };
  const auto pass_on_part = [&](int stored) {
#pragma unroll
    for (int n = stored; n < 8; ++n) store_part(n, true);
    pass_on_dq();
  };
  const auto start_dp = [&] {
    pin(dp);
    wgmma_begin();
    multiply<T, queries, D / 16>(
        dp, SharedOperand<false>(values_at, keys, false),
        SharedOperand<false>(base + Tiles::dout_at + item.stage * Tiles::queries_bytes, queries, false),
        Tiles::starts_from_delta);
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
    // (part_at & 48) / 8 is 2 * (lane % 4), which would come from threadIdx.x anew at every step, behind stores to shared
    // memory.
    const float* const statistics =
        reinterpret_cast<const float*>(shared + Tiles::statistics_at) + q.stage * 2 * queries + (part_at & 48) / 8;
    const auto look_ahead = [&](int from) {
#pragma unroll
      for (int n = 0; n < 8; ++n) ahead[n] = *reinterpret_cast<const float2*>(statistics + from + 8 * n);
    };
    int flags;
    float st[queries / 2];
    const auto start_scores = [&](auto&& between) {
      const SharedOperand<false> q_rows(q_at, queries, false);
      pin(st);
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        multiply<T, queries, 1>(st, block_of(k_rows, k), block_of(q_rows, k), k > 0);
        between(k);
      }
      wgmma_commit();
    };
    const auto start_from_delta = [&] {
#pragma unroll
      for (int n = 0; n < queries / 8; ++n) {
        const float2 minus_delta = *reinterpret_cast<const float2*>(statistics + queries + 8 * n);
        dp[4 * n] = dp[4 * n + 2] = minus_delta.x, dp[4 * n + 1] = dp[4 * n + 3] = minus_delta.y;
      }
    };
    const auto finish_scores = [&] {
      wgmma_wait<0>();
      pin(st);
      if (flags & step_masked)
        hide_unseen<queries>(st, s.negative, seen, key0 + 16 * warp, control.info[q.stage].query0, s.queries - 1);
    };
    start_dq();
    control.q.wait_full(q);
    flags = control.info[q.stage].flags;
    look_ahead(0);
    wgmma_wait<0>();
    const bool part = finish_dq();
    start_scores([&](int k) { store_part(k, part); });  // in the shadow of the products
    if (part) pass_on_part(D / 16);
    if constexpr (Tiles::starts_from_delta) start_from_delta();  // beside S, too
    finish_scores();
    start_dp();
    // What follows is done by halves of the queries, so that ptxas puts the exponentials of one between the products of
    // another.
    const std::uint32_t dout_at = base + Tiles::dout_at + item.stage * Tiles::queries_bytes;
    std::uint32_t pa[2][half / 16][4];  // P^T, rounded
    const auto exponentiate_half = [&]<int h>() {
      float* const x = st + h * half / 2;
      exponentiate<half>(x, scale_log2, [&](int n) { return ahead[(h * half / 8 + n) % 8]; });
      round_operand<T, half>(pa[h], x);
      constexpr int next = (h + 1) * half;
      if (next % 64 == 0 && (next < queries || !Tiles::starts_from_delta)) look_ahead(next);
      if (h == 0) pin(dv);
      wgmma_begin();
      multiply<T, D, half / 16>(dv, pa[h], SharedOperand<true>(dout_at + h * half * panel_row_bytes, queries, false), true);
    };
    exponentiate_half.template operator()<0>();
    exponentiate_half.template operator()<1>();
    wgmma_commit();
    control.scores.wait_empty(scores);
    wgmma_wait<1>();
    pin(dp);
    if (flags & step_masked) {  // values that nobody sees may be NaN
#pragma unroll
      for (int i = 0; i < queries / 4; ++i) {
        const float2 probs = widen<T>(pa[i / (half / 4)][i % (half / 4) / 4][i % 4]);
        if (probs.x == 0.0f) dp[2 * i] = 0.0f;
        if (probs.y == 0.0f) dp[2 * i + 1] = 0.0f;
      }
    }
    // dS^T = P^T * (dP^T - delta). At D = 128 delta is in the accumulators; at 64, where there are registers for only half of P
    // as it was before it was rounded, it is subtracted here.
    std::uint32_t ds[2][half / 16][4];
    const auto differentiate_half = [&]<int h>() {
      float* const x = dp + h * half / 2;
#pragma unroll
      for (int i = 0; i < half / 4; ++i) {
        float2 probs, difference;
        if constexpr (Tiles::starts_from_delta) {
          probs = make_float2(st[h * half / 2 + 2 * i], st[h * half / 2 + 2 * i + 1]);
          difference = make_float2(x[2 * i], x[2 * i + 1]);
        } else {
          const float2 delta = ahead[(h * half / 8 + i / 2) % 8];
          if constexpr (h == 1)  // as fast with none of P, and more exact
            probs = make_float2(st[h * half / 2 + 2 * i], st[h * half / 2 + 2 * i + 1]);
          else
            probs = widen<T>(pa[h][i / 4][i % 4]);
          difference = make_float2(x[2 * i] - delta.x, x[2 * i + 1] - delta.y);
        }
        ds[h][i / 4][i % 4] = cuda::pack<T>(probs.x * difference.x, probs.y * difference.y);
      }
      if (h == 0 && half == 64 && !Tiles::starts_from_delta) look_ahead(queries + half);
      store_transposed<half>(scores_at(scores.stage) + place + h * half / 64 * 2 * tile_bytes + h * half % 64 * panel_row_bytes,
                             2 * tile_bytes, ds[h]);
      if (h == 0) pin(dk);
      wgmma_begin();
      multiply<T, D, half / 16>(dk, ds[h], SharedOperand<true>(q_at + h * half * panel_row_bytes, queries, false), true);
    };
    differentiate_half.template operator()<0>();
    differentiate_half.template operator()<1>();
    wgmma_commit();
    __syncwarp();
    if (leads()) Barrier::arrive(&control.ds[count % 2]);
    const Turn<Tiles::most_stages> done = item;
    item.next(p.dout_stages);
    flags_before = flags;
    q_before = q, q.next();
    scores_before = scores;
    scores.next();
    ++count;
    control.dout.wait_full(item);
    more = control.more[item.stage];
    wgmma_wait<1>();
    pin(dv);
    if (leads()) control.dout.release(done);
  }
  wgmma_wait<0>();
  pin(dk), pin(dv);
  if (count > 0) {
    start_dq();
    wgmma_wait<0>();
    if (leads()) Barrier::arrive(&control.ended);
    if (finish_dq()) pass_on_part(0);
  } else {
    if (leads()) Barrier::arrive(&control.ended);
  }
  store_block<T, D, Values::one>(p, shared, control, batch, kv_head, key0, warpgroup, dk, dv);
}

}  // namespace effcore::cuda::hopper
