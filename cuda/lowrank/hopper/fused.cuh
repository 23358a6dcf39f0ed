// out [M, N] = f(x first second + bias) in one pass over x on sm_90a: the intermediate H = x first [M, R] stays in registers.
//
// A cluster of two blocks owns 256 rows of x, a block 128, a warpgroup 64:
//   1.  H [64, R] += x tile [64, 64] first tile [64, R]          over the depth in steps of 64, operands in shared memory
//   2.  out tile [64, 128] = H second tile [R, 128]              over N in steps of 128; H, rounded, is the register operand
// All operands come as panels of 16 KiB through one ring, which the producer's warps fill by TMA across steps, phases and
// pieces of work, so that the next one's panels arrive while a result is still on its way out. Panels of the factors serve both
// blocks: each fetches one half and multicasts it. In phase 2 the warpgroups take turns: one multiplies while the other gives
// its tile its activation and sends it off by TMA. A tile's bias comes with its first panel and is what its sums begin as: read
// from global memory it would wait behind the stores. The ring is as deep as memory allows: with ten panels instead of twelve,
// R = 256 takes a third longer on an H200.
//
// Bound, M = 16384, 768 -> 3072 in bf16: x and out are 126 MB, 29 us at 4.3 TB/s; 2 M R (768 + 3072) operations are 16 us at R
// = 128 and 32 us at 256 of 1 PFLOP/s; a cluster reads the factors from the L2 cache, M / 256 times 2 R (768 + 3072) bytes: 11
// and 23 us at 5.5 TB/s. Two library products move H as well, and out's bound is met by the second of them alone.
#pragma once
#include <cute/arch/cluster_sm90.hpp>

#include "hopper/pipeline.cuh"
#include "hopper/wgmma.cuh"
#include "lowrank/activation.cuh"

namespace effcore::cuda::lowrank::hopper {

namespace sm90 = effcore::cuda::hopper;

// A panel is two boxes of 64 x 64. Its rows are rows of x or of a factor; of a transposed factor, one box's columns follow the
// other's.
constexpr int cluster_blocks = 2, warpgroups = 2, block_rows = 64 * warpgroups, cluster_rows = cluster_blocks * block_rows;
constexpr int box = 64, box_elements = box * box, panel_elements = 2 * box_elements, panel_bytes = 2 * panel_elements;
constexpr int tile_columns = 128, warp_rows = 16;
constexpr int producer_warps = 4, consumer_warps = 4 * warpgroups, threads = 128 * (warpgroups + 1);
constexpr int consumer_registers = 232, producer_registers = 40;

struct FusedParams {
  CUtensorMap x, first, second, out, hidden, before;  // in boxes of 64 x 64
  const void* bias;
  int rows, rank, columns;
  int first_steps;    // of 64, along the depth
  int split_columns;  // of one piece of work; a multiple of the tile's
  int splits, pieces;
  Activation activation;
  bool keeps_hidden, keeps_before;
};

// How memory is shared out.
template <int Rank>
struct Sizes {
  static constexpr int panels = Rank / box;             // of a tile
  static constexpr int stages = Rank == box ? 11 : 12;  // as many as there is memory for
  // A tile's bias is in its place until its first panel is released, and so many tiles later that panel's successor is there.
  static constexpr int biases = (stages + panels - 1) / panels;
};

template <class T, int Rank>
struct FusedShared {
  T panels[Sizes<Rank>::stages][panel_elements];
  T staged[warpgroups][2][box_elements];  // a warpgroup's tile on its way out
  T bias[Sizes<Rank>::biases][tile_columns];
  sm90::Ring<Sizes<Rank>::stages> ring;
};

// The part of the result that a cluster computes at a time.
struct Piece {
  int row0, column0, column_end;
  __device__ Piece(const FusedParams& p, int piece)
      : row0(piece / p.splits * cluster_rows),
        column0(piece % p.splits * p.split_columns),
        column_end(min(column0 + p.split_columns, p.columns)) {}
};

// H's columns come in parts of one instruction's width.
template <int Rank>
struct Parts {
  static constexpr int count = (Rank + 127) / 128, width = Rank / count;
};

template <class T, int Rank, bool transposed>
struct FusedProducer {
  FusedShared<T, Rank>& shared;
  const FusedParams& p;
  const int block, warp;  // of the cluster; of the producers
  sm90::Turn<Sizes<Rank>::stages> turn;
  sm90::Turn<Sizes<Rank>::biases> tile;

  // By one thread of each warp. They share out the stages: where one filled all of them, some hundred cycles more a panel made
  // the kernel a fifth slower.
  __device__ void run(int cluster, int clusters) {
    if (warp == 0)
      for (const CUtensorMap* map : {&p.x, &p.first, &p.second, &p.out}) cute::prefetch_tma_descriptor(map);
    // Pieces of the same rows run side by side and find x in the L2 cache.
    const auto keep = p.splits > 1 ? sm90::Keep::last : sm90::Keep::first;
    for (int i = cluster; i < p.pieces; i += clusters) {
      const Piece piece(p, i);
#pragma unroll 1
      for (int step = 0; step < p.first_steps; ++step) {
        if (mine()) {
          T* const to = begin(panel_bytes);
#pragma unroll 1
          for (int half = 0; half < 2; ++half)
            cute::SM90_TMA_LOAD_2D::copy(&p.x, full(), static_cast<std::uint64_t>(keep), to + half * box_elements, step * box,
                                         piece.row0 + block * block_rows + half * box);
        }
        turn.next();
#pragma unroll 1
        for (int part = 0; part < Parts<Rank>::count; ++part)
          factor<Rank == box>(p.first, step * box, part * Parts<Rank>::width, step % cluster_blocks);
      }
#pragma unroll 1
      for (int n = piece.column0; n < piece.column_end; n += tile_columns, tile.next())
#pragma unroll 1
        for (int r = 0; r < Rank; r += box) factor<false>(p.second, r, n, 0, r == 0 && p.bias != nullptr);
    }
  }

 private:
  __device__ bool mine() const { return turn.stage % producer_warps == warp; }
  __device__ T* begin(int bytes) {
    shared.ring.wait_empty(turn);
    shared.ring.expect(turn, bytes);
    return shared.panels[turn.stage];
  }
  __device__ sm90::BarrierWord* full() { return &shared.ring.full[turn.stage]; }

  // 64 of the product's depth, 128 of its columns: this block's half of them, for both blocks. Or 64 columns: all from block
  // `whose`. With it the bias of those columns.
  template <bool half>
  __device__ void factor(const CUtensorMap& map, int depth, int column, int whose, bool biased = false) {
    if (mine()) {
      const int bias_bytes = biased ? min(tile_columns, p.columns - column) * static_cast<int>(sizeof(T)) : 0;
      T* to = begin((half ? panel_bytes / 2 : panel_bytes) + bias_bytes);
      if (biased)
        cute::SM90_BULK_COPY_G2S::copy(static_cast<const T*>(p.bias) + column, full(), shared.bias[tile.stage], bias_bytes);
      if (!half) to += block * box_elements, column += block * box;
      if (!half || whose == block)
        cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&map, full(), (1 << cluster_blocks) - 1,
                                               static_cast<std::uint64_t>(sm90::Keep::last), to, transposed ? column : depth,
                                               transposed ? depth : column);
    }
    turn.next();
  }
};

template <class T, int Rank, bool transposed>
struct FusedConsumer {
  static constexpr int parts = Parts<Rank>::count, width = Parts<Rank>::width, panels = Sizes<Rank>::panels;
  using Factor = sm90::SharedOperand<transposed>;
  using Block = std::uint32_t[4][4];  // 64 columns of a warpgroup's rows, rounded: a register operand of four products
  using Tile = float[tile_columns / 2];

  FusedShared<T, Rank>& shared;
  const FusedParams& p;
  const int block, warpgroup, warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  sm90::Turn<Sizes<Rank>::stages> turn, read;  // the next panel; the next to be released
  sm90::Turn<Sizes<Rank>::biases> tiles;       // whose bias is next
  int row = 0;                                 // of the warpgroup

  __device__ FusedConsumer(FusedShared<T, Rank>& shared_, const FusedParams& p_, int block_, int warpgroup_)
      : shared(shared_), p(p_), block(block_), warpgroup(warpgroup_) {
    if (warpgroup == 1) give_turn();
  }

  __device__ __forceinline__ void run(int cluster, int clusters) {
    for (int i = cluster; i < p.pieces; i += clusters) {
      const Piece piece(p, i);
      row = piece.row0 + block * block_rows + warpgroup * box;
      Block h[panels];
      intermediate(h);
      if (p.keeps_hidden && piece.column0 == 0) {
#pragma unroll
        for (int q = 0; q < panels; q += 2) {
          begin_staging();
          stage(0, h[q]);
          if (q + 1 < panels) stage(1, h[q + 1 < panels ? q + 1 : q]);
          send(p.hidden, q * box, p.rank);
        }
      }
      columns(h, piece);
    }
    if (leader()) cute::tma_store_wait<0>();
  }

 private:
  // Named barriers: whose turn it is to multiply; one of each warpgroup's own.
  __device__ __forceinline__ void await_turn() const { cutlass::arch::NamedBarrier::sync(256, warpgroup); }
  __device__ __forceinline__ void give_turn() const { cutlass::arch::NamedBarrier::arrive(256, 1 - warpgroup); }
  __device__ __forceinline__ void meet() const { cutlass::arch::NamedBarrier::sync(128, 2 + warpgroup); }
  __device__ __forceinline__ bool leader() const { return threadIdx.x % 128 == 0; }

  __device__ __forceinline__ std::uint32_t panel() {
    shared.ring.wait_full(turn);
    const std::uint32_t address = shared_address(shared.panels[turn.stage]);
    turn.next();
    return address;
  }
  __device__ __forceinline__ static Factor factor(std::uint32_t address) {
    return Factor(address, transposed ? box : 2 * box, false);
  }

  // To the producers of both blocks.
  __device__ __forceinline__ void release(int count) {
    for (int i = 0; i < count; ++i, read.next())
      if (lane < cluster_blocks) sm90::Barrier::arrive(&shared.ring.empty[read.stage], static_cast<std::uint32_t>(lane), 1);
  }

  // Accumulators begin as something known, or what they held in the piece before would have to stay.
  template <int Count>
  __device__ __forceinline__ static void clear(float (&sums)[Count]) {
#pragma unroll
    for (float& x : sums) x = 0.0f;
  }

  __device__ __forceinline__ void intermediate(Block (&h)[panels]) {
    float sums[parts][width / 2];
#pragma unroll
    for (auto& part : sums) clear(part);
    for (int step = 0; step < p.first_steps; ++step) {
      const sm90::SharedOperand<false> x(panel() + static_cast<std::uint32_t>(warpgroup * box * 128), box, false);
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        const std::uint32_t first = panel();
        sm90::pin(sums[part]);
        sm90::wgmma_begin();
        sm90::multiply<T, width, 4, false, transposed>(sums[part], x, factor(first), true);
        sm90::wgmma_commit();
      }
      sm90::wgmma_wait<parts>();
      if (step > 0) release(1 + parts);
    }
    sm90::wgmma_wait<0>();
    release(1 + parts);
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      sm90::pin(sums[part]);
#pragma unroll
      for (int k = 0; k < width / 16; ++k) {
        constexpr int blocks = width / 16;
        const int at = part * blocks + k;
#pragma unroll
        for (int e = 0; e < 4; ++e) h[at / 4][at % 4][e] = pack<T>(sums[part][8 * k + 2 * e], sums[part][8 * k + 2 * e + 1]);
      }
    }
  }

  __device__ __forceinline__ void columns(const Block (&h)[panels], const Piece& piece) {
    Tile tile;
    clear(tile);
    for (int n = piece.column0; n < piece.column_end; n += tile_columns) {
      multiply(tile, h);
      finish(tile, n);
    }
  }

  // One tile at a time, and not a second set of sums for the next one's product: a warpgroup that is a tile ahead holds panels,
  // and the ring has none to spare (2-7 % lost on an H200). From one tile to the next a warpgroup has no time to spare either:
  // a wait takes a hundred cycles where the panel is there, so the next panel is awaited, and the last given back, while one is
  // multiplied; and the memory for the result, while the last one is.
  __device__ __forceinline__ void multiply(Tile& tile, const Block (&h)[panels]) {
    const bool biased = p.bias != nullptr;
    std::uint32_t second = panel();
    if (biased) begin_with_bias(tile);
    await_turn();
    sm90::pin(tile);
#pragma unroll
    for (int q = 0; q < panels; ++q) {
      sm90::wgmma_begin();
      sm90::multiply<T, tile_columns, 4, transposed>(tile, h[q], factor(second), q > 0 || biased);
      sm90::wgmma_commit();
      if (q + 1 < panels)
        second = panel();
      else
        give_turn();
      if (q > 0) {
        sm90::wgmma_wait<1>();
        release(1);
      }
    }
    begin_staging();
  }

  __device__ __forceinline__ void begin_with_bias(Tile& tile) {
    const auto* bias = reinterpret_cast<const std::uint32_t*>(shared.bias[tiles.stage]) + lane % 4;
    tiles.next();
#pragma unroll
    for (int j = 0; j < tile_columns / 8; ++j) {
      const float2 b = unpack<T>(bias[4 * j]);
      tile[4 * j] = tile[4 * j + 2] = b.x, tile[4 * j + 1] = tile[4 * j + 3] = b.y;
    }
  }

  __device__ __forceinline__ void finish(Tile& tile, int column) {
    sm90::wgmma_wait<0>();
    sm90::pin(tile);
    release(1);
    Block values[2];
#pragma unroll
    for (int i = 0; i < tile_columns / 4; ++i) values[i / 16][i / 4 % 4][i % 4] = pack<T>(tile[2 * i], tile[2 * i + 1]);
    stage(0, values[0]);
    stage(1, values[1]);
    if (p.activation != Activation::none) {
      // It comes last, on what is rounded, as it does where layers are separate: its code exists once a tile instead of once an
      // accumulator.
      if (p.keeps_before) {
        send(p.before, column, p.columns);
        begin_staging();
      } else {
        __syncwarp();
      }
      dispatch(p.activation, [&](auto f) { activate<decltype(f)::value>(); });
    }
    send(p.out, column, p.columns);
  }

  // Once what the warpgroup sent from its memory before has left it.
  __device__ __forceinline__ void begin_staging() const {
    if (leader()) cute::tma_store_wait<0>();
    meet();
  }

  // 64 columns of the warp's rows.
  __device__ __forceinline__ void stage(int half, const Block& values) const {
    const int place = lane % 16, across = lane / 16;  // the row and chunk that the lane addresses
    const std::uint32_t to = shared_address(shared.staged[warpgroup][half]) + (warp % 4 * warp_rows + place) * 128;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      asm volatile(
          "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + ((2 * j + across) ^ place % 8) * 16),
          "r"(values[j][0]), "r"(values[j][1]), "r"(values[j][2]), "r"(values[j][3])
          : "memory");
  }

  // What lies outside of the tensor is left out.
  __device__ __forceinline__ void send(const CUtensorMap& map, int column, int columns) const {
    sm90::fence_async();
    meet();
    if (leader()) {
      cute::SM90_TMA_STORE_2D::copy(&map, shared.staged[warpgroup][0], column, row);
      if (column + box < columns) cute::SM90_TMA_STORE_2D::copy(&map, shared.staged[warpgroup][1], column + box, row);
      cute::tma_store_arrive();
    }
  }

  template <Activation activation>
  __device__ __forceinline__ void activate() {
    if constexpr (activation != Activation::none) {
      constexpr int values_of_lane = 4, count = warp_rows * box / (values_of_lane * 32);  // in one half
#pragma unroll 1
      for (int i = 0; i < 2 * count; ++i) {
        T* const half = shared.staged[warpgroup][i / count] + warp % 4 * warp_rows * box;
        uint2& at = reinterpret_cast<uint2*>(half)[i % count * 32 + lane];
        const float2 low = unpack<T>(at.x), high = unpack<T>(at.y);
        at = make_uint2(pack<T>(value<activation>(low.x), value<activation>(low.y)),
                        pack<T>(value<activation>(high.x), value<activation>(high.y)));
      }
    }
  }
};

template <class T, int Rank, bool transposed>
__global__ void __cluster_dims__(cluster_blocks, 1, 1) __launch_bounds__(threads, 1)
    lowrank_fused_kernel(const __grid_constant__ FusedParams p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<FusedShared<T, Rank>*>(memory);
  if (threadIdx.x == 0) {
    shared.ring.init(cluster_blocks * consumer_warps);
    cutlass::arch::fence_barrier_init();
  }
  cute::cluster_sync();
  const int block = static_cast<int>(cute::block_rank_in_cluster());
  const int cluster = static_cast<int>(blockIdx.x) / cluster_blocks, clusters = static_cast<int>(gridDim.x) / cluster_blocks;
  const int warp = sm90::uniform(static_cast<int>(threadIdx.x) / 32), warpgroup = warp / 4 - 1;
  if (warpgroup < 0) {
    cutlass::arch::warpgroup_reg_dealloc<producer_registers>();
    if (threadIdx.x % 32 == 0) FusedProducer<T, Rank, transposed>{shared, p, block, warp, {}, {}}.run(cluster, clusters);
    __syncwarp();
    cute::cluster_sync();  // nobody ends while the other block still writes its memory or signals its barriers
  } else {
    cutlass::arch::warpgroup_reg_alloc<consumer_registers>();
    FusedConsumer<T, Rank, transposed>(shared, p, block, warpgroup).run(cluster, clusters);
    cute::cluster_sync();
  }
}

}  // namespace effcore::cuda::lowrank::hopper
