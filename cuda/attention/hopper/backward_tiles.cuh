// How the backward kernels of sm_90a cut their work and their shared memory, and the arguments they take.
//
// A block owns 128 keys of a kv head and walks over the queries that see them, head by head of the group (Steps). Its warps:
// one warpgroup of helpers (warp 0 brings tiles, warps 1 and 2 wait for and pass on turns of dq, warp 3 brings what a step
// needs besides) and two that multiply, each with 64 of the keys. All tiles are panels of 64 columns in the 128-byte swizzle
// (wgmma.cuh).
#pragma once
#include <cuda.h>

#include "attention/backward_tiles.cuh"
#include "attention/hopper/softmax.cuh"
#include "hopper/pipeline.cuh"
#include "hopper/wgmma.cuh"

namespace effcore::cuda::hopper {

using attention::BackwardParams;
using attention::max_layers;
using attention::Schedule;
using attention::Shape;
using attention::Tensor4;
using attention::Visibility;

// Where the value tiles of a group's layers stand: one layer's, all layers' (they stay while the block walks over its queries;
// `kept`: and P is read, not made), or too many to stay: each comes again with every tile of its dout.
enum class Values { one, resident, kept, streamed };

constexpr int consumer_warps = 8, helper_threads = 128, backward_threads = helper_threads + 32 * consumer_warps;
// Registers a thread. A block starts with 168 and may share out no more than that: asking for more waits forever.
template <int helpers, int consumers>
struct Registers {
  static constexpr int helper = helpers, consumer = consumers;
  static_assert(helper_threads * helpers + 32 * consumer_warps * consumers <= backward_threads * 168);
};
constexpr int shared_limit = 227 * 1024;

template <int D, Values values>
struct OwnerTiles {
  static constexpr int keys = 128;
  // The scores and dP of a step, transposed, [64 keys x queries] a warpgroup, take queries registers together; dk and dv take
  // D.
  static constexpr int queries = D == 64 ? 128 : 64;
  static constexpr int keys_bytes = keys * D * 2, queries_bytes = queries * D * 2, scores_bytes = queries * keys * 2;
  static constexpr int dq_elements = queries * D;
  // Whether dP is accumulated on -delta, so that dS is dP times P, as it was before it was rounded. H200, one layer at D = 128:
  // 2 % faster. At 64 dP on -delta alone is 0 to 2 % slower, and with all of P in float32 what does not fit into registers
  // costs 27 %.
  static constexpr bool starts_from_delta = D == 128 && values == Values::one;
  // Whether dk and dv in the inputs' dtype leave by TMA. H200, one layer: at D = 64 a backward is 1 to 3 % faster so, at
  // D = 128 4 to 6 % slower.
  static constexpr bool hastens_end = D == 64;
  // Where P is kept nothing is spilled with 232, and with 240 what the helpers need is (D = 128, an earlier form: 4 to 5 %
  // slower).
  using Registers =
      std::conditional_t<D == 64 || values == Values::kept, hopper::Registers<40, 232>, hopper::Registers<24, 240>>;

  // At D = 128 the values of four layers leave room for three more tiles, so that dS takes its turn in dout's ring. Where P is
  // kept, so does P; and at 64, too, Q, which only the last product needs then.
  static constexpr bool pooled = D == 128 && (values == Values::resident || values == Values::kept);
  static constexpr bool q_in_ring = values == Values::kept;
  static_assert(!pooled || scores_bytes == queries_bytes);
  static constexpr int q_stages = D == 128 && (values == Values::resident || values == Values::streamed) ? 1 : 2;
  static constexpr int scores_stages = values == Values::one ? 2 : 1;
  static constexpr int least_stages = values == Values::one ? 2 : 3, most_stages = values == Values::one ? 3 : 6;  // of dout

  static constexpr int k_at = 0;
  static constexpr int q_at = k_at + keys_bytes;
  static constexpr int scores_at = q_at + (q_in_ring ? 0 : q_stages * queries_bytes);
  static constexpr int statistics_at = scores_at + (pooled ? 0 : scores_stages * scores_bytes);  // [stage][lse, delta][queries]
  static constexpr int control_at = statistics_at + q_stages * 2 * queries * 4;
  static constexpr int control_bytes = 320;
  static constexpr int dout_at = (control_at + control_bytes + 1023) / 1024 * 1024;
  static constexpr int stage_bytes = queries_bytes + (values == Values::streamed ? keys_bytes : 0);

  // As many stages of dout as there is room for; behind them stand the values and, where there is room for it too, the part of
  // dq that is on its way to its sums.
  static constexpr int dq_stages = values == Values::one ? 2 : 1, dq_bytes = dq_elements * 4;
  static constexpr int values_bytes(int layers) { return values == Values::streamed ? 0 : layers * keys_bytes; }
  static constexpr int stages_in(int room) { return room / stage_bytes < most_stages ? room / stage_bytes : most_stages; }
  static constexpr bool staged(int layers) {
    return stages_in(shared_limit - dout_at - values_bytes(layers) - dq_stages * dq_bytes) >= least_stages;
  }
  static constexpr int dout_stages(int layers) {
    return stages_in(shared_limit - dout_at - values_bytes(layers) - (staged(layers) ? dq_stages * dq_bytes : 0));
  }
  static constexpr bool fits(int layers) { return dout_stages(layers) >= least_stages; }
  static constexpr int dq_at(int layers) { return dout_at + dout_stages(layers) * stage_bytes + values_bytes(layers); }
  static constexpr int shared_bytes(int layers) { return dq_at(layers) + (staged(layers) ? dq_stages * dq_bytes : 0); }
  static_assert(fits(1) && (values != Values::one || staged(1)));
  // Where one layer's dk and dv stand in float32 once Q, dS, dout and V have been read, in panels of 32 columns.
  static constexpr int sums_bytes = keys * D * 4, sum_panel_bytes = keys * panel_row_bytes, dk_at = q_at, dv_at = dout_at;
  static_assert(values != Values::one || (dk_at + sums_bytes <= statistics_at && dv_at + sums_bytes <= dq_at(1)));
};

// What the producer says about a step.
struct StepInfo {
  int slot;    // of dq's sums: (batch, head, block of queries)
  int query0;  // of the block
  int flags;
};
constexpr int step_masked = 1, step_first = 2, step_last = 4;  // some keys are not seen; first, last turn of dq's sums

template <class Tiles>
struct OwnerControl {
  Ring<Tiles::q_stages> q;
  Ring<Tiles::most_stages> dout;
  Ring<Tiles::scores_stages> scores;  // the slot for dS is free
  BarrierWord ds[2];                  // dS has been written, of even and of odd steps
  BarrierWord k, dq_free[Tiles::dq_stages];
  BarrierWord ended, sums;        // all products are made; what dk and dv are added to has come
  BarrierWord turn[2], added[2];  // of even and of odd steps
  StepInfo info[Tiles::q_stages];
  bool more[Tiles::most_stages];
  int number;
};

struct OwnerParams {
  Shape shape;
  Schedule schedule;
  const float *lse, *delta;
  const float* factors;  // of kept probabilities
  int layers, dout_stages;
  int dq_at;  // where a part of dq waits for its turn in shared memory; 0: it waits in registers
  Tensor4 dq, dk, dv;
  bool float_dk, float_dv;
  Tensor4 dk_sum, dv_sum;
  float* dq_sums;
  int *turns, *ticket;
  // dk, dv: in boxes of 16 keys; what they are added to: of a block's.
  CUtensorMap q, k, probs, dk_map, dv_map, dk_sum_map, dv_sum_map, dout[max_layers], v[max_layers];
};

struct ValuesParams {
  Shape shape;
  Schedule schedule;
  const float* lse;
  Tensor4 dv;
  bool float_dv;
  CUtensorMap q, k, dout;
};

// Loads `rows` tokens (as many as the map's box has) from `token` on, D columns.
template <int D>
__device__ __forceinline__ void load_panels(const CUtensorMap& map, BarrierWord* barrier, char* to, int rows, int token,
                                            int head, int batch, Keep keep) {
#pragma unroll
  for (int panel = 0; panel < D / panel_columns; ++panel)
    cute::SM90_TMA_LOAD_4D::copy(&map, barrier, static_cast<std::uint64_t>(keep), to + panel * rows * panel_row_bytes,
                                 panel * panel_columns, token, head, batch);
}

// lse of the queries of a step, or the factors of their kept probabilities, and delta where it is wanted, on their way to
// shared memory by a warp of their own, which reads them a step ahead. The warp that brings the tiles would wait for them at
// every step, and the step for it (H200, ncu).
template <int queries>
class RowStatistics {
 public:
  // `row` counts heads of the whole batch. `behind` the last query lse or the factors are this. Without `delta`, null, there is
  // none.
  __device__ __forceinline__ void read(const Shape& s, const float* of_probs, float behind, const float* delta, int row,
                                       int query0) {
#pragma unroll
    for (int i = 0; i < parts; ++i) {
      const int query = query0 + 32 * i + static_cast<int>(threadIdx.x % 32);
      const std::int64_t at = static_cast<std::int64_t>(row) * s.queries + query;
      of_probs_[i] = query < s.queries ? of_probs[at] : behind;
      if (delta != nullptr) delta_[i] = query < s.queries ? delta[at] : 0.0f;
    }
  }
  // In units of log2, and infinite where a query sees nothing.
  __device__ __forceinline__ void store_lse(float* to) const {
    constexpr float log2e = 1.4426950408889634f;
#pragma unroll
    for (int i = 0; i < parts; ++i) to[32 * i + threadIdx.x % 32] = of_probs_[i] == -INFINITY ? INFINITY : of_probs_[i] * log2e;
  }
  __device__ __forceinline__ void store_factors(float* to) const {
#pragma unroll
    for (int i = 0; i < parts; ++i) to[32 * i + threadIdx.x % 32] = of_probs_[i];
  }
  __device__ __forceinline__ void negate_delta() {
#pragma unroll
    for (int i = 0; i < parts; ++i) delta_[i] = -delta_[i];
  }
  __device__ __forceinline__ void store_delta(float* to) const {
#pragma unroll
    for (int i = 0; i < parts; ++i) to[32 * i + threadIdx.x % 32] = delta_[i];
  }

 private:
  static constexpr int parts = queries / 32;
  static_assert(parts * 32 == queries);
  float of_probs_[parts], delta_[parts];
};

constexpr int behind_probs = 1 << 30;  // more rows of kept probabilities than a tensor may have

// Calls body(token) for the 64 x 64 tiles of kept probabilities of queries [query0, query0 + rows) and keys [key0, key0 +
// columns), tile by tile of a row of tiles; for those that are not stored, behind_probs. `row` counts heads of the whole batch.
template <class Body>
__device__ __forceinline__ void for_probs_tiles(const Shape& s, int row, int query0, int key0, int rows, int columns,
                                                Body&& body) {
  constexpr int tile = attention::probs_tile;
  const std::int64_t head_tiles = attention::probs_elements_of(s) / (tile * tile);
  for (int i = 0; i < rows / tile; ++i) {
    const int block = query0 / tile + i;
    const int stored = block * tile < s.queries ? attention::probs_tiles(s, block) : 0;
    const std::int64_t before = row * head_tiles + (stored > 0 ? attention::probs_tiles_before(s, block) : 0);
    for (int j = 0; j < columns / tile; ++j) {
      const int across = key0 / tile + j;
      body(across < stored ? static_cast<int>((before + across) * tile) : behind_probs);
    }
  }
}
// To shared memory, zeros where nothing is stored.
__device__ __forceinline__ void load_probs_tiles(const CUtensorMap& map, BarrierWord* barrier, char* to, const Shape& s,
                                                 int row, int query0, int key0, int rows, int columns) {
  for_probs_tiles(s, row, query0, key0, rows, columns, [&](int token) {
    cute::SM90_TMA_LOAD_2D::copy(&map, barrier, static_cast<std::uint64_t>(Keep::first), to, 0, token);
    to += attention::probs_tile * panel_row_bytes;
  });
}

// The keys of a block that nobody may see (padding, NaN or not) become zeros, so that 0 * NaN reaches no gradient. By the
// consumers together.
template <int D, int keys>
__device__ __forceinline__ void clear_unseen_keys(char* k, int key0, int begin, int end, int thread) {
  if (key0 >= begin && key0 + keys <= end) return;
  constexpr int chunks = D / 8;
  for (int i = thread; i < keys * chunks; i += 32 * consumer_warps) {
    const int row = i / chunks, chunk = i % chunks, key = key0 + row;
    if (key < begin || key >= end)
      *reinterpret_cast<uint4*>(k + (chunk / 8 * keys + row) * panel_row_bytes + chunk % 8 * 16) = make_uint4(0, 0, 0, 0);
  }
  fence_async();
  cutlass::arch::NamedBarrier::sync(32 * consumer_warps, 1);
}

// P^T or dS^T [64 keys x queries] of a warpgroup: accumulators, rounded, as the A operand of a product over the queries.
template <class T, int queries>
__device__ __forceinline__ void round_operand(std::uint32_t (&a)[queries / 16][4], const float* x) {
#pragma unroll
  for (int i = 0; i < queries / 4; ++i) a[i / 4][i % 4] = cuda::pack<T>(x[2 * i], x[2 * i + 1]);
}

// This lane's place in tiles [64 queries x 64 keys], for the 8 x 8 blocks of 16 keys x 16 queries that stmatrix
// transposes; the next 16 queries stand 16 rows on.
__device__ __forceinline__ std::uint32_t transposed_place(int warp) {
  const int lane = threadIdx.x % 32, row = lane % 8 + (lane & 16) / 2, chunk = 2 * warp + (lane & 8) / 8;
  return static_cast<std::uint32_t>(row * panel_row_bytes + ((chunk ^ (lane % 8)) * 16));
}
template <int queries>
__device__ __forceinline__ void store_transposed(std::uint32_t place, int tile_step,
                                                 const std::uint32_t (&a)[queries / 16][4]) {
#pragma unroll
  for (int j = 0; j < queries / 16; ++j) {
    const std::uint32_t to = place + j / 4 * tile_step + j % 4 * 16 * panel_row_bytes;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a[j][0]), "r"(a[j][1]),
                 "r"(a[j][2]), "r"(a[j][3])
                 : "memory");
  }
}

// The operand from block k of 16 of its depth on.
template <bool transposed>
__device__ __forceinline__ SharedOperand<transposed> block_of(SharedOperand<transposed> operand, int k) {
  operand.low = static_cast<std::uint32_t>(operand.at(k));
  return operand;
}

// The same of what stands there: P of a warp's 16 keys, transposed, as the A operand.
template <int queries>
__device__ __forceinline__ void load_transposed(std::uint32_t (&a)[queries / 16][4], std::uint32_t place, int tile_step) {
#pragma unroll
  for (int j = 0; j < queries / 16; ++j) {
    const std::uint32_t from = place + j / 4 * tile_step + j % 4 * 16 * panel_row_bytes;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[j][0]), "=r"(a[j][1]), "=r"(a[j][2]), "=r"(a[j][3])
                 : "r"(from)
                 : "memory");
  }
}

// Before the exponential: scores of which it makes zeros, where a query does not see a key. S^T is [64 keys x queries], a
// thread's rows are keys from key0 on. (Queries behind the last one have an infinite lse.)
template <int queries>
__device__ __forceinline__ void hide_unseen(float (&s)[queries / 2], bool negative, const Visibility& seen, int key0,
                                            int query0, int last_query) {
  const int lane = threadIdx.x % 32, query = query0 + 2 * (lane % 4);
  const float unseen = negative ? INFINITY : -INFINITY;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int key = key0 + lane / 4 + 8 * i;
    // Causal: the key is seen from this query on.
    const int from = (key >= seen.length ? query0 + queries : seen.causal ? key - seen.offset : query0) - query;
#pragma unroll
    for (int n = 0; n < queries / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (8 * n + e < from) s[4 * n + 2 * i + e] = unseen;
  }
  if (seen.first_key == nullptr) return;
#pragma unroll
  for (int n = 0; n < queries / 8; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int begin = seen.begin(min(query + 8 * n + e, last_query));
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (key0 + lane / 4 + 8 * i < begin) s[4 * n + 2 * i + e] = unseen;
    }
}

// P^T = exp(S^T - lse) in place. lse(n), in units of log2 and infinite where a query sees nothing, is that of queries
// 8 n + 2 (lane % 4) and the next.
template <int queries, class Lse>
__device__ __forceinline__ void exponentiate(float* s, float scale_log2, Lse&& lse) {
#pragma unroll
  for (int n = 0; n < queries / 8; ++n) {
    const float2 shift = lse(n);
#pragma unroll
    for (int i = 0; i < 4; ++i) s[4 * n + i] = exp2_approx(fmaf(s[4 * n + i], scale_log2, -(i % 2 == 0 ? shift.x : shift.y)));
  }
}

// dS^T = P^T * (dP^T - delta), with P as it was rounded. delta is that of queries 2 (lane % 4) and on. Masked: some P are zeros
// since nobody sees those values, which may be NaN.
template <class T, int queries>
__device__ __forceinline__ void differentiate_scores(std::uint32_t (&ds)[queries / 16][4],
                                                     const std::uint32_t (&pa)[queries / 16][4], float (&dp)[queries / 2],
                                                     const float* delta, bool masked) {
  if (masked) {
#pragma unroll
    for (int i = 0; i < queries / 4; ++i) {
      const float2 probs = widen<T>(pa[i / 4][i % 4]);
      if (probs.x == 0.0f) dp[2 * i] = 0.0f;
      if (probs.y == 0.0f) dp[2 * i + 1] = 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < queries / 4; ++i) {
    const float2 probs = widen<T>(pa[i / 4][i % 4]), shift = *reinterpret_cast<const float2*>(delta + 8 * (i / 2));
    ds[i / 4][i % 4] = cuda::pack<T>(probs.x * (dp[2 * i] - shift.x), probs.y * (dp[2 * i + 1] - shift.y));
  }
}

// Panels of `columns` columns of a warp's 16 keys, on their way by TMA once the warp has stored them.
template <int D, int columns>
__device__ __forceinline__ void send_panels(const CUtensorMap& map, char* rows, int panel_bytes, int key, int head, int batch) {
  fence_async();
  __syncwarp();
  if (threadIdx.x % 32 != 0) return;
#pragma unroll
  for (int panel = 0; panel < D / columns; ++panel)
    cute::SM90_TMA_STORE_4D::copy(&map, rows + panel * panel_bytes, panel * columns, key, head, batch);
  cute::tma_store_arrive();
}

// dk or dv of a warp's 16 keys in the inputs' dtype, by TMA from `rows` of panels that nobody reads any more. Before the block
// ends, cute::tma_store_wait.
template <class T, int D>
__device__ __forceinline__ void send_keys(const CUtensorMap& map, char* rows, int panel_bytes, const float (&x)[D / 2],
                                          float scale, int key, int head, int batch) {
  const int lane = threadIdx.x % 32, row = lane % 16, across = lane / 16;
  const std::uint32_t to = shared_address(rows) + row * panel_row_bytes;
#pragma unroll
  for (int j = 0; j < D / 16; ++j) {
    std::uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = cuda::pack<T>(x[8 * j + 2 * i] * scale, x[8 * j + 2 * i + 1] * scale);
    const std::uint32_t at = to + j / 4 * panel_bytes + ((2 * (j % 4) + across) ^ (row % 8)) * 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a[0]), "r"(a[1]), "r"(a[2]),
                 "r"(a[3])
                 : "memory");
  }
  send_panels<D, panel_columns>(map, rows, panel_bytes, key, head, batch);
}

// dk or dv of a warp's 16 keys, scaled, through panels of 32 columns of float32 in the 128-byte swizzle, of which `rows` are
// this warp's: `adds` what TMA has brought there, and `stores` the sum there, for TMA.
template <int D>
__device__ __forceinline__ void pass_sums(char* rows, int panel_bytes, float (&x)[D / 2], float scale, bool adds, bool stores) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < D / 8; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4 + 8 * i, chunk = 2 * (n % 4) + lane % 4 / 2;
      float2* const at = reinterpret_cast<float2*>(rows + n / 4 * panel_bytes + row * panel_row_bytes +
                                                   ((chunk ^ (row % 8)) * 16 + lane % 2 * 8));
      float &low = x[4 * n + 2 * i], &high = x[4 * n + 2 * i + 1];
      const float2 before = adds ? *at : make_float2(0.0f, 0.0f);
      low = fmaf(low, scale, before.x), high = fmaf(high, scale, before.y);
      if (stores) *at = make_float2(low, high);
    }
}

// dk or dv of a warp's 16 keys, in the inputs' dtype or in float32.
template <class T, int D>
__device__ __forceinline__ void store_keys(const Tensor4& to, bool in_float, int batch, int head, int key0, int keys,
                                           float (&x)[D / 2], float scale) {
  const int lane = threadIdx.x % 32, key = key0 + lane / 4;
  if (!in_float) {
    const float factor[2] = {scale, scale};
    store_rows<T, D>(to, batch, head, key, keys, 0, x, factor);
    return;
  }
  // Neighbouring lanes exchange their parts of two blocks of 8 columns, so that each has 4 neighbouring columns of one of them.
  const bool odd = lane & 1;
  const int column = odd ? 8 + 2 * (lane % 4 - 1) : 2 * (lane % 4);
  const auto four = [&](int n, int i, int j) -> float& { return x[4 * (n + j / 2) + 2 * i + j % 2]; };
#pragma unroll
  for (int n = 0; n < D / 8; n += 2)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float &low = four(n, i, e), &high = four(n, i, 2 + e);
        const float got = __shfl_xor_sync(~0u, odd ? low : high, 1);
        (odd ? low : high) = got;
        low *= scale, high *= scale;
      }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (key + 8 * i >= keys) continue;
    float* const row = attention::row_of<float>(to, batch, head, key + 8 * i) + column;
#pragma unroll
    for (int n = 0; n < D / 8; n += 2)
      *reinterpret_cast<float4*>(row + 8 * n) = make_float4(four(n, i, 0), four(n, i, 1), four(n, i, 2), four(n, i, 3));
  }
}

}  // namespace effcore::cuda::hopper
