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
// Keeping P: it must be normalised, so the row's lse comes first, from a pass over K that multiplies Q K^T alone; a second pass
// is a consumer's forward, which writes P as it multiplies P V. That costs 2 * D of 4 * D FLOPs and the exponentials again.
// Writing P, 2 bytes an element, takes longer than either (0.15 cycles of a multiprocessor's share of 3 TB/s, where an
// exponential takes 0.06 and all three products 0.19 at D = 128) and runs beside the second pass. A pass behind a complete
// forward was tried: nothing of the write is hidden, and the whole takes 1.27 times as long at D = 64, 1.09 at D = 128 (8192
// keys). The other alternative, unnormalised tiles with the maximum of their time, makes every reader rescale: n - 1 consumers'
// forwards, and the backward.
//
// Shared memory: Q [warpgroups][64 x D], K [stages][keys x D], V [stages][keys x D] in panels (wgmma.cuh), P on its way out,
// barriers. Tiles of keys are taken from the last that the block sees to the first.
#pragma once
#include "attention/hopper/kept_probs.cuh"
#include "attention/hopper/softmax.cuh"
#include "attention/hopper/tiles.cuh"
#include "attention/hopper/work_queue.cuh"

namespace effcore::cuda::hopper {

struct TiledForwardParams {
  attention::ForwardParams args;
  int* ticket;          // the counter that work is drawn from, zeroed; null: one block a piece
  CUtensorMap q, k, v;  // boxes of 64 queries, of `keys` keys
  CUtensorMap probs;    // where they are kept: boxes of 16 rows
};

enum class Forward { owner, owner_keeping_probs, from_lse };

// Three warpgroups with 160 registers a thread, which hold S, P and O at D = 64 with 128 keys; two with 232 above. At D = 128
// three with 64 keys take 8-17 % longer (H200, S = 2048 .. 16384). At D = 64 with three: 152 registers spill accumulators, and
// ptxas then serialises the products; 96 keys lose 2 %, four warpgroups with 64 keys 20 %, Q in registers 30 %, every eighth
// exponential on the FMA units gains nothing, and without taking turns 2 % are lost.
template <int D>
struct ForwardTiles {
  static constexpr int warpgroups = D == 64 ? 3 : 2, rows = 64 * warpgroups;
  static constexpr int keys = D == 256 ? 64 : 128;
  static constexpr int stages = D == 64 ? 4 : 2;
  static constexpr int threads = 128 * (warpgroups + 1);
  static constexpr int consumer_registers = warpgroups == 2 ? 232 : 160, producer_registers = warpgroups == 2 ? 40 : 32;
};

template <class T, int D, Forward forward>
struct ForwardShared {
  using Tiles = ForwardTiles<D>;
  static constexpr int kept_elements =
      forward == Forward::owner_keeping_probs ? KeptProbs<T>::buffers * KeptProbs<T>::elements : 8;
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
    constexpr bool two_passes = forward == Forward::owner_keeping_probs;
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
