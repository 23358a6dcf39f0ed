// Forward of attention on sm_90a, and of a consumer layer that recomputes P from the owner's log-sum-exp (formulas:
// ../forward.cuh).
//
// Bound: 4 * D FLOPs an element of S on the tensor cores (4096 a cycle and multiprocessor), one exponential (16 a cycle). At D
// = 64 the two take equally long, so they must overlap; at D = 128 the tensor cores bound.
//
// A block has a producer warp, which fills rings of K and V tiles by TMA, and warpgroups of 64 queries each. While a warpgroup
// takes the exponentials of a tile's scores, the tensor cores work on its own previous P V and on the other warpgroups'
// products, which take turns. A block stays on its multiprocessor and goes from one piece of work to the next; the producer
// runs ahead.
//
// Shared memory: Q [warpgroups][64 x D], K [stages][keys x D], V [stages][keys x D] in panels (wgmma.cuh), barriers. Tiles of
// keys are taken from the last that the block sees to the first.
#pragma once
#include "attention/hopper/pipeline.cuh"
#include "attention/hopper/softmax.cuh"
#include "attention/hopper/tensor_map.h"
#include "attention/hopper/wgmma.cuh"
#include "attention/visibility.cuh"

namespace effcore::cuda::hopper {

using attention::ForwardParams;
using attention::KeyRange;
using attention::Shape;
using attention::Visibility;
using attention::Work;

struct TiledForwardParams {
  ForwardParams args;
  CUtensorMap q, k, v;  // boxes of 64 queries, of `keys` keys
};

// D = 64: three warpgroups, since each alone would wait for its exponentials; 160 registers hold S, O and P.
// D = 128: S, O and P need 240 registers: two.
template <int Warpgroups, int Keys, int Stages, int CubicEvery = 0, bool QInRegisters = false, bool Ordered = true>
struct TileShape {
  static constexpr int warpgroups = Warpgroups, rows = 64 * Warpgroups, keys = Keys, stages = Stages;
  static constexpr int threads = 128 * (Warpgroups + 1);
  static constexpr int consumer_registers = Warpgroups == 2 ? 240 : Warpgroups == 3 ? 160 : 112;
  static constexpr int producer_registers = Warpgroups == 2 ? 24 : 32;
  static constexpr int cubic_every = CubicEvery;        // one exponential of so many runs on the FMA units; 0: none
  static constexpr bool q_in_registers = QInRegisters;  // or multiplied out of shared memory
  static constexpr bool ordered = Ordered;
};

template <class T, int D, class Tiles>
struct ForwardShared {
  T q[Tiles::warpgroups][64 * D];
  T k[Tiles::stages][Tiles::keys * D];
  T v[Tiles::stages][Tiles::keys * D];
  Ring<1> q_ring[Tiles::warpgroups];
  Ring<Tiles::stages> k_ring, v_ring;
};

// Copies a tile of `rows` tokens in panels of 64 columns.
template <int D, int rows, class T>
__device__ __forceinline__ void load_panels(T* to, const CUtensorMap& map, BarrierWord* full, Keep keep, int token, int head,
                                            int batch) {
#pragma unroll
  for (int panel = 0; panel < D / panel_columns; ++panel)
    cute::SM90_TMA_LOAD_4D::copy(&map, full, static_cast<std::uint64_t>(keep), to + panel * rows * panel_columns,
                                 panel * panel_columns, token, head, batch);
}

// The same by a warp's ordinary loads, with zeros in place of rows outside [low, high): values that no query may see, NaN or
// not, must not be multiplied, not even by P = 0.
template <int D, int rows, class T>
__device__ __forceinline__ void load_panels_between(T* to, const Matrix<T>& from, int token, int low, int high) {
  constexpr int chunks = D / 8;
  for (int i = threadIdx.x % 32; i < rows * chunks; i += 32) {
    const int row = i / chunks, chunk = i % chunks;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (token + row >= low && token + row < high && chunk * 8 < from.columns)
      x = *reinterpret_cast<const uint4*>(from.data + (token + row) * from.stride + chunk * 8);
    *reinterpret_cast<uint4*>(to + chunk / 8 * rows * panel_columns + row * panel_columns + (chunk % 8 ^ row % 8) * 8) = x;
  }
  fence_async();
  __syncwarp();
}

// The tiles of keys [first, end) that queries [row, last] see.
struct TileRange {
  int first, end;
  __device__ TileRange(const KeyRange& range, int keys)
      : first(range.begin / keys), end(range.empty() ? first : (range.end + keys - 1) / keys) {}
};

// Block b's pieces of work: every gridDim.x-th, back and forth, so that a block which got heavy pieces in one round gets light
// ones in the next.
struct WorkLoop {
  int round = 0;
  __device__ int number() const {
    const int blocks = gridDim.x, b = blockIdx.x;
    return round * blocks + (round % 2 == 0 ? b : blocks - 1 - b);
  }
  __device__ void next() { ++round; }
};

template <class T, int D, class Tiles>
__device__ __forceinline__ void produce_forward(ForwardShared<T, D, Tiles>& shared, const TiledForwardParams& p) {
  constexpr int keys = Tiles::keys, tile_bytes = keys * D * static_cast<int>(sizeof(T));
  const Shape& s = p.args.shape;
  const bool leader = threadIdx.x % 32 == 0;
  Turn<Tiles::stages> k_turn, v_turn;
  Turn<1> q_turn;
  const int works = s.queries == 0 ? 0 : p.args.schedule.blocks * p.args.schedule.heads;
  for (WorkLoop loop; loop.round * static_cast<int>(gridDim.x) < works; loop.next()) {
    if (loop.number() >= works) continue;
    const Work work(p.args.schedule, loop.number(), s.causal);
    const int batch = work.head / s.heads, head = work.head % s.heads, kv_head = head / s.group;
    const int row0 = work.block * Tiles::rows;
    const Visibility seen(s, batch);
    const TileRange tiles(KeyRange(seen, row0, min(row0 + Tiles::rows, s.queries) - 1), keys);
    const int low = seen.begin(0), high = seen.length;
    if (leader) {
      for (int w = 0; w < Tiles::warpgroups; ++w) {
        shared.q_ring[w].wait_empty(q_turn);
        shared.q_ring[w].expect(q_turn, 64 * D * sizeof(T));
        load_panels<D, 64>(shared.q[w], p.q, &shared.q_ring[w].full[0], Keep::first, row0 + 64 * w, head, batch);
      }
    }
    q_turn.next();
    const auto load_v = [&](int tile) {
      T* const to = shared.v[v_turn.stage];
      const int key0 = tile * keys;
      if (key0 >= low && (key0 + keys <= high || high == s.keys)) {
        if (leader) {
          shared.v_ring.wait_empty(v_turn);
          shared.v_ring.expect(v_turn, tile_bytes);
          load_panels<D, keys>(to, p.v, &shared.v_ring.full[v_turn.stage], Keep::last, key0, kv_head, batch);
        }
      } else {
        shared.v_ring.wait_empty(v_turn);
        load_panels_between<D, keys>(to, attention::matrix<T>(p.args.v, batch, kv_head), key0, low, high);
        if (leader) Barrier::arrive(&shared.v_ring.full[v_turn.stage]);
      }
      v_turn.next();
    };
    for (int tile = tiles.end - 1; tile >= tiles.first; --tile) {
      if (leader) {
        shared.k_ring.wait_empty(k_turn);
        shared.k_ring.expect(k_turn, tile_bytes);
        load_panels<D, keys>(shared.k[k_turn.stage], p.k, &shared.k_ring.full[k_turn.stage], Keep::last, tile * keys, kv_head,
                             batch);
      }
      k_turn.next();
      if (tile < tiles.end - 1) load_v(tile + 1);  // K runs a tile ahead of V, as its readers do
    }
    if (tiles.first < tiles.end) load_v(tiles.first);
  }
}

template <class T, int D, bool known_lse, class Tiles>
__device__ __forceinline__ void consume_forward(ForwardShared<T, D, Tiles>& shared, const TiledForwardParams& p, int warpgroup) {
  constexpr int keys = Tiles::keys;
  const Shape& s = p.args.shape;
  const int lane = threadIdx.x % 32, thread = threadIdx.x % 128, thread_row = thread / 32 * 16 + lane / 4;
  Turn<Tiles::stages> k_turn, v_turn;
  Turn<1> q_turn;
  Order<Tiles::warpgroups, Tiles::ordered> order(warpgroup);
  const SharedOperand<false> q(shared_address(shared.q[warpgroup]), 64);
  const int works = s.queries == 0 ? 0 : p.args.schedule.blocks * p.args.schedule.heads;
  for (WorkLoop loop; loop.round * static_cast<int>(gridDim.x) < works; loop.next()) {
    if (loop.number() >= works) continue;
    const Work work(p.args.schedule, loop.number(), s.causal);
    const int batch = work.head / s.heads, head = work.head % s.heads;
    const int block0 = work.block * Tiles::rows, row0 = block0 + 64 * warpgroup, last_row = min(row0 + 64, s.queries) - 1;
    const Visibility seen(s, batch);
    const TileRange tiles(KeyRange(seen, block0, min(block0 + Tiles::rows, s.queries) - 1), keys);
    // Of those, this warpgroup's own.
    int first = tiles.first, end = tiles.first;
    if (row0 < s.queries) {
      const TileRange own(KeyRange(seen, row0, last_row), keys);
      if (own.first < own.end) first = own.first, end = own.end;
    }
    float* const lse = p.args.lse + static_cast<std::int64_t>(work.head) * s.queries;

    float out[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
    Softmax<known_lse> softmax(s.scale_log2);
    if constexpr (known_lse) softmax.start(lse, row0 + thread_row, s.queries);

    shared.q_ring[warpgroup].wait_full(q_turn);
    std::uint32_t q_registers[Tiles::q_in_registers ? D / 16 : 1][4];
    if constexpr (Tiles::q_in_registers) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        const Operand<T> a =
            Tile<T, panel_columns>(shared.q[warpgroup] + k / 4 * 64 * panel_columns).a(thread / 32 * 16, k % 4 * 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) q_registers[k][i] = a.reg[i];
      }
    }
    const auto pass = [&](int from, int to) {  // tiles that other warpgroups of the block see
      for (int tile = from; tile > to; --tile) {
        order.wait();
        order.pass_on();
        shared.k_ring.wait_full(k_turn), shared.v_ring.wait_full(v_turn);
        if (lane == 0) shared.k_ring.release(k_turn), shared.v_ring.release(v_turn);
        k_turn.next(), v_turn.next();
      }
    };
    pass(tiles.end, end);

    float score[keys / 2];
    std::uint32_t probs[keys / 16][4];
    const auto start_scores = [&] {
      shared.k_ring.wait_full(k_turn);
      order.wait();
      pin(score);
      wgmma_begin();
      const SharedOperand<false> k(shared_address(shared.k[k_turn.stage]), keys);
      if constexpr (Tiles::q_in_registers)
        multiply<T, keys, D / 16>(score, q_registers, k, false);
      else
        multiply<T, keys, D / 16>(score, q, k, false);
      wgmma_commit();
    };
    const auto start_values = [&] {
      shared.v_ring.wait_full(v_turn);
      pin(out);
      wgmma_begin();
      multiply<T, D, keys / 16>(out, probs, SharedOperand<true>(shared_address(shared.v[v_turn.stage]), keys), true);
      wgmma_commit();
    };
    const auto scores_done = [&] {
      pin(score);
      if (lane == 0) shared.k_ring.release(k_turn);
      k_turn.next();
    };
    const auto values_done = [&] {
      pin(out);
      if (lane == 0) shared.v_ring.release(v_turn);
      v_turn.next();
    };
    const auto to_probs = [&](int tile) {
      if (s.negative) {
#pragma unroll
        for (int i = 0; i < keys / 2; ++i) score[i] = -score[i];
      }
      const int key0 = tile * keys;
      if (key0 + keys > seen.end(row0) || key0 < seen.begin(last_row)) {
        mask(score, seen, row0 + thread_row, s.queries, key0);
        softmax.template probabilities<0>(score);
      } else {
        softmax.template probabilities<Tiles::cubic_every>(score);
      }
    };

    if (first < end) {
      start_scores();
      order.pass_on();
      wgmma_wait<0>();
      scores_done();
      to_probs(end - 1);
      pack<T>(probs, score);
      for (int tile = end - 2; tile >= first; --tile) {
        start_scores();
        start_values();
        order.pass_on();
        wgmma_wait<1>();
        scores_done();
        to_probs(tile);
        wgmma_wait<0>();
        values_done();
        softmax.rescale(out);
        pack<T>(probs, score);
      }
      if (lane == 0) shared.q_ring[warpgroup].release(q_turn);
      start_values();
      wgmma_wait<0>();
      values_done();
    } else if (lane == 0) {
      shared.q_ring[warpgroup].release(q_turn);
    }
    q_turn.next();
    pass(first, tiles.first);

    float total[2] = {1.0f, 1.0f};
    if constexpr (!known_lse) softmax.finish(total, lse, row0 + thread_row, s.queries);
    store_rows<T, D>(p.args.out, batch, head, row0 + thread_row, s, out, total);
  }
}

template <class T, int D, bool known_lse, class Tiles>
__global__ void __launch_bounds__(Tiles::threads, 1) forward_kernel(const __grid_constant__ TiledForwardParams p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<ForwardShared<T, D, Tiles>*>(memory);
  if (threadIdx.x == 0) {
    for (auto& ring : shared.q_ring) ring.init(4);
    shared.k_ring.init(4 * Tiles::warpgroups);
    shared.v_ring.init(4 * Tiles::warpgroups);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128 - 1;
  if (warpgroup < 0) {
    cutlass::arch::warpgroup_reg_dealloc<Tiles::producer_registers>();
    if (threadIdx.x < 32) produce_forward<T, D, Tiles>(shared, p);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Tiles::consumer_registers>();
    consume_forward<T, D, known_lse, Tiles>(shared, p, warpgroup);
  }
}

}  // namespace effcore::cuda::hopper
