// out[position, n] = bias[n] + sum over taps and channels of G[position, (tap, c)] W[(tap, c), n] on sm_90a, where neighbouring
// positions lie side by side in the tensor that is read (step 1 along h and w) and there are many columns.
//
// Bound: 2 * taps * channels FLOPs an output on the tensor cores (4096 a cycle and multiprocessor), if the second-level cache
// keeps up: it gives a multiprocessor about 24 bytes a cycle. So what counts is how often a block reads voxels and weights.
//
// A block computes 64 or 128 columns of some hundred positions at a time: whole lines of one or several frames. The product is
// transposed, columns x positions, for wgmma's second side may be any multiple of 8: 14 lines of 28 voxels fill it to 96 %, and
// 128 such tiles the device.
//
// One box of voxels serves all taps of a frame. In shared memory a line takes `pitch` rows (of 64 channels), and a tap reads
// the box from another row on: h * line + w. (The swizzle is a function of the address, so a product may begin at any row.)
// Lines share their margins: the zeros to the right of a line are those to the left of the next; products of margins are
// dropped. For 3 x 3 + 2 taps that is 1.14 + 2 boxes instead of the 11 that taps read one by one.
//
// Where there are fewer tiles than half of the device, a cluster of two blocks shares one: each sums half of the channels,
// gives the other its sums of 64 of the columns, those of one warpgroup, through distributed shared memory, and stores those of
// the other one. The warpgroup that gives its sums away is served first: it multiplies alone at the beginning, and while its
// sums are on their way the other one multiplies alone.
//
// Kernels with their channels inside (channels_last_3d) are read where they lie, as rows of input channels for the gradient of
// the data, which wgmma then reads transposed. The middle of the cross has two kernels: both come, and are added, rounded
// once, by warps beside the producer's. Others are packed beforehand.
//
// A producer warp fills two rings by TMA; blocks stay, and fetch the next tile's first boxes while the last one's results
// leave.
#pragma once
#include <cuda.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "common/overlap.cuh"
#include "conv3d/hopper/boxes.h"
#include "hopper/pipeline.cuh"
#include "hopper/wgmma_sizes.cuh"

namespace effcore::cuda::conv3d::hopper {

namespace sm90 = effcore::cuda::hopper;

constexpr int line_consumers = 2 * 128, line_threads = line_consumers + 128;
constexpr int line_registers = 240, line_fetching_registers = 24;
constexpr int most_line_voxel_stages = 5, most_line_weight_stages = 8, most_frames = 16;
constexpr int adding_warps = 3, adding_threads = adding_warps * 32;  // of the producer's warpgroup

// Blocks of a cluster give each other their sums of 64 columns in parts, which begin at these positions and come where boxes of
// voxels were.
constexpr int received_parts = 2;
constexpr int begin_of_part(int i) {
  constexpr int begin[] = {0, 120, 216};
  return begin[i];
}
constexpr int bytes_of_part(int i) {
  return (begin_of_part(i + 1) - begin_of_part(i)) * 64 * 4;
}
constexpr int most_part_bytes = bytes_of_part(0), least_split_weight_stages = 8;
static_assert(most_part_bytes >= bytes_of_part(1));

// Taps that share a box.
struct LoadedFrame {
  std::int16_t t, h;         // offset of the box from a position
  std::int16_t first, taps;  // tap[first ...]
  bool halo;
};

// Where a tap's weights lie, those that are added to them (-1 for none, among the temporal ones), and which rows of the box
// they meet.
struct LoadedTap {
  std::int16_t map, number, added, shift;
};

struct LinesParams {
  CUtensorMap box, box_with_halo, weights[2];  // spatial and temporal, or packed
  Tiling tiling;                               // of positions, margins included
  int items, first_w;
  Divider column_blocks;
  int voxel_stages, weight_stages, stage_bytes, box_bytes, halo_bytes, zero_from;
  int frames_of_taps, blocks;  // blocks: of 64 channels
  int half_blocks;             // 1 where the last of them has at most 32
  int taps, lead;              // lead: by how many taps the warpgroup that gives its sums away is served earlier
  bool packed;
  int columns;
  void* out;
  std::int64_t out_stride[4];  // b, t, h, w
  const void* bias;
  std::int64_t bias_stride;
  LoadedFrame frame[most_frames];
  LoadedTap tap[max_taps];
};

template <int Positions>
struct LinesMemory {
  sm90::Ring<most_line_voxel_stages> voxels;
  sm90::Ring<most_line_weight_stages> weights;
  sm90::BarrierWord received[received_parts];  // the other block's sums
  sm90::BarrierWord room[received_parts];      // for ours, where its boxes were
  int offset[Positions];                       // of a position's results, in pieces of 8, or -1
};

// An 8 x 8 tile of 16-bit elements across a warp, transposed.
__device__ __forceinline__ std::uint32_t transpose_8x8(std::uint32_t x) {
  std::uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ std::uint32_t in_block(const void* shared, std::uint32_t rank) {
  std::uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  return address;
}

// Sends part I of a warpgroup's sums to the other block of the cluster, four of a thread side by side. They count at the
// barrier themselves.
template <int I, int N>
__device__ __forceinline__ void send(const float (&sums)[N], const char* place, sm90::BarrierWord* arrived, std::uint32_t to) {
  const std::uint32_t address = in_block(place + threadIdx.x % 128 * 16, to), barrier = in_block(arrived, to);
#pragma unroll
  for (int i = begin_of_part(I) / 2; i < begin_of_part(I + 1) / 2; i += 4)
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     address + (i - begin_of_part(I) / 2) * 512),
                 "f"(sums[i]), "f"(sums[i + 1]), "f"(sums[i + 2]), "f"(sums[i + 3]), "r"(barrier)
                 : "memory");
}

template <int I, int N>
__device__ __forceinline__ void add_received(float (&sums)[N], const char* place) {
#pragma unroll
  for (int i = begin_of_part(I) / 2; i < begin_of_part(I + 1) / 2; i += 4) {
    const float4 x = reinterpret_cast<const float4*>(place)[(i - begin_of_part(I) / 2) * 32 + threadIdx.x % 128];
    sums[i] += x.x, sums[i + 1] += x.y, sums[i + 2] += x.z, sums[i + 3] += x.w;
  }
}

// The cluster's barrier; threads that have ended need not come.
__device__ __forceinline__ void arrive_in_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void wait_in_cluster() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// For what the other block sends.
__device__ __forceinline__ void wait_in_cluster(sm90::BarrierWord* barrier) {
  asm volatile(
      "{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra wait;\n}" ::"r"(shared_address(barrier))
      : "memory");
}

// Results of 8 positions at a time, of those from `From` to `To`: four columns of one position a thread.
template <class T, int From, int To, int N>
__device__ __forceinline__ void store_lines(const float (&sums)[N], const int* offset, T* to, const float (&add)[2],
                                            bool exists) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane % 2 != 0;
#pragma unroll
  for (int n = From / 8; n < To / 8; ++n) {
    const std::uint32_t low = transpose_8x8(pack<T>(sums[4 * n] + add[0], sums[4 * n + 1] + add[0]));
    const std::uint32_t high = transpose_8x8(pack<T>(sums[4 * n + 2] + add[1], sums[4 * n + 3] + add[1]));
    const std::uint32_t other = __shfl_xor_sync(~0u, odd ? low : high, 1);
    const int at = offset[8 * n + lane / 4];
    if (at >= 0 && exists)
      *reinterpret_cast<uint2*>(to + static_cast<std::int64_t>(at) * 8) =
          odd ? make_uint2(other, high) : make_uint2(low, other);
  }
}

// Results of a warpgroup to shared memory: a row of 64 columns a position, its pieces of 8 swizzled.
template <class T, int N>
__device__ __forceinline__ void stage_lines(const float (&sums)[N], char* to, const float (&add)[2]) {
  const int lane = threadIdx.x % 32, piece = threadIdx.x % 128 / 32 * 2 + lane / 8 % 2, row = lane % 8;
  const std::uint32_t at = shared_address(to + (lane / 16 * 8 + row) * 128 + (piece ^ row) * 16);
#pragma unroll
  for (int n = 0; n < N / 4; n += 2) {
    const std::uint32_t a = pack<T>(sums[4 * n] + add[0], sums[4 * n + 1] + add[0]);
    const std::uint32_t b = pack<T>(sums[4 * n + 2] + add[1], sums[4 * n + 3] + add[1]);
    if (n + 1 < N / 4) {
      const std::uint32_t c = pack<T>(sums[4 * n + 4] + add[0], sums[4 * n + 5] + add[0]);
      const std::uint32_t d = pack<T>(sums[4 * n + 6] + add[1], sums[4 * n + 7] + add[1]);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at + n * 1024), "r"(a),
                   "r"(b), "r"(c), "r"(d)
                   : "memory");
    } else {
      asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at + n * 1024), "r"(a), "r"(b)
                   : "memory");
    }
  }
}

// By both warpgroups: such rows to where they belong, of each no more than `columns`.
template <class T, int Positions>
__device__ __forceinline__ void store_staged(const char* from, const int* offset, T* to, int columns) {
  const int piece = threadIdx.x % 8;
#pragma unroll
  for (int begin = 0; begin < Positions; begin += line_consumers / 8) {
    const int i = begin + threadIdx.x / 8, at = i < Positions ? offset[i] : -1;
    const uint4 x = *reinterpret_cast<const uint4*>(from + i * 128 + (piece ^ i % 8) * 16);
    if (at >= 0 && piece * 8 < columns) *reinterpret_cast<uint4*>(to + std::int64_t{at} * 8 + piece * 8) = x;
  }
}

// Of two pairs, each sum rounded once.
template <class T>
__device__ __forceinline__ std::uint32_t add_pairs(std::uint32_t a, std::uint32_t b) {
  std::uint32_t sum;
  if constexpr (std::is_same_v<T, bf16>)
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  else
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}

// Adds a stage of weights to another.
template <class T, int Columns>
__device__ __forceinline__ void add_weights(char* weights, const char* added, int thread) {
#pragma unroll 1  // registers are scarce where this runs
  for (int i = thread; i < Columns * 128 / 16; i += adding_threads) {
    auto& sum = reinterpret_cast<uint4*>(weights)[i];
    const uint4 a = sum, b = reinterpret_cast<const uint4*>(added)[i];
    sum = make_uint4(add_pairs<T>(a.x, b.x), add_pairs<T>(a.y, b.y), add_pairs<T>(a.z, b.z), add_pairs<T>(a.w, b.w));
  }
}

// With 128 columns each warpgroup takes half of them, and all positions by two instructions (or one, Second = 0); with 64 it
// takes all of them, and half of the positions.
template <int Columns, int First, int Second>
constexpr int positions_of_lines = Columns == 128 ? First + Second : 2 * First;

// Transposed: weights stand as rows of columns (the gradient of the data, kernels where they lie).
template <class T, int Columns, int First, int Second, bool Split, bool Transposed>
__global__ void __launch_bounds__(line_threads, 1) conv3d_lines_kernel(const __grid_constant__ LinesParams p) {
  // Where sums are swapped, a stage of weights is one warpgroup's, of its own columns.
  constexpr int weight_columns = Split ? 64 : Columns, weight_bytes = weight_columns * 128, readers = Split ? 1 : 2;
  // A stage is released by a thread of each warpgroup, or of each warp: see `pass`.
  constexpr int releasing = Split ? 4 : 1;
  constexpr int positions = positions_of_lines<Columns, First, Second>;
  static_assert(Columns == 128 || (Second == 0 && !Split));
  static_assert(!Split || First == begin_of_part(received_parts));
  extern __shared__ __align__(1024) char memory[];
  char* const weight_memory = memory + p.voxel_stages * p.stage_bytes;
  auto& shared = *reinterpret_cast<LinesMemory<positions>*>(weight_memory + p.weight_stages * weight_bytes);
  if (threadIdx.x == line_consumers) {
    for (const CUtensorMap* map : {&p.box, &p.box_with_halo, &p.weights[0], &p.weights[p.packed ? 0 : 1]})
      cute::prefetch_tma_descriptor(map);
    shared.voxels.init(2 * releasing);
    shared.weights.init(readers * releasing + (p.packed ? 0 : adding_warps));
    if constexpr (Split)
      for (int i = 0; i < received_parts; ++i) {
        sm90::Barrier::init(&shared.room[i], 1);
        sm90::Barrier::init(&shared.received[i], 1);
        sm90::Barrier::arrive_and_expect_tx(&shared.received[i], static_cast<std::uint32_t>(bytes_of_part(i)));
      }
    cutlass::arch::fence_barrier_init();
  }
  int begin = 0, blocks = p.blocks, first_item = blockIdx.x, items = gridDim.x;  // blocks of channels
  std::uint32_t rank = 0;
  if constexpr (Split) {
    rank = cute::block_rank_in_cluster();
    begin = static_cast<int>(rank) * blocks / 2, blocks = (static_cast<int>(rank) + 1) * blocks / 2;
    first_item /= 2, items /= 2;
  }
  // In block `rank` of a cluster warpgroup `rank` keeps its sums; the other one's weights come `lead` taps earlier.
  const int steps = (blocks - begin) * p.taps, lead = Split ? p.lead : 0;
  // Where block `to` of the cluster receives part i of the other's sums: in the stages whose last boxes are read first.
  const auto place_of = [&](int i, std::uint32_t to) {
    const int channels = (static_cast<int>(to) + 1) * p.blocks / 2 - static_cast<int>(to) * p.blocks / 2;
    return memory + (channels * p.frames_of_taps + i) % p.voxel_stages * p.stage_bytes;
  };

  sm90::Turn<most_line_voxel_stages> voxel_turn;
  sm90::Turn<most_line_weight_stages> weight_turn;
  const int warpgroup = sm90::uniform(static_cast<int>(threadIdx.x) / 128);

  // The other warps beside the producer's, ahead of the products. They give back every stage, or they would lose count of laps.
  const auto add_middles = [&] {
    const int thread = static_cast<int>(threadIdx.x) - line_consumers - 32;
    const auto give_back = [&](int stage, int count) {
      __syncwarp();
      if (thread % 32 == 0)
        for (int i = 0; i < count; ++i) sm90::Barrier::arrive(&shared.weights.empty[stage]);
    };
    const auto add_middle = [&](int& tap) {
      const int stage = weight_turn.stage;
      if (p.tap[tap].added >= 0) {
        weight_turn.next(p.weight_stages);
        shared.weights.wait_full(weight_turn);
        add_weights<T, weight_columns>(weight_memory + stage * weight_bytes, weight_memory + weight_turn.stage * weight_bytes,
                                       thread);
        sm90::fence_async();
        asm volatile("bar.sync 4, 96;" ::: "memory");
        if (thread == 0) sm90::Barrier::arrive(&shared.weights.full[stage]);
        give_back(weight_turn.stage, thread == 0 ? 1 + readers * releasing : 1);
      } else {
        shared.weights.wait_full(weight_turn);
      }
      give_back(stage, 1);
      weight_turn.next(p.weight_stages);
      if (++tap == p.taps) tap = 0;
    };
    int tap = 0, tap_behind = 0;
    for (int item = first_item; item < p.items; item += items)
      for (int step = 0; step < steps + lead; ++step) {
        if (!Split || step < steps) add_middle(tap);
        if (Split && step >= lead) add_middle(tap_behind);
      }
  };

  if (warpgroup == 2) {
    if constexpr (Split) arrive_in_cluster();  // the barriers are there
    cutlass::arch::warpgroup_reg_dealloc<line_fetching_registers>();
    if (threadIdx.x >= line_consumers + 32) {
      asm volatile("bar.sync 0, 384;" ::: "memory");
      if (!p.packed) add_middles();
      return;
    }
    __syncwarp();
    asm volatile("bar.arrive 0, 384;" ::: "memory");  // the barriers are there; the first box need not wait for the others
    if (threadIdx.x != line_consumers) return;
    constexpr auto keep = static_cast<std::uint64_t>(sm90::Keep::last);
    bool waited = !p.packed;
    if (waited) wait_for_kernel_before();
    for (int item = first_item; item < p.items; item += items) {
      int column_block = item;
      const Corner at = p.tiling.corner(p.column_blocks.take(column_block));
      const int first_column = column_block * Columns;
      const auto load_weights = [&](int column, int& tap, int& block) {
        const auto load = [&](int map, int number, int stage) {
          for (int panel = 0; panel < (Transposed ? weight_columns / 64 : 1); ++panel)
            cute::SM90_TMA_LOAD_3D::copy(&p.weights[map], &shared.weights.full[weight_turn.stage], keep,
                                         weight_memory + stage * weight_bytes + panel * 64 * 128,
                                         Transposed ? column + panel * 64 : block * 64, number,
                                         Transposed ? block * 64 : column);
        };
        const LoadedTap& loaded = p.tap[tap];
        const int stage = weight_turn.stage;
        shared.weights.wait_empty(weight_turn);
        if (loaded.added >= 0) {  // both arrive at the second one's barrier; at the first one's do those who add them
          weight_turn.next(p.weight_stages);
          shared.weights.wait_empty(weight_turn);
        }
        shared.weights.expect(weight_turn, loaded.added >= 0 ? 2 * weight_bytes : weight_bytes);
        load(loaded.map, loaded.number, stage);
        if (loaded.added >= 0) load(1, loaded.added, weight_turn.stage);
        weight_turn.next(p.weight_stages);
        if (++tap == p.taps) tap = 0, ++block;
      };
      int tap = 0, block = begin, frame_number = 0, tap_behind = 0, block_behind = begin;
      for (int step = 0; step < steps + lead; ++step) {
        if (!Split || step < steps) {
          if (const LoadedFrame& frame = p.frame[frame_number]; tap == frame.first) {
            shared.voxels.wait_empty(voxel_turn);
            shared.voxels.expect(voxel_turn, frame.halo ? p.halo_bytes : p.box_bytes);
            cute::SM90_TMA_LOAD_5D::copy(frame.halo ? &p.box_with_halo : &p.box, &shared.voxels.full[voxel_turn.stage], keep,
                                         memory + voxel_turn.stage * p.stage_bytes, block * 64, p.first_w,
                                         at.t * p.tiling.step[0] + frame.t, at.b, at.h + frame.h);
            voxel_turn.next(p.voxel_stages);
            if (++frame_number == p.frames_of_taps) frame_number = 0;
            if (!waited) wait_for_kernel_before();  // which packs the weights, and began behind the one that wrote the voxels
            waited = true;
          }
          load_weights(first_column + (Split && rank == 0 ? 64 : 0), tap, block);
        }
        if (Split && step >= lead) load_weights(first_column + (rank == 0 ? 0 : 64), tap_behind, block_behind);
      }
    }
    // Where blocks have one tile each, little hides their beginning: the next kernel's may pass theirs meanwhile.
    if (p.items <= items) let_next_kernel_begin();
    if constexpr (Split) {  // Says where there is room for the other block's sums.
      wait_in_cluster();
      for (sm90::BarrierWord& word : shared.room) {
        shared.voxels.wait_empty(voxel_turn);
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(in_block(&word, rank ^ 1))
                     : "memory");
        voxel_turn.next(p.voxel_stages);
      }
    }
    return;
  }

  // The last line's right margin, which no box writes.
  for (int stage = 0; stage < p.voxel_stages; ++stage)
#pragma unroll 1
    for (int i = p.zero_from + static_cast<int>(threadIdx.x) * 4; i < p.stage_bytes; i += line_consumers * 4)
      *reinterpret_cast<int*>(memory + stage * p.stage_bytes + i) = 0;
  sm90::fence_async();
  if constexpr (Split) arrive_in_cluster();  // what comes over there is not zeroed any more
  asm volatile("bar.sync 0, 384;" ::: "memory");
  cutlass::arch::warpgroup_reg_alloc<line_registers>();
  const bool leads = Split && warpgroup != static_cast<int>(rank);
  const int own_column = Columns == 128 ? warpgroup * 64 : 0, own_position = Columns == 128 ? 0 : warpgroup * First;
  for (int item = first_item; item < p.items; item += items) {
    asm volatile("bar.sync 1, 256;" ::: "memory");  // the last tile's offsets have been read
    int column_block = item;
    const Corner at = p.tiling.corner(p.column_blocks.take(column_block));
#pragma unroll 1
    for (int r = threadIdx.x; r < positions; r += line_consumers) {
      const Corner position = p.tiling.position(at, r);
      const bool exists = r < p.tiling.box.rows() && p.tiling.holds(position);
      const std::int64_t offset = position.b * p.out_stride[0] + position.t * p.out_stride[1] + position.h * p.out_stride[2] +
                                  position.w * p.out_stride[3];
      shared.offset[r] = exists ? static_cast<int>(offset / 8) : -1;
    }
    if constexpr (Split) asm volatile("bar.sync 1, 256;" ::: "memory");  // the offsets are there

    float first[First / 2], second[Second > 0 ? Second / 2 : 1];
#pragma unroll
    for (float& x : first) x = 0.0f;
#pragma unroll
    for (float& x : second) x = 0.0f;
    const auto pin = [&] {
      sm90::pin(first);
      if constexpr (Second > 0) sm90::pin(second);
    };
    // Stages that the product under way reads are released behind the next one.
    int read_weights = -1, read_voxels = -1;
    const auto release = [&] {
      if (threadIdx.x % (128 / releasing) != 0) return;
      if (read_weights >= 0) sm90::Barrier::arrive(&shared.weights.empty[read_weights]);
      if (read_voxels >= 0) sm90::Barrier::arrive(&shared.voxels.empty[read_voxels]);
    };
    // Passes over the other warpgroup's stages before its own next one, and waits until they have been full: a barrier tells
    // odd laps from even ones alone. They are not filled again meanwhile, for this warp has yet to release its last one.
    int other = leads ? -lead : 0, other_tap = 0;
    const auto pass = [&](bool wait) {
      if (other >= 0 && other < steps) {
        for (int i = p.tap[other_tap].added >= 0 ? 2 : 1; i > 0; --i, weight_turn.next(p.weight_stages))
          if (wait) shared.weights.wait_full(weight_turn);
        if (++other_tap == p.taps) other_tap = 0;
      }
      ++other;
    };
    // Those before the first stage of the warpgroup that follows have been full when the other one is at the last of them.
    const int all_led = min(lead, steps - 1);
    int led = 0;
    if (Split && !leads) {
      while (other <= lead) pass(false);
      asm volatile("bar.sync 3, 256;" ::: "memory");
    }
    // Blocks of channels of which Depth * 16 exist.
    const auto sum_blocks = [&]<int Depth>(int count, std::integral_constant<int, Depth>) {
      for (int i = 0; i < count * p.frames_of_taps; ++i) {
        const LoadedFrame& frame = p.frame[i % p.frames_of_taps];
        shared.voxels.wait_full(voxel_turn);
        const std::uint32_t voxels = shared_address(memory + voxel_turn.stage * p.stage_bytes);
        const int end = frame.first + frame.taps;
        for (int tap = frame.first; tap < end; ++tap) {
          if (Split && led > 0) pass(true);
          shared.weights.wait_full(weight_turn);
          if (leads && led == all_led) asm volatile("bar.arrive 3, 256;" ::: "memory");
          ++led;
          char* const weights = weight_memory + weight_turn.stage * weight_bytes;
          const int stage = weight_turn.stage;
          weight_turn.next(p.weight_stages);
          if (p.tap[tap].added >= 0) weight_turn.next(p.weight_stages);
          const std::uint32_t rows = voxels + static_cast<std::uint32_t>((p.tap[tap].shift + own_position) * 128);
          const sm90::SharedOperand<Transposed> a(
              shared_address(weights) + static_cast<std::uint32_t>(Split ? 0 : own_column * 128), 64, false);
          const sm90::SharedOperand<false> b(rows, First, false), c(rows + First * 128, Second, false);
          pin();
          sm90::wgmma_begin();
          sm90::multiply<T, First, Depth, Transposed, false>(first, a, b, true);
          if constexpr (Second > 0) sm90::multiply<T, Second, Depth, Transposed, false>(second, a, c, true);
          sm90::wgmma_commit();
          sm90::wgmma_wait<1>();
          release();
          read_weights = stage, read_voxels = tap + 1 == end ? voxel_turn.stage : -1;
        }
        voxel_turn.next(p.voxel_stages);
      }
      sm90::wgmma_wait<0>();
      pin();
    };
    const int halves = blocks == p.blocks ? p.half_blocks : 0;
    sum_blocks(blocks - begin - halves, std::integral_constant<int, 4>{});
    if (halves != 0) sum_blocks(halves, std::integral_constant<int, 2>{});
    release();

    const int first_column = column_block * Columns;
    const int lane = threadIdx.x % 32, row = first_column + own_column + threadIdx.x % 128 / 32 * 16;
    const T* const bias = static_cast<const T*>(p.bias);
    float add[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (const int n = row + lane / 4 + 8 * half; bias != nullptr && n < p.columns)
        add[half] = to_float(bias[n * p.bias_stride]);
    if constexpr (Split) {
      char* const results = place_of(0, rank);
      if (leads) {
        wait_in_cluster();  // The other block has begun.
        const std::uint32_t to = rank ^ 1;
        wait_in_cluster(&shared.room[0]);
        send<0>(first, place_of(0, to), &shared.received[0], to);
        wait_in_cluster(&shared.room[1]);
        send<1>(first, place_of(1, to), &shared.received[1], to);
      } else {
        wait_in_cluster(&shared.received[0]);
        add_received<0>(first, results);
        wait_in_cluster(&shared.received[1]);
        add_received<1>(first, place_of(1, rank));
        asm volatile("bar.sync 2, 128;" ::: "memory");  // all have read what is overwritten now
        stage_lines<T>(first, results, add);
      }
      asm volatile("bar.sync 1, 256;" ::: "memory");
      const int kept = first_column + static_cast<int>(rank) * 64;
      store_staged<T, First>(results, shared.offset, static_cast<T*>(p.out) + kept, p.columns - kept);
    } else {
      asm volatile("bar.sync 1, 256;" ::: "memory");  // the offsets are there
      const int column = row + lane % 4 / 2 * 4 + lane % 2 * 8;
      T* const to = static_cast<T*>(p.out) + column;
      const bool columns_exist = column < p.columns;
      store_lines<T, 0, First>(first, shared.offset + own_position, to, add, columns_exist);
      if constexpr (Second > 0) store_lines<T, 0, Second>(second, shared.offset + First, to, add, columns_exist);
    }
  }
}

}  // namespace effcore::cuda::conv3d::hopper
