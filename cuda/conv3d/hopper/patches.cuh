// out[patch, n] = bias[n] + sum over a patch's voxels of x[patch, voxel] W[n, voxel] on sm_90a: the product of a convolution
// whose stride is its kernel, without the matrix of patches.
//
// Bound: 2 K O FLOPs a patch on the tensor cores (4096 a cycle and multiprocessor): reading the voxels and writing the result
// are a third of it for tubelets of 2 x 16² and 768 channels. So this must be as good a product as the library's, and the
// gathering must cost nothing: the copy engine does it.
//
// The copy engine's im2col mode walks a tensor's positions in order, across lines, frames and batch, and brings a few channels
// of each as a row of shared memory. Here positions are patches, and the "channels" are all voxels from a patch's first one on,
// at distance 1; their coordinate says which piece of a patch is meant. (That the positions' strides overlap with them does not
// matter to the engine.) So any 256 patches in a row make a tile, whatever the sizes.
//
// What the engine does in a cycle is counted in rows, so they should be long: 128 bytes at most. Neighbouring patches' lines of
// 16 or 32 voxels lie side by side, and a position is a group of 1, 2 or 4 patches, as many as divide a line of patches. Row r
// then holds 16 voxels of patches `group` r + j at 16 j of the depth: a product whose depth begins there has patches j,
// group + j, ... as its rows. Results leave by a map that has j as a dimension.
//
// A cluster of two blocks computes two tiles times one panel of columns; each fetches half of the weights for both: 29 bytes a
// cycle from the second-level cache at 192 columns. The two warpgroups of a block take 128 patches each. Behind a tile's steps
// they get a stage of the ring to send their results from, by the copy engine, while the next tile's steps arrive in the
// others.
#pragma once
#include <cuda.h>

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "common/overlap.cuh"
#include "conv3d/params.h"
#include "hopper/pipeline.cuh"
#include "hopper/wgmma.cuh"

namespace effcore::cuda::conv3d::hopper {

namespace sm90 = effcore::cuda::hopper;

constexpr int patch_consumers = 2;                                                     // warpgroups of 2 x 64 patches
constexpr int patch_rows = patch_consumers * 128, patch_depth = 64, patch_blocks = 2;  // of a tile, a step, a cluster
constexpr int patch_stages = 4, patch_threads = (patch_consumers + 1) * 128;
constexpr int patch_registers = 232, patch_fetching_registers = 40;
constexpr int out_box = 64;  // results leave in boxes of 64 x 64

struct PatchesParams {
  CUtensorMap x, weight, out;
  Divider volume, frame, line;  // groups of patches of a batch row, a frame, a line
  int columns, pairs, panels;   // pairs of tiles of rows, panels of columns
  int steps, group, piece;      // patches of a group, voxels of each in a row
  int kernel[3];                // t, h, pieces of a line
  int step_c, step_t, step_h;   // elements
  int channels, end;            // end: behind all voxels of a group
  const void* bias;
};

template <int Columns>
struct PatchesMemory {
  static constexpr int x_bytes = patch_rows * patch_depth * 2, weight_bytes = Columns * patch_depth * 2;
  struct Stage {
    char x[x_bytes], weight[weight_bytes];
  };
  static_assert(sizeof(Stage) % 1024 == 0 && sizeof(Stage) >= patch_consumers * 2 * out_box * out_box * 2);
  Stage stage[patch_stages];
  sm90::Ring<patch_stages> ring;
};

// Rows of `bytes` (32, 64 or 128) in the swizzle of that width, as an operand along the depth.
__device__ __forceinline__ std::uint64_t narrow_rows(int bytes) {
  const std::uint64_t swizzle = bytes == 32 ? 3 : bytes == 64 ? 2 : 1, next_8_rows = static_cast<std::uint64_t>(bytes * 8 / 16);
  return swizzle << 62 | next_8_rows << 32 | 1 << 16;
}
__device__ __forceinline__ std::uint64_t at(std::uint64_t rows, std::uint32_t address) {
  return rows | (address & 0x3ffff) >> 4;
}

template <int Columns>
__device__ __forceinline__ void fetch_patches(const PatchesParams& p, PatchesMemory<Columns>& shared, int cluster, int clusters,
                                              int rank) {
  constexpr auto keep = static_cast<std::uint64_t>(sm90::Keep::last);
  constexpr int half = Columns / patch_blocks;
  using Memory = PatchesMemory<Columns>;
  sm90::Turn<patch_stages> turn;
  for (int item = cluster; item < p.pairs * p.panels; item += clusters) {
    const int column = item % p.panels * Columns + rank * half;
    int w = (item / p.panels * patch_blocks + rank) * (patch_rows / p.group);
    const int b = p.volume.take(w), t = p.frame.take(w), h = p.line.take(w);
    int at_w = 0, at_h = 0, at_t = 0, channel = 0, line = 0;
    for (int step = 0; step < p.steps; ++step, turn.next()) {
      shared.ring.wait_empty(turn);
      shared.ring.expect(turn, Memory::x_bytes + Memory::weight_bytes);
      sm90::BarrierWord* const full = &shared.ring.full[turn.stage];
      auto& stage = shared.stage[turn.stage];
      cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&p.weight, full, (1 << patch_blocks) - 1, keep, stage.weight + rank * half * 128,
                                             step * patch_depth, column);
      for (int done = 0; done < patch_depth; done += p.piece) {
        cute::SM90_TMA_LOAD_IM2COL_5D::copy(&p.x, full, stage.x + done * patch_rows * 2, line + at_w * p.piece, w, h, t, b, 0,
                                            0, 0);
        if (++at_w < p.kernel[2]) continue;
        at_w = 0, line += p.step_h;
        if (++at_h < p.kernel[1]) continue;
        at_h = 0, line += p.step_t - p.kernel[1] * p.step_h;
        if (++at_t < p.kernel[0]) continue;
        at_t = 0, line += p.step_c - p.kernel[0] * p.step_t;
        // What a last step lacks is read behind the group's end, and behind that of the weights: zeros.
        if (++channel == p.channels) line = p.end;
      }
    }
    shared.ring.wait_empty(turn);  // for the results
    sm90::Barrier::arrive(&shared.ring.full[turn.stage]);
    turn.next();
  }
}

// The results of 64 groups' patch `j` to device memory, by a warpgroup: 64 columns at a time through one of two places in
// shared memory, in the swizzle that the copy engine reads. What lies beyond the last row or column is left out.
template <class T, int Columns>
__device__ __forceinline__ void store_patches(const PatchesParams& p, const float (&sums)[Columns / 2], char* memory, int j,
                                              int first_group, int column, bool again) {
  const auto* const bias = static_cast<const T*>(p.bias) + column + threadIdx.x % 4 * 2;
  const int lane = threadIdx.x % 32, place = lane % 16, across = lane / 16;  // the row and chunk that the lane addresses
  const int barrier = 1 + threadIdx.x / 128;
#pragma unroll
  for (int box = 0; box < Columns / out_box; ++box) {
    char* const from = memory + (box + (again ? Columns / out_box : 0)) % 2 * (out_box * out_box * 2);
    if (box >= 2 || again) {
      if (threadIdx.x % 128 == 0) cute::tma_store_wait<1>();
      cutlass::arch::NamedBarrier::sync(128, barrier);
    }
    const std::uint32_t to = shared_address(from) + (threadIdx.x % 128 / 32 * 16 + place) * 128;
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
      std::uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int block = box * 8 + n + i;
        float2 add = make_float2(0.0f, 0.0f);
        if (p.bias != nullptr && column + block * 8 < p.columns)
          add = unpack<T>(*reinterpret_cast<const std::uint32_t*>(bias + block * 8));
        const float* const of = sums + 4 * block;
        x[2 * i] = pack<T>(of[0] + add.x, of[1] + add.y), x[2 * i + 1] = pack<T>(of[2] + add.x, of[3] + add.y);
      }
      asm volatile(
          "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + ((n + across) ^ place % 8) * 16),
          "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
          : "memory");
    }
    sm90::fence_async();
    cutlass::arch::NamedBarrier::sync(128, barrier);
    if (threadIdx.x % 128 == 0) {
      if (column + box * out_box < p.columns)
        cute::SM90_TMA_STORE_3D::copy(&p.out, from, column + box * out_box, j, first_group);
      cute::tma_store_arrive();
    }
  }
}

template <class T, int Columns>
__global__ void __cluster_dims__(patch_blocks, 1, 1) __launch_bounds__(patch_threads, 1)
    conv3d_patches_kernel(const __grid_constant__ PatchesParams p) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<PatchesMemory<Columns>*>(memory);
  if (threadIdx.x == 0) {
    shared.ring.init(patch_blocks * patch_consumers);
    cutlass::arch::fence_barrier_init();
  }
  cute::cluster_sync();
  wait_for_kernel_before();
  const int rank = static_cast<int>(cute::block_rank_in_cluster());
  const int cluster = static_cast<int>(blockIdx.x) / patch_blocks, clusters = static_cast<int>(gridDim.x) / patch_blocks;
  const int warpgroup = sm90::uniform(static_cast<int>(threadIdx.x) / 128);
  if (warpgroup == patch_consumers) {
    cutlass::arch::warpgroup_reg_dealloc<patch_fetching_registers>();
    if (threadIdx.x == patch_consumers * 128) fetch_patches(p, shared, cluster, clusters, rank);
    __syncwarp();
  } else {
    cutlass::arch::warpgroup_reg_alloc<patch_registers>();
    const std::uint64_t x_rows = narrow_rows(p.group * p.piece * 2);
    // Where the warpgroup's two times 64 groups begin in a stage, which of their patches it takes, and where the next blocks of
    // 16 along the depth are.
    const int number[2] = {warpgroup * 2, warpgroup * 2 + 1};
    const auto begin = [&](int i) { return (number[i] / p.group * 64 * p.group + number[i] % p.group) * p.piece * 2; };
    const int upper_begin = begin(0), lower_begin = begin(1);
    const int next = p.piece == 16 ? patch_rows * 32 : 32, after_next = p.piece == 64 ? 64 : patch_rows * 64;
    sm90::Turn<patch_stages> turn;
    const auto release = [&](int stage) {  // to the producers of both blocks
      if (threadIdx.x % 128 < patch_blocks) sm90::Barrier::arrive(&shared.ring.empty[stage], threadIdx.x % 128, 1);
    };
    int staged = -1;  // the stage of the last tile's results
    for (int item = cluster; item < p.pairs * p.panels; item += clusters) {
      float upper[Columns / 2], lower[Columns / 2];
      int read = 0;
      for (int step = 0; step < p.steps; ++step) {
        shared.ring.wait_full(turn);
        const std::uint32_t x = shared_address(shared.stage[turn.stage].x);
        const sm90::SharedOperand<false> b(shared_address(shared.stage[turn.stage].weight), Columns, false);
        using Atom = typename sm90::Instruction<T, Columns, sm90::gmma::Major::K, sm90::gmma::Major::K>::Shared;
        sm90::pin(upper), sm90::pin(lower);
        sm90::wgmma_begin();
        [&]<int... I>(std::integer_sequence<int, I...>) {
#pragma unroll
          for (int k = 0; k < patch_depth / 16; ++k) {
            const auto scale = k > 0 || step > 0 ? sm90::gmma::ScaleOut::One : sm90::gmma::ScaleOut::Zero;
            const std::uint32_t from = x + k % 2 * next + k / 2 * after_next;
            Atom::fma(at(x_rows, from + upper_begin), b.at(k), upper[I]..., scale);
            Atom::fma(at(x_rows, from + lower_begin), b.at(k), lower[I]..., scale);
          }
        }(std::make_integer_sequence<int, Columns / 2>{});
        sm90::wgmma_commit();
        sm90::wgmma_wait<1>();
        // A step's weights come from both blocks, so that both producers have had the stage of the last tile's results: it must
        // not be given back before. It has been read long since.
        if (step > 0) {
          release(read);
        } else if (staged >= 0) {
          if (threadIdx.x % 128 == 0) cute::tma_store_wait<0>();
          __syncwarp();
          release(staged);
        }
        read = turn.stage;
        turn.next();
      }
      sm90::wgmma_wait<0>();
      sm90::pin(upper), sm90::pin(lower);
      release(read);
      staged = turn.stage;
      shared.ring.wait_full(turn);
      turn.next();
      char* const to = reinterpret_cast<char*>(&shared.stage[staged]) + warpgroup * 2 * (out_box * out_box * 2);
      const int first_group = (item / p.panels * patch_blocks + rank) * (patch_rows / p.group),
                column = item % p.panels * Columns;
      const auto store = [&](const float (&sums)[Columns / 2], int i) {
        store_patches<T, Columns>(p, sums, to, number[i] % p.group, first_group + number[i] / p.group * 64, column, i != 0);
      };
      store(upper, 0), store(lower, 1);
    }
    if (threadIdx.x % 128 == 0) cute::tma_store_wait<0>();
  }
  cute::cluster_sync();  // nobody ends while the other block still writes its memory or signals its barriers
}

}  // namespace effcore::cuda::conv3d::hopper
