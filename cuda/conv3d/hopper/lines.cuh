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
// gives the other its sums of half of the positions through distributed shared memory, in parts, and stores the other half.
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
constexpr int most_line_voxel_stages = 3, most_line_weight_stages = 8, most_frames = 16;
constexpr int adding_warps = 3, adding_threads = adding_warps * 32;  // of the producer's warpgroup

// Blocks of a cluster swap their sums in parts. The first has a place of its own, before the rings; the others come where the
// rings were.
constexpr int received_parts = 4, first_part_bytes = 32 / 2 * line_consumers * 4;

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
  int items, column_blocks, first_w;
  int voxel_stages, weight_stages, stage_bytes, box_bytes, halo_bytes, zero_from;
  int frames_of_taps, blocks;  // blocks: of 64 channels
  int half_blocks;             // 1 where the last of them has at most 32
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
  int offset[Positions];                       // of a position's results, in pieces of 8, or -1
};

// An 8 x 8 tile of 16-bit elements across a warp, transposed.
__device__ __forceinline__ std::uint32_t transpose_8x8(std::uint32_t x) {
  std::uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Where the sums of positions from `From` on lie among those that begin at `Begin`, four of a thread side by side.
template <int Begin, int From>
constexpr int sums_before = (From - Begin) / 8 * line_consumers;

// Sends the sums of positions `From` to `To` to the other block of the cluster, four of a thread side by side. They count at
// the barrier themselves: an arrival would have to wait for all stores before it, those of results too.
template <int Begin, int From, int To, int N>
__device__ __forceinline__ void send(const float (&sums)[N], float4* received, sm90::BarrierWord* arrived, std::uint32_t to) {
  std::uint32_t address, barrier;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(received + sums_before<Begin, From> + threadIdx.x)), "r"(to));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(shared_address(arrived)), "r"(to));
#pragma unroll
  for (int i = From / 2; i < To / 2; i += 4)
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     address + (i - From / 2) / 4 * line_consumers * 16),
                 "f"(sums[i]), "f"(sums[i + 1]), "f"(sums[i + 2]), "f"(sums[i + 3]), "r"(barrier)
                 : "memory");
}

template <int Begin, int From, int To, int N>
__device__ __forceinline__ void add_received(float (&sums)[N], const float4* received) {
#pragma unroll
  for (int i = From / 2; i < To / 2; i += 4) {
    const float4 x = received[sums_before<Begin, From> + (i - From / 2) / 4 * line_consumers + threadIdx.x];
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

// Where two blocks that share a tile of positions part it.
template <int Positions>
constexpr int middle_of = (Positions / 2 + 7) / 8 * 8;

// Where part `i` of `count` positions begins.
constexpr int begin_of_part(int i, int count) {
  return (i * (count / 8) + received_parts - 1) / received_parts * 8;
}

// Gives the other block its sums of the positions from `Theirs` on and stores those from `Own` on, in parts: while one is on
// its way, the one before is stored. Neither block ends before it has all that the other sends.
template <class T, int Own, int OwnCount, int Theirs, int TheirCount, int N>
__device__ __forceinline__ void swap_and_store(float (&sums)[N], float4* received, sm90::BarrierWord* arrived, std::uint32_t to,
                                               const int* offset, T* out, const float (&add)[2], bool exists) {
  if (threadIdx.x == 0) {
    const auto expect = [&]<int I>(std::integral_constant<int, I>) {
      constexpr int count = begin_of_part(I + 1, OwnCount) - begin_of_part(I, OwnCount);
      sm90::Barrier::arrive_and_expect_tx(&arrived[I], count / 2 * line_consumers * 4);
    };
    expect(std::integral_constant<int, 0>{}), expect(std::integral_constant<int, 1>{});
    expect(std::integral_constant<int, 2>{}), expect(std::integral_constant<int, 3>{});
  }
  const auto send_part = [&]<int I>(std::integral_constant<int, I>) {
    constexpr int from = Theirs + begin_of_part(I, TheirCount), end = Theirs + begin_of_part(I + 1, TheirCount);
    send<Theirs, from, end>(sums, received, &arrived[I], to);
  };
  const auto store_part = [&]<int I>(std::integral_constant<int, I>) {
    constexpr int from = Own + begin_of_part(I, OwnCount), end = Own + begin_of_part(I + 1, OwnCount);
    wait_in_cluster(&arrived[I]);
    add_received<Own, from, end>(sums, received);
    store_lines<T, from, end>(sums, offset, out, add, exists);
  };
  static_assert(begin_of_part(1, OwnCount) / 2 * line_consumers * 4 == first_part_bytes);
  wait_in_cluster();  // The other block has begun,
  arrive_in_cluster();
  send_part(std::integral_constant<int, 0>{});
  wait_in_cluster();  // and has read its last stages.
  send_part(std::integral_constant<int, 1>{});
  store_part(std::integral_constant<int, 0>{});
  send_part(std::integral_constant<int, 2>{});
  store_part(std::integral_constant<int, 1>{});
  send_part(std::integral_constant<int, 3>{});
  store_part(std::integral_constant<int, 2>{});
  store_part(std::integral_constant<int, 3>{});
}

// With 128 columns each warpgroup takes half of them, and all positions by two instructions (or one, Second = 0); with 64 it
// takes all of them, and half of the positions.
template <int Columns, int First, int Second>
constexpr int positions_of_lines = Columns == 128 ? First + Second : 2 * First;

// Transposed: weights stand as rows of columns (the gradient of the data, kernels where they lie).
template <class T, int Columns, int First, int Second, bool Split, bool Transposed>
__global__ void __launch_bounds__(line_threads, 1) conv3d_lines_kernel(const __grid_constant__ LinesParams p) {
  constexpr int weight_bytes = Columns * 128, positions = positions_of_lines<Columns, First, Second>;
  constexpr int readers = 2;  // of a stage of weights
  static_assert(Columns == 128 || (Second == 0 && !Split));
  extern __shared__ __align__(1024) char memory[];
  char* const voxel_memory = memory + (Split ? first_part_bytes : 0);
  char* const weight_memory = voxel_memory + p.voxel_stages * p.stage_bytes;
  auto& shared = *reinterpret_cast<LinesMemory<positions>*>(weight_memory + p.weight_stages * weight_bytes);
  if (threadIdx.x == line_consumers) {
    for (const CUtensorMap* map : {&p.box, &p.box_with_halo, &p.weights[0], &p.weights[p.packed ? 0 : 1]})
      cute::prefetch_tma_descriptor(map);
    shared.voxels.init(2);
    shared.weights.init(readers + (p.packed ? 0 : adding_warps));
    if constexpr (Split)
      for (sm90::BarrierWord& word : shared.received) sm90::Barrier::init(&word, 1);
    cutlass::arch::fence_barrier_init();
  }
  int begin = 0, blocks = p.blocks, first_item = blockIdx.x, items = gridDim.x;  // blocks of channels
  std::uint32_t rank = 0;
  if constexpr (Split) {
    arrive_in_cluster();  // the barriers are there
    rank = cute::block_rank_in_cluster();
    begin = static_cast<int>(rank) * blocks / 2, blocks = (static_cast<int>(rank) + 1) * blocks / 2;
    first_item /= 2, items /= 2;
  }

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
    for (int item = first_item; item < p.items; item += items)
      for (int i = begin * p.frames_of_taps; i < blocks * p.frames_of_taps; ++i) {
        const LoadedFrame& frame = p.frame[i % p.frames_of_taps];
        for (int tap = frame.first; tap < frame.first + frame.taps; ++tap, weight_turn.next(p.weight_stages)) {
          const int stage = weight_turn.stage;
          if (p.tap[tap].added >= 0) {
            weight_turn.next(p.weight_stages);
            shared.weights.wait_full(weight_turn);
            add_weights<T, Columns>(weight_memory + stage * weight_bytes, weight_memory + weight_turn.stage * weight_bytes,
                                    thread);
            sm90::fence_async();
            asm volatile("bar.sync 4, 96;" ::: "memory");
            if (thread == 0) sm90::Barrier::arrive(&shared.weights.full[stage]);
            give_back(weight_turn.stage, thread == 0 ? 1 + readers : 1);
          } else {
            shared.weights.wait_full(weight_turn);
          }
          give_back(stage, 1);
        }
      }
  };

  if (warpgroup == 2) {
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
      const Corner at = p.tiling.corner(item / p.column_blocks);
      const int first_column = item % p.column_blocks * Columns;
      for (int block = begin; block < blocks; ++block)
        for (int i = 0; i < p.frames_of_taps; ++i) {
          const LoadedFrame& frame = p.frame[i];
          shared.voxels.wait_empty(voxel_turn);
          shared.voxels.expect(voxel_turn, frame.halo ? p.halo_bytes : p.box_bytes);
          cute::SM90_TMA_LOAD_5D::copy(frame.halo ? &p.box_with_halo : &p.box, &shared.voxels.full[voxel_turn.stage], keep,
                                       voxel_memory + voxel_turn.stage * p.stage_bytes, block * 64, p.first_w,
                                       at.t * p.tiling.step[0] + frame.t, at.b, at.h + frame.h);
          voxel_turn.next(p.voxel_stages);
          if (!waited) wait_for_kernel_before();  // which packs the weights, and began behind the one that wrote the voxels
          waited = true;
          for (int i = frame.first; i < frame.first + frame.taps; ++i) {
            const auto load_weights = [&](int map, int number, int stage) {
              for (int panel = 0; panel < (Transposed ? Columns / 64 : 1); ++panel)
                cute::SM90_TMA_LOAD_3D::copy(&p.weights[map], &shared.weights.full[weight_turn.stage], keep,
                                             weight_memory + stage * weight_bytes + panel * 64 * 128,
                                             Transposed ? first_column + panel * 64 : block * 64, number,
                                             Transposed ? block * 64 : first_column);
            };
            const LoadedTap& tap = p.tap[i];
            const int stage = weight_turn.stage;
            shared.weights.wait_empty(weight_turn);
            if (tap.added >= 0) {  // both arrive at the second one's barrier; at the first one's do those who add them
              weight_turn.next(p.weight_stages);
              shared.weights.wait_empty(weight_turn);
            }
            shared.weights.expect(weight_turn, tap.added >= 0 ? 2 * weight_bytes : weight_bytes);
            load_weights(tap.map, tap.number, stage);
            if (tap.added >= 0) load_weights(1, tap.added, weight_turn.stage);
            weight_turn.next(p.weight_stages);
          }
        }
    }
    // Where blocks have one tile each, little hides their beginning: the next kernel's may pass theirs meanwhile.
    if (p.items <= items) let_next_kernel_begin();
    return;
  }

  // The last line's right margin, which no box writes.
  const int zeros = (p.stage_bytes - p.zero_from) / 4;
  for (int i = threadIdx.x; i < zeros * p.voxel_stages; i += line_consumers)
    *reinterpret_cast<int*>(voxel_memory + i / zeros * p.stage_bytes + p.zero_from + i % zeros * 4) = 0;
  sm90::fence_async();
  asm volatile("bar.sync 0, 384;" ::: "memory");
  cutlass::arch::warpgroup_reg_alloc<line_registers>();
  const int own_column = Columns == 128 ? warpgroup * 64 : 0, own_position = Columns == 128 ? 0 : warpgroup * First;
  for (int item = first_item; item < p.items; item += items) {
    asm volatile("bar.sync 1, 256;" ::: "memory");  // the last tile's offsets have been read
    const Corner at = p.tiling.corner(item / p.column_blocks);
    for (int r = threadIdx.x; r < positions; r += line_consumers) {
      const Corner position = p.tiling.position(at, r);
      const bool exists = r < p.tiling.box.rows() && p.tiling.holds(position);
      const std::int64_t offset = position.b * p.out_stride[0] + position.t * p.out_stride[1] + position.h * p.out_stride[2] +
                                  position.w * p.out_stride[3];
      shared.offset[r] = exists ? static_cast<int>(offset / 8) : -1;
    }

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
      if (threadIdx.x % 128 != 0) return;
      if (read_weights >= 0) sm90::Barrier::arrive(&shared.weights.empty[read_weights]);
      if (read_voxels >= 0) sm90::Barrier::arrive(&shared.voxels.empty[read_voxels]);
    };
    // Blocks of channels of which Depth * 16 exist.
    const auto sum_blocks = [&]<int Depth>(int count, std::integral_constant<int, Depth>) {
      for (int i = 0; i < count * p.frames_of_taps; ++i) {
        const LoadedFrame& frame = p.frame[i % p.frames_of_taps];
        shared.voxels.wait_full(voxel_turn);
        const std::uint32_t voxels = shared_address(voxel_memory + voxel_turn.stage * p.stage_bytes);
        const int end = frame.first + frame.taps;
        for (int tap = frame.first; tap < end; ++tap) {
          shared.weights.wait_full(weight_turn);
          char* const weights = weight_memory + weight_turn.stage * weight_bytes;
          const int stage = weight_turn.stage;
          weight_turn.next(p.weight_stages);
          if (p.tap[tap].added >= 0) weight_turn.next(p.weight_stages);
          const std::uint32_t rows = voxels + static_cast<std::uint32_t>((p.tap[tap].shift + own_position) * 128);
          const sm90::SharedOperand<Transposed> a(shared_address(weights) + static_cast<std::uint32_t>(own_column * 128), 64,
                                                  false);
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
      release();
      read_weights = read_voxels = -1;
    };
    const int halves = blocks == p.blocks ? p.half_blocks : 0;
    sum_blocks(blocks - begin - halves, std::integral_constant<int, 4>{});
    if (halves != 0) sum_blocks(halves, std::integral_constant<int, 2>{});

    asm volatile("bar.sync 1, 256;" ::: "memory");  // the offsets are there
    const int lane = threadIdx.x % 32, row = item % p.column_blocks * Columns + own_column + threadIdx.x % 128 / 32 * 16;
    const T* const bias = static_cast<const T*>(p.bias);
    float add[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (const int n = row + lane / 4 + 8 * half; bias != nullptr && n < p.columns)
        add[half] = to_float(bias[n * p.bias_stride]);
    const int column = row + lane % 4 / 2 * 4 + lane % 2 * 8;
    T* const to = static_cast<T*>(p.out) + column;
    const bool columns_exist = column < p.columns;
    if constexpr (Split) {
      constexpr int middle = middle_of<First>;
      auto* const received = reinterpret_cast<float4*>(memory);
      if (rank == 0)
        swap_and_store<T, 0, middle, middle, First - middle>(first, received, shared.received, 1, shared.offset, to, add,
                                                             columns_exist);
      else
        swap_and_store<T, middle, First - middle, 0, middle>(first, received, shared.received, 0, shared.offset, to, add,
                                                             columns_exist);
    } else {
      store_lines<T, 0, First>(first, shared.offset + own_position, to, add, columns_exist);
      if constexpr (Second > 0) store_lines<T, 0, Second>(second, shared.offset + First, to, add, columns_exist);
    }
  }
}

}  // namespace effcore::cuda::conv3d::hopper
