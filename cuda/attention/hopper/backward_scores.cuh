// Gradient of a layer group's scores on sm_90a, for an owner whose dS goes through device memory:
//
//   dS = P * (dP - delta),   dP = sum_l dout_l v_l^T,   P read where it is kept, else exp(S - lse), stored like dS
//
// What follows are three products with a kept matrix: dq = scale dS k is a consumer's forward from probabilities
// (forward_probs.cuh), dk = scale dS^T q and dv = P^T dout_0 are a consumer's backward (backward_probs.cuh).
//
// Bound: layers products of 2 * queries * keys * D FLOPs (half causal), one more from lse; P is read or written and dS written
// once beside them. The owner in one kernel (backward.cuh) keeps dk and dv in registers, which leaves a block 64 x 128 of dP at
// D = 128: with values that do not stay in shared memory each FLOP costs three times as many bytes of L2 as here, and L2 is the
// bound.
//
// A cluster of two blocks owns 256 queries x 256 keys of dP, a warpgroup 64 x 256 of them, in registers; the depth, layers * D,
// streams through a ring in panels of 64: [128 x 64] of a block's dout, and [256 x 64] of v, of which each block fetches one
// half for both. P comes into tiles of shared memory while that goes on; dS takes its place there and leaves by TMA. Blocks
// stay and take piece after piece, so that the next one's panels arrive while dS is made.
//
// By ncu (H200, D = 128, 4096 keys, four layers): L2 65 % busy, the tensor cores 57 %.
#pragma once
#include <cute/arch/cluster_sm90.hpp>

#include "attention/hopper/backward_tiles.cuh"

namespace effcore::cuda::hopper {

struct ScoresTiles {
  static constexpr int cluster = 2, warpgroups = consumer_warps / 4, queries = 64 * warpgroups, keys = 256, stages = 3;
  static constexpr int cluster_queries = cluster * queries;
  using Registers = hopper::Registers<40, 232>;
  static constexpr int tile_bytes = 64 * panel_row_bytes,
                       probs_bytes = queries * keys * 2;  // P: [warpgroup][keys / 64][64 x 64]
  static constexpr int dout_bytes = queries * panel_row_bytes, v_bytes = keys * panel_row_bytes;
  static constexpr int dout_at = probs_bytes, v_at = dout_at + stages * dout_bytes, control_at = v_at + stages * v_bytes;
  static constexpr int shared_bytes = control_at + 256;
  static_assert(shared_bytes <= shared_limit);
};

struct ScoresParams {
  Shape shape;
  const float *lse, *delta, *factors;  // factors: of P where it is read
  int layers, panels;                  // panels: of a layer
  CUtensorMap q, k, probs, ds, dout[max_layers], v[max_layers];
};

// A cluster's piece. `row` counts heads of the whole batch.
struct ScoresPiece {
  int row, query0, key0;
  bool masked;  // some keys are not seen by all of the queries
};

struct ScoresControl {
  Ring<ScoresTiles::stages> ring;
  // The tiles of P and dS: have been written, by the warpgroup; are there, or free, for the warpgroup.
  BarrierWord handed[ScoresTiles::warpgroups], yours[ScoresTiles::warpgroups];
  ScoresPiece piece[ScoresTiles::stages];
  bool more[ScoresTiles::stages];
};

// Every `clusters`-th of the pieces that are stored, from number `cluster` on, without those in which nobody sees anything:
// what multiplies with dS does not read these.
class ScoresWalk {
 public:
  __device__ ScoresWalk(const Shape& s, int cluster, int clusters)
      : shape_(s),
        clusters_(clusters),
        strips_((s.queries + attention::probs_tile - 1) / attention::probs_tile),
        across_(cluster - clusters) {}

  __device__ bool next(ScoresPiece& piece) {
    constexpr int rows = ScoresTiles::cluster_queries, columns = ScoresTiles::keys;
    for (;;) {
      across_ += clusters_;
      for (int count = stored(); across_ >= count; count = stored()) {
        across_ -= count;
        if (++block_ * (rows / attention::probs_tile) >= strips_) {
          block_ = 0;
          if (++row_ == shape_.batch * shape_.heads) return false;
        }
      }
      const int query0 = block_ * rows, last = min(query0 + rows, shape_.queries) - 1, key0 = across_ * columns;
      const Visibility seen(shape_, row_ / shape_.heads);
      const attention::KeyRange range(seen, query0, last);
      if (range.empty() || range.begin >= key0 + columns || range.end <= key0) continue;
      piece = {row_, query0, key0, key0 + columns > seen.end(query0) || key0 < seen.begin(last)};
      return true;
    }
  }

 private:
  __device__ int stored() const {
    constexpr int rows = ScoresTiles::cluster_queries / attention::probs_tile,
                  columns = ScoresTiles::keys / attention::probs_tile;
    return (attention::probs_tiles(shape_, min((block_ + 1) * rows, strips_) - 1) + columns - 1) / columns;
  }

  const Shape& shape_;
  int clusters_, strips_, across_, block_ = 0, row_ = 0;
};

// One thread: panels of q and k, where P is made, and of dout and v.
template <bool from_probs>
__device__ __forceinline__ void scores_produce(const ScoresParams& p, char* shared, ScoresControl& control, ScoresWalk walk,
                                               int block) {
  using Tiles = ScoresTiles;
  const Shape& s = p.shape;
  Turn<Tiles::stages> turn;
  ScoresPiece piece, next;
  for (bool more = walk.next(piece); more; piece = next) {
    const int batch = piece.row / s.heads, head = piece.row % s.heads, kv_head = head / s.group;
    const auto load = [&](const CUtensorMap& of_queries, const CUtensorMap& of_keys) {
      for (int panel = 0; panel < p.panels; ++panel, turn.next()) {
        control.ring.wait_empty(turn);
        control.piece[turn.stage] = piece;
        control.more[turn.stage] = true;
        control.ring.expect(turn, Tiles::dout_bytes + Tiles::v_bytes);
        BarrierWord* const full = &control.ring.full[turn.stage];
        cute::SM90_TMA_LOAD_4D::copy(&of_queries, full, static_cast<std::uint64_t>(Keep::last),
                                     shared + Tiles::dout_at + turn.stage * Tiles::dout_bytes, panel * panel_columns,
                                     piece.query0 + block * Tiles::queries, head, batch);
        cute::SM90_TMA_LOAD_MULTICAST_4D::copy(&of_keys, full, (1 << Tiles::cluster) - 1,
                                               static_cast<std::uint64_t>(Keep::last),
                                               shared + Tiles::v_at + turn.stage * Tiles::v_bytes + block * Tiles::v_bytes / 2,
                                               panel * panel_columns, piece.key0 + block * Tiles::keys / 2, kv_head, batch);
      }
    };
    if constexpr (!from_probs) load(p.q, p.k);
    for (int layer = 0; layer < p.layers; ++layer) {
      load(p.dout[layer], p.v[layer]);
      if (layer == min(1, p.layers - 1)) more = walk.next(next);  // while the ring is full
    }
  }
  control.ring.wait_empty(turn);
  control.more[turn.stage] = false;
  Barrier::arrive(&control.ring.full[turn.stage]);
}

// One thread a warpgroup: brings its tiles of P and takes dS away; where P is made, takes that away too.
template <bool from_probs>
__device__ __forceinline__ void scores_carry(const ScoresParams& p, char* shared, ScoresControl& control, ScoresWalk walk,
                                             int block, int warpgroup) {
  using Tiles = ScoresTiles;
  constexpr int tile = attention::probs_tile, across = Tiles::keys / tile, bytes = Tiles::probs_bytes / Tiles::warpgroups;
  const Shape& s = p.shape;
  char* const tiles = shared + warpgroup * bytes;
  const std::int64_t head_tiles = attention::probs_elements_of(s) / (tile * tile);
  const auto query0 = [&](const ScoresPiece& piece) { return piece.query0 + block * Tiles::queries + 64 * warpgroup; };
  // Calls body(i, row of the kept tensor) for those of the piece's tiles that are stored.
  const auto for_stored = [&](const ScoresPiece& piece, auto&& body) {
    const int strip = query0(piece) / tile, tile0 = piece.key0 / tile;
    const int stored = query0(piece) < s.queries ? attention::probs_tiles(s, strip) : 0;
    if (tile0 >= stored) return;
    const std::int64_t before = piece.row * head_tiles + attention::probs_tiles_before(s, strip) + tile0;
    for (int i = 0; i < across && tile0 + i < stored; ++i) body(i, static_cast<int>((before + i) * tile));
  };
  const auto bring = [&](const ScoresPiece& piece) {
    Barrier::arrive_and_expect_tx(&control.yours[warpgroup], bytes);
    load_probs_tiles(p.probs, &control.yours[warpgroup], tiles, s, piece.row, query0(piece), piece.key0, 64, Tiles::keys);
  };
  std::uint32_t phase = 0;
  const auto take = [&](const CUtensorMap& map, const ScoresPiece& piece) {
    Barrier::wait(&control.handed[warpgroup], phase);
    phase ^= 1;
    for_stored(piece, [&](int i, int row) { cute::SM90_TMA_STORE_2D::copy(&map, tiles + i * Tiles::tile_bytes, 0, row); });
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();  // it has been read
  };

  ScoresPiece piece, next;
  bool more = walk.next(piece);
  if constexpr (from_probs) {
    if (more) bring(piece);
    while (more) {
      more = walk.next(next);
      if (more) for_stored(next, [&](int, int row) { cute::SM90_TMA_LOAD_2D::PREFETCH::copy(&p.probs, 0, row); });
      take(p.ds, piece);
      piece = next;
      if (more) bring(piece);
    }
  } else {
    Barrier::arrive(&control.yours[warpgroup]);
    for (; more; more = walk.next(piece)) {
      take(p.probs, piece);
      Barrier::arrive(&control.yours[warpgroup]);
      take(p.ds, piece);
      Barrier::arrive(&control.yours[warpgroup]);
    }
  }
}

// One warpgroup: 64 queries x 256 keys.
template <class T, bool from_probs>
__device__ __forceinline__ void scores_consume(const ScoresParams& p, char* shared, ScoresControl& control, int block) {
  using Tiles = ScoresTiles;
  constexpr int blocks = Tiles::keys / 16;  // of 16 keys
  constexpr float log2e = 1.4426950408889634f;
  const Shape& s = p.shape;
  const int thread = threadIdx.x - helper_threads, warp = thread / 32 % 4, lane = threadIdx.x % 32;
  const int warpgroup = uniform(thread / 128);
  const std::uint32_t base = shared_address(shared);
  const std::uint32_t dout_at = base + Tiles::dout_at + warpgroup * 64 * panel_row_bytes, v_at = base + Tiles::v_at;
  // The warp's 16 rows of P; the row and chunk that the lane addresses for ldmatrix and stmatrix.
  const int rows_at = warpgroup * (Tiles::probs_bytes / Tiles::warpgroups) + 16 * warp * panel_row_bytes;
  const int place = lane % 16, across = lane / 16;
  const auto address = [&](int j) {
    return base + rows_at + j / 4 * Tiles::tile_bytes + place * panel_row_bytes + ((2 * (j % 4) + across) ^ (place % 8)) * 16;
  };

  float x[Tiles::keys / 2];
  Turn<Tiles::stages> turn;
  const auto multiply_panels = [&](int steps) {
    int before = 0;
    const auto release = [&] {
      if (lane < Tiles::cluster) Barrier::arrive(&control.ring.empty[before], static_cast<std::uint32_t>(lane), 1);
    };
    pin(x);
    for (int step = 0; step < steps; ++step, turn.next()) {
      control.ring.wait_full(turn);
      wgmma_begin();
      multiply<T, Tiles::keys, 4>(x, SharedOperand<false>(dout_at + turn.stage * Tiles::dout_bytes, Tiles::queries),
                                  SharedOperand<false>(v_at + turn.stage * Tiles::v_bytes, Tiles::keys), step > 0);
      wgmma_commit();
      if (step > 0) {
        wgmma_wait<1>();
        release();
      }
      before = turn.stage;
    }
    wgmma_wait<0>();
    pin(x);
    release();
  };
  std::uint32_t phase = 0;
  const auto wait_for_tiles = [&] {
    Barrier::wait(&control.yours[warpgroup], phase);
    phase ^= 1;
  };
  const auto store_tile = [&](int j, const std::uint32_t (&tile)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address(j)), "r"(tile[0]),
                 "r"(tile[1]), "r"(tile[2]), "r"(tile[3])
                 : "memory");
  };
  const auto hand_over = [&] {
    fence_async();
    __syncwarp();
    if (lane == 0) Barrier::arrive(&control.handed[warpgroup]);
  };

  for (;;) {
    control.ring.wait_full(turn);
    if (!control.more[turn.stage]) break;
    const ScoresPiece piece = control.piece[turn.stage];
    const int strip0 = piece.query0 + block * Tiles::queries + 64 * warpgroup, query = strip0 + 16 * warp + lane / 4;
    const std::int64_t row0 = static_cast<std::int64_t>(piece.row) * s.queries;
    float delta[2], factor[2];  // factor: of what is stored of P
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool exists = query + 8 * i < s.queries;
      factor[i] = !from_probs ? 1.0f : exists ? p.factors[row0 + query + 8 * i] : 0.0f;
      delta[i] = exists ? p.delta[row0 + query + 8 * i] : 0.0f;
    }
    if constexpr (!from_probs) {
      float shift[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float lse = query + 8 * i < s.queries ? p.lse[row0 + query + 8 * i] : -INFINITY;
        shift[i] = lse == -INFINITY ? INFINITY : lse * log2e;
      }
      multiply_panels(p.panels);
      const float scale = s.negative ? -s.scale_log2 : s.scale_log2;
#pragma unroll
      for (int n = 0; n < Tiles::keys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[4 * n + i] = exp2_approx(fmaf(x[4 * n + i], scale, -shift[i / 2]));
      if (piece.masked) {
        const Visibility seen(s, piece.row / s.heads);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = piece.key0 + 2 * (lane % 4), at = min(query + 8 * i, s.queries - 1);
          const int begin = seen.begin(at) - column, end = seen.end(at) - column;
#pragma unroll
          for (int n = 0; n < Tiles::keys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (8 * n + e < begin || 8 * n + e >= end) x[4 * n + 2 * i + e] = 0.0f;
        }
      }
      wait_for_tiles();
#pragma unroll
      for (int j = 0; j < blocks; ++j) {
        std::uint32_t tile[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) tile[i] = cuda::pack<T>(x[8 * j + 2 * i], x[8 * j + 2 * i + 1]);
        store_tile(j, tile);
      }
      hand_over();
    }
    multiply_panels(p.layers * p.panels);
    delta[0] *= factor[0], delta[1] *= factor[1];  // not before: the products do not wait for these
    wait_for_tiles();
    const auto differentiate = [&]<bool masked>() {
      constexpr int together = 4;  // blocks that are loaded at a time: each alone would wait for itself
#pragma unroll
      for (int j0 = 0; j0 < blocks; j0 += together) {
        std::uint32_t tile[together][4];
#pragma unroll
        for (int j = 0; j < together; ++j)
          asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                       : "=r"(tile[j][0]), "=r"(tile[j][1]), "=r"(tile[j][2]), "=r"(tile[j][3])
                       : "r"(address(j0 + j))
                       : "memory");
#pragma unroll
        for (int j = 0; j < together; ++j) {
          const float* const dp = x + 8 * (j0 + j);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 probs = widen<T>(tile[j][i]);
            float low = fmaf(dp[2 * i], factor[i % 2], -delta[i % 2]), high = fmaf(dp[2 * i + 1], factor[i % 2], -delta[i % 2]);
            if constexpr (masked) {  // values that nobody sees may be NaN
              if (probs.x == 0.0f) low = 0.0f;
              if (probs.y == 0.0f) high = 0.0f;
            }
            tile[j][i] = cuda::pack<T>(probs.x * low, probs.y * high);
          }
          store_tile(j0 + j, tile[j]);
        }
      }
    };
    piece.masked ? differentiate.template operator()<true>() : differentiate.template operator()<false>();
    hand_over();
  }
}

template <class T, bool from_probs>
__global__ void __cluster_dims__(ScoresTiles::cluster, 1, 1) __launch_bounds__(backward_threads, 1)
    scores_kernel(const __grid_constant__ ScoresParams p) {
  using Tiles = ScoresTiles;
  extern __shared__ __align__(1024) char shared[];
  auto& control = *reinterpret_cast<ScoresControl*>(shared + Tiles::control_at);
  static_assert(sizeof(control) <= 256);
  if (threadIdx.x == 0) {
    control.ring.init(Tiles::cluster * consumer_warps);
    for (int w = 0; w < Tiles::warpgroups; ++w) Barrier::init(&control.handed[w], 4), Barrier::init(&control.yours[w], 1);
    cutlass::arch::fence_barrier_init();
  }
  cute::cluster_sync();
  const int block = static_cast<int>(cute::block_rank_in_cluster());
  const ScoresWalk walk(p.shape, static_cast<int>(blockIdx.x) / Tiles::cluster, static_cast<int>(gridDim.x) / Tiles::cluster);
  if (threadIdx.x < helper_threads) {
    cutlass::arch::warpgroup_reg_dealloc<Tiles::Registers::helper>();
    if (threadIdx.x == 0)
      scores_produce<from_probs>(p, shared, control, walk, block);
    else if (threadIdx.x % 32 == 0 && threadIdx.x / 32 <= Tiles::warpgroups)
      scores_carry<from_probs>(p, shared, control, walk, block, static_cast<int>(threadIdx.x) / 32 - 1);
    __syncwarp();
    cute::cluster_sync();  // nobody ends while the other block still writes its memory or signals its barriers
  } else {
    cutlass::arch::warpgroup_reg_alloc<Tiles::Registers::consumer>();
    scores_consume<T, from_probs>(p, shared, control, block);
    cute::cluster_sync();
  }
}

}  // namespace effcore::cuda::hopper
