// Forward of attention on sm_90a, of an owner that keeps P, and of a consumer layer that recomputes P from the owner's
// log-sum-exp (formulas: ../forward.cuh).
//
// Bound: 4 * D FLOPs an element of S on the tensor cores (4096 a cycle and multiprocessor), one exponential (16 a cycle). At D
// = 64 the two take equally long, so they must overlap; at D = 128 the tensor cores bound.
//
// A block has a producer warp, which fills rings of K and V tiles by TMA, and warpgroups of 64 queries each. While a warpgroup
// takes the exponentials of a tile's scores, the tensor cores work on its own previous P V and on the other warpgroups'
// products, which take turns.
//
// Keeping P: its normalisation is known only behind the last tile, so a second pass over K in the same block multiplies Q K^T
// once more and writes 2^(scale_log2 S - lse) as it is. That costs 2 * D of 4 * D FLOPs again, and is hidden behind the write
// (2 bytes an element: 0.15 cycles of the multiprocessor's share of 3 TB/s, where the product takes 0.06 at D = 128) as far as
// other blocks are in their first pass meanwhile. The alternative, unnormalised tiles with the maximum of their time, writes no
// less and makes every reader rescale: n consumers' forwards and the backward, which reads P twice.
//
// Shared memory: Q [warpgroups][64 x D], K [stages][keys x D], V [stages][keys x D] in panels (wgmma.cuh), barriers. Tiles of
// keys are taken from the last that the block sees to the first.
#pragma once
#include "attention/hopper/softmax.cuh"
#include "attention/hopper/tiles.cuh"

namespace effcore::cuda::hopper {

struct TiledForwardParams {
  attention::ForwardParams args;
  void* probs;          // written where they are kept
  CUtensorMap q, k, v;  // boxes of 64 queries, of `keys` keys
};

enum class Forward { owner, owner_keeping_probs, from_lse };

// Three warpgroups with 160 registers a thread, which hold S, P and O up to D = 128 with 64 keys; two with 240 at D = 256. On
// an H100 at D = 128, two warpgroups with 128 keys gain 3 % at 16384 tokens and lose 7 % at 2048; 96 keys spill. At D = 64 with
// three: 96 keys lose 2 %, four warpgroups with 64 keys 20 %, Q in registers 30 %, every eighth exponential on the FMA units
// gains nothing, and without taking turns 2 % are lost.
template <int D>
struct ForwardTiles {
  static constexpr int warpgroups = D == 256 ? 2 : 3, rows = 64 * warpgroups;
  static constexpr int keys = D == 64 ? 128 : 64;
  static constexpr int stages = D == 256 ? 2 : 4;
  static constexpr int threads = 128 * (warpgroups + 1);
  static constexpr int consumer_registers = warpgroups == 2 ? 240 : 160, producer_registers = warpgroups == 2 ? 24 : 32;
};

template <class T, int D>
struct ForwardShared {
  using Tiles = ForwardTiles<D>;
  T q[Tiles::warpgroups][64 * D];
  T k[Tiles::stages][Tiles::keys * D];
  T v[Tiles::stages][Tiles::keys * D];
  BarrierWord q_full[Tiles::warpgroups];
  Ring<Tiles::stages> k_ring, v_ring;
};

template <class T, int D, Forward forward>
__device__ __forceinline__ void produce_forward(ForwardShared<T, D>& shared, const TiledForwardParams& p, const Work& work) {
  using Tiles = ForwardTiles<D>;
  constexpr int keys = Tiles::keys;
  const Shape& s = p.args.shape;
  const int batch = work.head / s.heads, head = work.head % s.heads, kv_head = head / s.group;
  const int row0 = work.block * Tiles::rows;
  const bool leader = threadIdx.x == 0;
  const Visibility seen(s, batch);
  const TileRange tiles(KeyRange(seen, row0, min(row0 + Tiles::rows, s.queries) - 1), keys);
  const ValueLoader<T, D, keys, Tiles::stages> values(p.v, p.args.v, seen, batch, kv_head);
  Turn<Tiles::stages> k_turn, v_turn;
  if (leader) {
    for (int w = 0; w < Tiles::warpgroups; ++w) {
      Barrier::arrive_and_expect_tx(&shared.q_full[w], 64 * D * sizeof(T));
      load_panels<D, 64>(shared.q[w], p.q, &shared.q_full[w], Keep::first, row0 + 64 * w, head, batch);
    }
  }
  const auto load_k = [&](int tile) {
    if (leader) {
      shared.k_ring.wait_empty(k_turn);
      shared.k_ring.expect(k_turn, keys * D * sizeof(T));
      load_panels<D, keys>(shared.k[k_turn.stage], p.k, &shared.k_ring.full[k_turn.stage], Keep::last, tile * keys, kv_head,
                           batch);
    }
    k_turn.next();
  };
  const auto load_v = [&](int tile) {
    if (leader) shared.v_ring.wait_empty(v_turn);
    __syncwarp();
    if (leader && !values.by_hand(tile)) shared.v_ring.expect(v_turn, values.bytes);
    values.load(shared.v[v_turn.stage], &shared.v_ring.full[v_turn.stage], tile);
    if (leader && values.by_hand(tile)) Barrier::arrive(&shared.v_ring.full[v_turn.stage]);
    v_turn.next();
  };
  for (int tile = tiles.end - 1; tile >= tiles.first; --tile) {
    load_k(tile);
    if (tile < tiles.end - 1) load_v(tile + 1);  // K runs a tile ahead of V, as its readers do
  }
  if (tiles.first < tiles.end) load_v(tiles.first);
  if constexpr (forward == Forward::owner_keeping_probs)
    for (int tile = tiles.end - 1; tile >= tiles.first; --tile) load_k(tile);
}

template <class T, int D, Forward forward>
__device__ __forceinline__ void consume_forward(ForwardShared<T, D>& shared, const TiledForwardParams& p, const Work& work,
                                                int warpgroup) {
  using Tiles = ForwardTiles<D>;
  constexpr int keys = Tiles::keys;
  constexpr bool known_lse = forward == Forward::from_lse;
  const Shape& s = p.args.shape;
  const int batch = work.head / s.heads, head = work.head % s.heads;
  const int block0 = work.block * Tiles::rows, row0 = block0 + 64 * warpgroup, last_row = min(row0 + 64, s.queries) - 1;
  const int lane = threadIdx.x % 32, row = row0 + threadIdx.x % 128 / 32 * 16 + lane / 4;  // the thread's: row and row + 8
  const Visibility seen(s, batch);
  const TileRange tiles(KeyRange(seen, block0, min(block0 + Tiles::rows, s.queries) - 1), keys);
  // Of those, this warpgroup's own.
  int first = tiles.first, end = tiles.first;
  if (row0 < s.queries) {
    const TileRange own(KeyRange(seen, row0, last_row), keys);
    if (own.first < own.end) first = own.first, end = own.end;
  }
  float* const lse = p.args.lse + static_cast<std::int64_t>(work.head) * s.queries;
  Turn<Tiles::stages> k_turn, v_turn;
  Order<Tiles::warpgroups> order(warpgroup);

  float out[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
  Softmax<known_lse> softmax(s.scale_log2);
  if constexpr (known_lse) softmax.start(lse, row, s.queries);

  Barrier::wait(&shared.q_full[warpgroup], 0);
  const SharedOperand<false> q(shared_address(shared.q[warpgroup]), 64);
  float score[keys / 2];
  std::uint32_t probs[keys / 16][4];
  const auto start_scores = [&] {
    shared.k_ring.wait_full(k_turn);
    order.wait();
    pin(score);
    wgmma_begin();
    multiply<T, keys, D / 16>(score, q, SharedOperand<false>(shared_address(shared.k[k_turn.stage]), keys), false);
    wgmma_commit();
  };
  const auto start_values = [&] {
    shared.v_ring.wait_full(v_turn);
    pin(out);
    wgmma_begin();
    multiply<T, D, keys / 16>(out, probs, SharedOperand<true>(shared_address(shared.v[v_turn.stage]), keys), true);
    wgmma_commit();
  };
  const auto release_k = [&] {
    if (lane == 0) shared.k_ring.release(k_turn);
    k_turn.next();
  };
  const auto release_v = [&] {
    if (lane == 0) shared.v_ring.release(v_turn);
    v_turn.next();
  };
  const auto pass = [&](int from, int to) {  // tiles that only other warpgroups of the block see
    for (int tile = from; tile > to; --tile) {
      order.wait();
      order.pass_on();
      shared.k_ring.wait_full(k_turn), shared.v_ring.wait_full(v_turn);
      release_k(), release_v();
    }
  };
  const auto mask_scores = [&](int tile) {
    if (s.negative) {
#pragma unroll
      for (int i = 0; i < keys / 2; ++i) score[i] = -score[i];
    }
    const int key0 = tile * keys;
    if (key0 + keys > seen.end(row0) || key0 < seen.begin(last_row)) mask(score, seen, row, s.queries, key0);
  };
  pass(tiles.end, end);
  if (first < end) {
    start_scores();
    order.pass_on();
    wgmma_wait<0>();
    pin(score);
    release_k();
    mask_scores(end - 1);
    softmax.probabilities(score);
    pack<T>(probs, score);
    for (int tile = end - 2; tile >= first; --tile) {
      start_scores();
      start_values();
      order.pass_on();
      wgmma_wait<1>();
      pin(score);
      release_k();
      mask_scores(tile);
      softmax.probabilities(score);
      wgmma_wait<0>();
      pin(out);
      release_v();
      softmax.rescale(out);
      pack<T>(probs, score);
    }
    start_values();
    wgmma_wait<0>();
    pin(out);
    release_v();
  }
  pass(first, tiles.first);

  float factor[2] = {1.0f, 1.0f};
  if constexpr (!known_lse) softmax.finish(factor, lse, row, s.queries);
  store_rows<T, D>(p.args.out, batch, head, row, s, out, factor);

  if constexpr (forward == Forward::owner_keeping_probs) {
    using attention::probs_tile;
    const int strip = row0 / probs_tile;
    const int stored = row0 < s.queries ? attention::probs_tiles(s, strip) * probs_tile : 0;  // keys
    T* const kept = static_cast<T*>(p.probs) + work.head * attention::probs_elements_of(s) +
                    attention::probs_tiles_before(s, strip) * (probs_tile * probs_tile) + (row - row0) * probs_tile;
    Softmax<true> normalised = softmax.normalised();
    for (int tile = max(tiles.end, (stored + keys - 1) / keys) - 1; tile >= 0; --tile) {
      const bool loaded = tile >= tiles.first && tile < tiles.end, own = tile >= first && tile < end;
      if (loaded && !own) shared.k_ring.wait_full(k_turn);
      if (own) {
        shared.k_ring.wait_full(k_turn);
        pin(score);
        wgmma_begin();
        multiply<T, keys, D / 16>(score, q, SharedOperand<false>(shared_address(shared.k[k_turn.stage]), keys), false);
        wgmma_commit();
        wgmma_wait<0>();
        pin(score);
      }
      if (loaded) release_k();
      if (own) {
        mask_scores(tile);
        normalised.probabilities(score);
      } else {
#pragma unroll
        for (int i = 0; i < keys / 2; ++i) score[i] = 0.0f;
      }
      store_probs<T>(kept, score, tile * keys, stored);
    }
  }
}

template <class T, int D, Forward forward>
__global__ void __launch_bounds__(ForwardTiles<D>::threads, 1) forward_kernel(const __grid_constant__ TiledForwardParams p) {
  using Tiles = ForwardTiles<D>;
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<ForwardShared<T, D>*>(memory);
  if (threadIdx.x == 0) {
    for (auto& full : shared.q_full) Barrier::init(&full, 1);
    shared.k_ring.init(4 * Tiles::warpgroups);
    shared.v_ring.init(4 * Tiles::warpgroups);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  const bool causal = p.args.shape.causal;
  Work work(p.args.schedule, static_cast<int>(blockIdx.x), causal && forward != Forward::owner_keeping_probs);
  // Where P is kept, blocks of many and of few keys take turns: else all would multiply at one time, and write at another.
  if (causal && forward == Forward::owner_keeping_probs)
    work.block = work.block % 2 == 0 ? p.args.schedule.blocks - 1 - work.block / 2 : work.block / 2;
  const int warpgroup = static_cast<int>(threadIdx.x) / 128 - 1;
  if (warpgroup < 0) {
    cutlass::arch::warpgroup_reg_dealloc<Tiles::producer_registers>();
    if (threadIdx.x < 32) produce_forward<T, D, forward>(shared, p, work);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Tiles::consumer_registers>();
    consume_forward<T, D, forward>(shared, p, work, warpgroup);
  }
}

}  // namespace effcore::cuda::hopper
