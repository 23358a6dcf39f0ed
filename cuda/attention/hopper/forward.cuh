// Forward of attention on sm_90a, of an owner that keeps P, and of a consumer layer that recomputes P from the owner's
// log-sum-exp (formulas: ../forward.cuh).
//
// Bound: 4 * D FLOPs an element of S on the tensor cores (4096 a cycle and multiprocessor), one exponential (16 a cycle). At D
// = 64 the two take equally long, so they must overlap; at D = 128 the tensor cores bound.
//
// A block has a producer warp, which fills rings of K and V tiles by TMA, and warpgroups of 64 queries each
// (forward_consumer.cuh). While a warpgroup takes the exponentials of a tile's scores, the tensor cores work on its own
// previous P V and on the other warpgroups' products, which take turns. Blocks stay and draw their next piece of work
// (work_queue.cuh): at D = 64 that gains 5 % at 2048 keys and 1-3 % from 4096 on.
//
// A row's exponentials are relative to the maximum of its first tile (softmax.cuh: AnchoredSoftmax). A running maximum costs
// every tile a reduction and the outputs a rescaling: 1.16-1.21 times the time. Where a later score leaves the range of that,
// the block's piece of work is taken down (Again), and a second launch does it again with a running maximum, or ends at once.
//
// Keeping P: tiles leave as they are made, relative to that maximum, and the factor 1 / sum of each row, as it was rounded,
// stands behind them; who reads P multiplies by it. Pieces out of range, and float16, whose range is small, keep P itself: the
// row's lse comes first, from a pass over K that multiplies Q K^T alone, and a consumer's forward behind it writes P. Two
// passes for all took 1.8 times a forward's time.
//
// Shared memory: Q [warpgroups][64 x D], K [stages][keys x D], V [stages][keys x D] in panels (wgmma.cuh), P on its way out,
// barriers. Tiles of keys are taken from the last that the block sees to the first.
#pragma once
#include "attention/hopper/kept_probs.cuh"
#include "attention/hopper/softmax.cuh"
#include "attention/hopper/tiles.cuh"
#include "attention/hopper/work_queue.cuh"

namespace effcore::cuda::hopper {

// Pieces of work to do again, by another kernel. In device memory, zeroed up to the numbers: a count, a mark for each piece,
// the numbers of those that are marked.
struct Again {
  int* memory = nullptr;
  int pieces = 0;

  static constexpr std::int64_t zeroed(std::int64_t pieces) { return 1 + pieces; }
  __device__ int count() const { return memory[0]; }
  __device__ int number(int i) const { return memory[1 + pieces + i]; }
  __device__ void take_down(int number) const {
    if (atomicExch(memory + 1 + number, 1) == 0) memory[1 + pieces + atomicAdd(memory, 1)] = number;
  }
};

struct TiledForwardParams {
  attention::ForwardParams args;
  int* ticket;          // the counter that work is drawn from, zeroed; null: one block a piece
  Again again;          // anchored: takes down the pieces that left its range; others: do these, if given, else all
  CUtensorMap q, k, v;  // boxes of 64 queries, of `keys` keys
  CUtensorMap probs;    // where they are kept: boxes of 16 rows
};

// How a row's exponentials are taken: relative to the maximum of its first tile (anchored), or to that of all tiles so far
// (online), or with its lse known from a pass before (normalised) or from the owner; and whether they are kept.
enum class Forward { anchored, anchored_kept, online, normalised_kept, from_lse };
constexpr bool keeps_probs(Forward forward) {
  return forward == Forward::anchored_kept || forward == Forward::normalised_kept;
}

// Three warpgroups with 160 registers a thread, which hold S, P and O at D = 64 with 128 keys; two with 232 above. At D = 128
// three with 64 keys take 8-17 % longer (H200, S = 2048 .. 16384). At D = 64 with three: 152 registers spill accumulators, and
// ptxas then serialises the products; 96 keys lose 2 %, four warpgroups with 64 keys 20 %, Q in registers 30 %, every eighth
// exponential on the FMA units gains nothing, and without taking turns 2 % are lost.
template <int D>
struct ForwardTiles {
  static constexpr int warpgroups = D == 64 ? 3 : 2, rows = 64 * warpgroups;
  static constexpr int keys = D == 256 ? 64 : 128;
  static constexpr int stages = D == 64 ? 4 : 2;
  static constexpr int kept_buffers = D == 64 ? 3 : D == 128 ? 4 : 2;
  static constexpr int threads = 128 * (warpgroups + 1);
  static constexpr int consumer_registers = warpgroups == 2 ? 232 : 160, producer_registers = warpgroups == 2 ? 40 : 32;
};

// Of a tile's blocks of 8 keys, those whose exponentials do not wait for the end of the product with the values of the tile
// before. H200: at D = 64 none is 1-5 % faster than any, at D = 128 a quarter 2-5 % faster than none or all; an owner that
// keeps P at D = 64 gains 1 % with half.
template <int D>
constexpr int early_blocks(Forward forward) {
  constexpr int all = ForwardTiles<D>::keys / 8;
  switch (forward) {
    case Forward::anchored:
    case Forward::from_lse: return D == 64 ? 0 : all / 4;
    case Forward::anchored_kept: return D == 64 ? all / 2 : 0;
    default: return all;
  }
}

// In how many parts P V of a tile follows that tile's exponentials, each as soon as its own are rounded, without turns; 0: P V
// is started together with the next tile's Q K^T. H200, from lse: at D = 64 four take 7-9 % less, and so do eight; turns cost
// 1-4 %, two parts 2-3 %, one 3-6 %; at D = 128 four take 3-9 % more. Anchored, with sums, they are slower at D = 64, too.
template <int D>
constexpr int value_parts(Forward forward) {
  return D == 64 && forward == Forward::from_lse ? 4 : 0;
}

template <class T, int D, Forward forward>
struct ForwardShared {
  using Tiles = ForwardTiles<D>;
  static constexpr int kept_elements = keeps_probs(forward) ? Tiles::kept_buffers * 16 * panel_columns : 8;
  T q[Tiles::warpgroups][64 * D];
  T k[Tiles::stages][Tiles::keys * D];
  T v[Tiles::stages][Tiles::keys * D];
  T kept[4 * Tiles::warpgroups][kept_elements];  // a warp's
  BarrierWord q_full[Tiles::warpgroups], q_empty[Tiles::warpgroups];
  Ring<Tiles::stages> k_ring, v_ring;
  WorkQueue queue;
};

// The producer warp.
template <class T, int D, Forward forward>
struct ForwardProducer {
  using Tiles = ForwardTiles<D>;
  static constexpr int keys = Tiles::keys;

  ForwardShared<T, D, forward>& shared;
  const TiledForwardParams& p;
  const bool leader = threadIdx.x == 0;
  Turn<Tiles::stages> k_turn, v_turn;
  Turn<1> q_turn;

  __device__ __forceinline__ void run(const Work& work) {
    const Shape& s = p.args.shape;
    const int batch = work.head / s.heads, head = work.head % s.heads, kv_head = head / s.group;
    const int row0 = work.block * Tiles::rows;
    const Visibility seen(s, batch);
    const TileRange tiles(KeyRange(seen, row0, min(row0 + Tiles::rows, s.queries) - 1), keys);
    const ValueLoader<T, D, keys> values(p.v, p.args.v, seen, batch, kv_head);
    const auto load_q = [&] {  // behind the first tile of K: the warpgroups give Q back late
      for (int w = 0; leader && w < Tiles::warpgroups; ++w) {
        Barrier::wait(&shared.q_empty[w], q_turn.phase ^ 1);
        Barrier::arrive_and_expect_tx(&shared.q_full[w], 64 * D * sizeof(T));
        load_panels<D, 64>(shared.q[w], p.q, &shared.q_full[w], Keep::first, row0 + 64 * w, head, batch);
      }
      q_turn.next();
    };
    constexpr bool two_passes = forward == Forward::normalised_kept;
    if (tiles.first >= tiles.end) return load_q();
    for (int tile = tiles.end - 1; two_passes && tile >= tiles.first; --tile) {
      load_k(tile, kv_head, batch);
      if (tile == tiles.end - 1) load_q();
    }
    for (int tile = tiles.end - 1; tile >= tiles.first; --tile) {
      load_k(tile, kv_head, batch);
      if (tile < tiles.end - 1)
        load_v(values, tile + 1);  // K runs a tile ahead of V, as its readers do
      else if (!two_passes)
        load_q();
    }
    load_v(values, tiles.first);
  }

  __device__ __forceinline__ void load_k(int tile, int kv_head, int batch) {
    if (leader) {
      shared.k_ring.wait_empty(k_turn);
      shared.k_ring.expect(k_turn, keys * D * sizeof(T));
      load_panels<D, keys>(shared.k[k_turn.stage], p.k, &shared.k_ring.full[k_turn.stage], Keep::last, tile * keys, kv_head,
                           batch);
    }
    k_turn.next();
  }

  __device__ __forceinline__ void load_v(const ValueLoader<T, D, keys>& values, int tile) {
    const bool by_hand = values.by_hand(tile);
    if (leader) {
      shared.v_ring.wait_empty(v_turn);
      if (!by_hand) shared.v_ring.expect(v_turn, values.bytes);
    }
    __syncwarp();
    values.load(shared.v[v_turn.stage], &shared.v_ring.full[v_turn.stage], tile);
    if (leader && by_hand) Barrier::arrive(&shared.v_ring.full[v_turn.stage]);
    v_turn.next();
  }
};

}  // namespace effcore::cuda::hopper
