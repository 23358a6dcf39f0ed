// Backward of a layer group's owner (layers >= 1; one layer is plain attention) and of its consumers:
//
//   P = exp(S - lse), or read;   dv = P^T dout_0;   dP = sum_l dout_l v_l^T;   dS = P * (dP - delta)
//   dk = scale dS^T q;   dq = scale dS k
//
// Bound: 4 + layers products of 2 * queries * keys * dim FLOPs for an owner, 2 for a consumer, one less with P kept (half
// causal). A block owns `keys` keys of a kv head and walks over the queries that see them, head by head of the group, so dk and
// dv stay in registers and need no sum over heads. Scores are computed transposed, S^T = K Q^T: a warp owns 16 keys, and P^T
// and dS^T are already in the layout of the operand A of the products that give dv and dk. Only dq, which sums over the warps'
// keys, needs dS in shared memory. dq is added up over the blocks of keys in turns (turns.cuh); the last one scales, rounds and
// writes it.
//
// Shared memory (BackwardTiles): K [keys x D]; two stages each of dout [queries x D], Q [queries x D] and kept P [queries x
// keys]; dS^T [keys x queries]; V [keys x D], in two stages if there are several layers, whose dout_l and v_l then stream
// through: a ring of items (step, layer) of which one is being multiplied and the next is on its way.
#pragma once
#include "attention/backward_tiles.cuh"
#include "attention/turns.cuh"

namespace effcore::cuda::attention {

// dk or dv of a warp's 16 keys, in the inputs' dtype or in float32 and then added to `sum`, if there is one.
template <class T, int D>
__device__ __forceinline__ void store_keys(const Tensor4& to, bool in_float, const Tensor4& sum, int batch, int head, int key0,
                                           int keys, const float (&x)[D / 8][4], float scale) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int key = key0 + lane / 4 + 8 * i;
    if (key >= keys) continue;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      const int column = 8 * n + 2 * (lane % 4);
      float low = x[n][2 * i] * scale, high = x[n][2 * i + 1] * scale;
      if (sum.data != nullptr) {
        const float* const before = row_of<float>(sum, batch, head, key);
        if (column < sum.columns) low += before[column];
        if (column + 1 < sum.columns) high += before[column + 1];
      }
      if (in_float)
        store_pair(row_of<float>(to, batch, head, key), column, to.columns, to.paired, low, high);
      else
        store_pair(row_of<T>(to, batch, head, key), column, to.columns, to.paired, low, high);
    }
  }
}

template <class T, int D, Gradients gradients, bool from_probs, bool compact>
__global__ void __launch_bounds__(BackwardTiles<T, D, gradients, from_probs, compact>::threads,
                                  gradients == Gradients::dv && D == 64 ? 2 : 1)
    backward_kernel(const __grid_constant__ BackwardParams p) {
  using Tiles = BackwardTiles<T, D, gradients, from_probs, compact>;
  constexpr int queries = Tiles::queries, keys = Tiles::keys, threads = Tiles::threads;
  constexpr bool wants_dv = Tiles::wants_dv, wants_dq = Tiles::wants_dq;
  constexpr float log2e = 1.4426950408889634f;
  extern __shared__ __align__(1024) char shared[];
  using Wide = Tile<T, D>;
  const Wide k_tile(shared + Tiles::k_at);
  const Tile<T, Tiles::ds_columns> ds_tile(shared + Tiles::ds_at);
  float* const statistics = reinterpret_cast<float*>(shared + Tiles::statistics_at);  // [stage][lse, delta][queries]

  const Shape& s = p.shape;
  int number = blockIdx.x;
  if constexpr (wants_dq) {
    if (threadIdx.x == 0) *reinterpret_cast<int*>(statistics) = atomicAdd(p.ticket, 1);
    __syncthreads();
    number = *reinterpret_cast<const int*>(statistics);
    __syncthreads();
  }
  const Work work(p.schedule, number, false);
  const int batch = work.head / s.kv_heads, kv_head = work.head % s.kv_heads, key0 = work.block * keys;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_key = 16 * warp;
  const int query_blocks = (s.queries + queries - 1) / queries;
  const Visibility seen(s, batch);
  const int first_seen = s.queries > 0 ? seen.begin(0) : 0;  // K and V before this or behind the end are never multiplied
  const float scale_log2 = s.negative ? -s.scale_log2 : s.scale_log2, scale = s.negative ? -s.scale : s.scale;

  const auto load = [&](const Step& step, int layer, int stage, int q_stage, bool first) {
    const int head = kv_head * s.group + step.head, query0 = step.block * queries;
    load_tile<queries, threads>(Wide(shared + Tiles::dout_at + stage * Tiles::queries_bytes),
                                matrix<T>(p.dout[layer], batch, head), query0, 0, s.queries);
    if constexpr (wants_dq) {
      if (first || p.layers > 1)
        load_tile<keys, threads>(Wide(shared + Tiles::v_at + (p.layers > 1 ? stage : 0) * Tiles::keys_bytes),
                                 matrix<T>(p.v[layer], batch, kv_head), key0, first_seen, seen.length);
    }
    if (layer == 0) {
      if constexpr (Tiles::reads_q)
        load_tile<queries, threads>(Wide(shared + Tiles::q_at + q_stage * Tiles::queries_bytes), matrix<T>(p.q, batch, head),
                                    query0, 0, s.queries);
      if constexpr (from_probs)
        load_probs<queries, threads>(
            Tile<T, Tiles::probs_columns>(shared + Tiles::probs_at + q_stage * queries * Tiles::probs_columns * Tiles::size),
            static_cast<const T*>(p.probs) + (static_cast<std::int64_t>(batch) * s.heads + head) * probs_elements_of(s), s,
            query0, key0);
      if (threadIdx.x < 2 * queries) {
        const int i = threadIdx.x % queries;
        const float* from = threadIdx.x >= queries ? p.delta : from_probs ? p.factors : p.lse;
        const bool valid = query0 + i < s.queries && from != nullptr;
        if (valid) from += (static_cast<std::int64_t>(batch) * s.heads + head) * s.queries + query0 + i;
        async_copy_4(shared_address(statistics + 2 * queries * q_stage + threadIdx.x),
                     valid ? from : static_cast<const void*>(p.k.data), valid);
      }
    }
    async_commit();
  };

  float dv[wants_dv ? D / 8 : 1][4], dk[wants_dq ? D / 8 : 1][4];
  clear(dv), clear(dk);
  Steps<queries, keys> steps(seen, s.queries, s.group, work.block);
  Step step = steps.next();
  if (step.exists()) {
    if constexpr (Tiles::reads_k)
      load_tile<keys, threads>(k_tile, matrix<T>(p.k, batch, kv_head), key0, first_seen, seen.length);
    load(step, 0, 0, 0, true);
  }
  int* signal = nullptr;  // the turn that the previous step has still to pass on, and its number
  int signal_turn = 0;
  for (int stage = 0, q_stage = 0; step.exists(); q_stage ^= 1) {
    const Step following = steps.next();
    const int query0 = step.block * queries, last_query = min(query0 + queries, s.queries) - 1;
    const Wide q_tile(shared + Tiles::q_at + q_stage * Tiles::queries_bytes);
    const float* const lse = statistics + 2 * queries * q_stage;  // or the factors of kept P, and delta behind either
    const int head = kv_head * s.group + step.head;
    const std::int64_t slot = (static_cast<std::int64_t>(batch) * s.heads + head) * query_blocks + step.block;
    const KeyBlocks met(seen, s.queries, step.block, queries, keys);
    const int turn = work.block - met.first;
    int turns_in = 0;

    float probs[queries / 8][4], dprobs[wants_dq ? queries / 8 : 1][4];  // P^T and dP^T: [16 keys x queries] of this warp
    clear(probs), clear(dprobs);
    for (int layer = 0; layer < p.layers; ++layer) {
      async_wait<0>();
      __syncthreads();  // this item has arrived, everyone has left the one before, and its part of dq has been added
      if (layer + 1 < p.layers)
        load(step, layer + 1, stage ^ 1, q_stage, false);
      else if (following.exists())
        load(following, 0, stage ^ 1, q_stage ^ 1, false);
      const Wide dout_tile(shared + Tiles::dout_at + stage * Tiles::queries_bytes);

      if (layer == 0) {
        // Asked for early, so that the answer is there when it is needed. The sums are touched in L2 alone: seeing the count is
        // enough.
        if (wants_dq && threadIdx.x == threads - 1 && turn > 0) turns_in = load_relaxed(p.turns + slot);
        if constexpr (from_probs) {
          const Tile<T, Tiles::probs_columns> p_tile(shared + Tiles::probs_at +
                                                     q_stage * queries * Tiles::probs_columns * Tiles::size);
#pragma unroll
          for (int j = 0; j < queries / 16; ++j)
            as_accumulators(p_tile.a_transposed(16 * j, warp_key), probs[2 * j], probs[2 * j + 1]);
#pragma unroll
          for (int n = 0; n < queries / 8; ++n) {
            const float2 factor = *reinterpret_cast<const float2*>(lse + 8 * n + 2 * (lane % 4));
#pragma unroll
            for (int i = 0; i < 4; ++i) probs[n][i] *= i % 2 == 0 ? factor.x : factor.y;
          }
        } else {
          product<T, 1, D / 16, queries / 16>(
              &probs, [&](int, int d) { return k_tile.a(warp_key, 16 * d); },
              [&](int d, int n) { return q_tile.b(16 * n, 16 * d); });
#pragma unroll
          for (int n = 0; n < queries / 8; ++n) {
            const float2 shift = *reinterpret_cast<const float2*>(lse + 8 * n + 2 * (lane % 4));
#pragma unroll
            for (int i = 0; i < 4; ++i)
              probs[n][i] = exp2_approx(fmaf(probs[n][i], scale_log2, -(i % 2 == 0 ? shift.x : shift.y) * log2e));
          }
          // Queries behind the last one have lse = 0, q = 0 and dout = 0: P = 1 there, times nothing.
          if (key0 + keys > seen.end(query0) || key0 < seen.begin(last_query)) {
#pragma unroll
            for (int n = 0; n < queries / 8; ++n)
#pragma unroll
              for (int e = 0; e < 2; ++e) {
                const int query = min(query0 + 8 * n + 2 * (lane % 4) + e, last_query), begin = seen.begin(query),
                          end = seen.end(query);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                  const int key = key0 + warp_key + lane / 4 + 8 * i;
                  if (key < begin || key >= end) probs[n][2 * i + e] = 0.0f;
                }
              }
          }
        }
        if constexpr (wants_dv)
          product<T, 1, queries / 16, D / 16, true>(
              &dv, [&](int, int j) { return as_operand<T>(probs[2 * j], probs[2 * j + 1]); },
              [&](int j, int n) { return dout_tile.b_transposed(16 * j, 16 * n); });
      }
      if constexpr (wants_dq) {
        const Wide v_tile(shared + Tiles::v_at + (p.layers > 1 ? stage : 0) * Tiles::keys_bytes);
        product<T, 1, D / 16, queries / 16>(
            &dprobs, [&](int, int d) { return v_tile.a(warp_key, 16 * d); },
            [&](int d, int n) { return dout_tile.b(16 * n, 16 * d); });
      }
      stage ^= 1;
    }

    if constexpr (wants_dq) {
      // dS^T, for dk from registers and for dq through shared memory.
#pragma unroll
      for (int n = 0; n < queries / 8; ++n) {
        const float2 delta = *reinterpret_cast<const float2*>(lse + queries + 8 * n + 2 * (lane % 4));
#pragma unroll
        for (int i = 0; i < 4; ++i) dprobs[n][i] = probs[n][i] * (dprobs[n][i] - (i % 2 == 0 ? delta.x : delta.y));
#pragma unroll
        for (int i = 0; i < 2; ++i)
          store_pair(ds_tile.at(warp_key + lane / 4 + 8 * i, 8 * n + 2 * (lane % 4)), 0, 2, true, dprobs[n][2 * i],
                     dprobs[n][2 * i + 1]);
      }
      product<T, 1, queries / 16, D / 16, true>(
          &dk, [&](int, int j) { return as_operand<T>(dprobs[2 * j], dprobs[2 * j + 1]); },
          [&](int j, int n) { return q_tile.b_transposed(16 * j, 16 * n); });

      // By now what the step before has added is in L2, and passing its turn on costs no wait. Two warps, since each would
      // delay the barrier.
      if (threadIdx.x == 0 && signal != nullptr) store_release(signal, signal_turn);
      if (threadIdx.x == threads - 1 && turns_in < turn) wait_for_turn(p.turns + slot, turn);
      __syncthreads();  // dS has been written, and it is this block's turn

      constexpr int down = Tiles::dq_down, rows = Tiles::dq_rows, columns = Tiles::dq_columns;
      const int row0 = warp % down * rows * 16, column0 = warp / down * columns * 16;
      float dq[rows][2 * columns][4];
#pragma unroll
      for (int m = 0; m < rows; ++m) clear(dq[m]);
      product<T, rows, keys / 16, columns>(
          dq, [&](int m, int j) { return ds_tile.a_transposed(16 * j, row0 + 16 * m); },
          [&](int j, int n) { return k_tile.b_transposed(16 * j, column0 + 16 * n); });
      float4* const sums =
          reinterpret_cast<float4*>(p.dq_sums + slot * Tiles::dq_elements) + warp * (rows * columns * 2 * 32) + lane;
      const bool last = work.block == met.last;
#pragma unroll
      for (int m = 0; m < rows; ++m) {
        const int row = query0 + row0 + 16 * m + lane / 4;
        bool sees[2] = {};
        if (last)
#pragma unroll
          for (int i = 0; i < 2; ++i) sees[i] = seen.sees_keys(min(row + 8 * i, last_query));
#pragma unroll
        for (int n = 0; n < 2 * columns; ++n) {
          float4* const sum = sums + (m * 2 * columns + n) * 32;
          if (!last) {
            if (turn == 0)
              __stcg(sum, make_float4(dq[m][n][0], dq[m][n][1], dq[m][n][2], dq[m][n][3]));
            else
              add_in_turn(sum, dq[m][n]);
            continue;
          }
          const float4 before = turn > 0 ? __ldcg(sum) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          const float whole[4] = {before.x + dq[m][n][0], before.y + dq[m][n][1], before.z + dq[m][n][2],
                                  before.w + dq[m][n][3]};
          const int column = column0 + 8 * n + 2 * (lane % 4);
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (row + 8 * i < s.queries)
              store_pair(row_of<T>(p.dq, batch, head, row + 8 * i), column, s.head_dim, p.dq.paired,
                         sees[i] ? whole[2 * i] * scale : 0.0f, sees[i] ? whole[2 * i + 1] * scale : 0.0f);
        }
      }
      signal = last ? nullptr : p.turns + slot;
      signal_turn = turn + 1;
    }
    step = following;
  }
  if (wants_dq && signal != nullptr) {
    __syncthreads();
    if (threadIdx.x == 0) store_release(signal, signal_turn);
  }

  if constexpr (wants_dv) store_keys<T, D>(p.dv, p.float_dv, p.dv_sum, batch, kv_head, key0 + warp_key, s.keys, dv, 1.0f);
  if constexpr (wants_dq) store_keys<T, D>(p.dk, p.float_dk, p.dk_sum, batch, kv_head, key0 + warp_key, s.keys, dk, scale);
}

}  // namespace effcore::cuda::attention
