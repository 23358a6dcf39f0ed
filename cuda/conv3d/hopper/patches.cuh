// out[patch, n] = bias[n] + sum over a patch's voxels of x[patch, voxel] W[n, voxel] on sm_90a: the product of a convolution
// whose stride is its kernel, without the matrix of patches.
//
// Bound: 2 K O FLOPs a patch on the tensor cores (4096 a cycle and multiprocessor): reading the voxels and writing the result
// are a third of it for tubelets of 2 x 16² and 768 channels. So this must be as good a product as the library's, and the
// gathering must cost nothing: the copy engine does it.
//
// A patch's lines of kw voxels come in pieces of 16 or 32 (32 or 64 bytes). The copy engine's im2col mode walks a tensor's
// positions in order, across lines, frames and batch, and brings a few channels of each: here positions are patches, and the
// "channels" are all voxels from a patch's first one on, at distance 1. Their coordinate says which piece is meant; that the
// positions' strides overlap with them does not matter to the engine. It writes a piece of all patches of a tile one below the
// other in the swizzle of that width, which wgmma reads as rows along the depth. So any 256 patches in a row make a tile,
// whatever the sizes.
//
// A cluster of two blocks computes 256 patches times two panels of columns; each fetches half of the patches' pieces for
// both, and its own columns' weights: 26 bytes a cycle from the second-level cache at 192 columns a block. The two warpgroups
// of a block take 128 patches each. Behind a tile's steps they get two stages of the ring to send their results from, by the
// copy engine, while the next tile's steps arrive in the others.
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

constexpr int patch_rows = 256, patch_depth = 32, patch_blocks = 2;  // of a tile, a step, a cluster
constexpr int patch_stages = 8;
constexpr int patch_consumers = 2, patch_threads = (patch_consumers + 1) * 128;
constexpr int patch_registers = 240, patch_fetching_registers = 24;
constexpr int out_box = 64;  // results leave in boxes of 64 x 64

struct PatchesParams {
  CUtensorMap x, weight, out;
  Divider volume, frame, line;  // patches of a batch row, a frame, a line
  int columns, tiles, pairs;    // tiles of rows, pairs of panels of columns
  int steps, piece;             // voxels of a piece
  int kernel[3];                // t, h, pieces of a line
  int step_c, step_t, step_h;   // elements
  const void* bias;
};

template <int Columns>
struct PatchesMemory {
  static constexpr int x_bytes = patch_rows * patch_depth * 2, weight_bytes = Columns * patch_depth * 2;
  struct Stage {
    char x[x_bytes], weight[weight_bytes];
  };
  static_assert(sizeof(Stage) % 1024 == 0 && sizeof(Stage) >= out_box * Columns * 2);
  Stage stage[patch_stages];
  sm90::Ring<patch_stages> ring;
};

// Rows of `bytes` (32 or 64) in the swizzle of that width, as an operand along the depth.
__device__ __forceinline__ std::uint64_t narrow_rows(int bytes) {
  const std::uint64_t swizzle = bytes == 32 ? 3 : 2, next_8_rows = static_cast<std::uint64_t>(bytes * 8 / 16);
  return swizzle << 62 | next_8_rows << 32 | 1 << 16;
}
__device__ __forceinline__ std::uint64_t at(std::uint64_t rows, std::uint32_t address) {
  return rows | (address & 0x3ffff) >> 4;
}

template <int Columns>
__device__ __forceinline__ void fetch_patches(const PatchesParams& p, PatchesMemory<Columns>& shared, int cluster, int clusters,
                                              int rank) {
  constexpr int rows = patch_rows / patch_blocks;
  using Memory = PatchesMemory<Columns>;
  sm90::Turn<patch_stages> turn;
  for (int item = cluster; item < p.tiles * p.pairs; item += clusters) {
    const int column = (item % p.pairs * patch_blocks + rank) * Columns;
    int w = item / p.pairs * patch_rows + rank * rows;
    const int b = p.volume.take(w), t = p.frame.take(w), h = p.line.take(w);
    int at_w = 0, at_h = 0, at_t = 0, line = 0;
    for (int step = 0; step < p.steps; ++step, turn.next()) {
      shared.ring.wait_empty(turn);
      shared.ring.expect(turn, Memory::x_bytes + Memory::weight_bytes);
      sm90::BarrierWord* const full = &shared.ring.full[turn.stage];
      auto& stage = shared.stage[turn.stage];
      cute::SM90_TMA_LOAD_2D::copy(&p.weight, full, static_cast<std::uint64_t>(sm90::Keep::last), stage.weight,
                                   step * patch_depth, column);
      for (int done = 0; done < patch_depth; done += p.piece) {
        cute::SM90_TMA_LOAD_IM2COL_MULTICAST_5D::copy(&p.x, full, (1 << patch_blocks) - 1,
                                                      stage.x + (done * patch_rows + rank * rows * p.piece) * 2,
                                                      line + at_w * p.piece, w, h, t, b, 0, 0, 0);
        if (++at_w < p.kernel[2]) continue;
        at_w = 0, line += p.step_h;
        if (++at_h < p.kernel[1]) continue;
        at_h = 0, line += p.step_t - p.kernel[1] * p.step_h;
        if (++at_t < p.kernel[0]) continue;
        at_t = 0, line += p.step_c - p.kernel[0] * p.step_t;
      }
    }
    for (int i = 0; i < patch_consumers; ++i, turn.next()) {  // for the results
      shared.ring.wait_empty(turn);
      sm90::Barrier::arrive(&shared.ring.full[turn.stage]);
    }
  }
}

// 64 rows of results to memory, as boxes of 64 columns in the swizzle that the copy engine reads; 16 rows a warp.
template <class T, int Columns>
__device__ __forceinline__ void stage_patches(const PatchesParams& p, const float (&sums)[Columns / 2], char* memory,
                                              int column) {
  const auto* const bias = static_cast<const T*>(p.bias) + column + threadIdx.x % 4 * 2;
  const int lane = threadIdx.x % 32, place = lane % 16, across = lane / 16;  // the row and chunk that the lane addresses
  const std::uint32_t row = shared_address(memory) + (threadIdx.x % 128 / 32 * 16 + place) * 128;
#pragma unroll
  for (int n = 0; n < Columns / 8; n += 2) {
    std::uint32_t x[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float2 add = make_float2(0.0f, 0.0f);
      if (p.bias != nullptr && column + (n + i) * 8 < p.columns)
        add = unpack<T>(*reinterpret_cast<const std::uint32_t*>(bias + (n + i) * 8));
      const float* const of = sums + 4 * (n + i);
      x[2 * i] = pack<T>(of[0] + add.x, of[1] + add.y), x[2 * i + 1] = pack<T>(of[2] + add.x, of[3] + add.y);
    }
    const std::uint32_t to = row + n / 8 * (out_box * 128) + ((n % 8 + across) ^ place % 8) * 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]),
                 "r"(x[3])
                 : "memory");
  }
}

// Rows and columns beyond the last ones are left out. By a warpgroup.
template <int Columns>
__device__ __forceinline__ void send_patches(const PatchesParams& p, const char* memory, int row, int column) {
  sm90::fence_async();
  cutlass::arch::NamedBarrier::sync(128, 1 + threadIdx.x / 128);
  if (threadIdx.x % 128 == 0) {
    for (int n = 0; n < Columns && column + n < p.columns; n += out_box)
      cute::SM90_TMA_STORE_2D::copy(&p.out, memory + n * (out_box * 2), column + n, row);
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();  // until they have been read
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
    const std::uint64_t x_rows = narrow_rows(p.piece * 2), weight_rows = narrow_rows(patch_depth * 2);
    // From a block of 16 along the depth to the next, and from one of 64 rows.
    const int next_x = p.piece == 16 ? patch_rows * 32 : 32, next_rows = 64 * p.piece * 2;
    sm90::Turn<patch_stages> turn;
    const auto release = [&](int stage) {  // to the producers of both blocks
      if (threadIdx.x % 128 < patch_blocks) sm90::Barrier::arrive(&shared.ring.empty[stage], threadIdx.x % 128, 1);
    };
    int staged = -1;  // the first stage of the last tile's results
    for (int item = cluster; item < p.tiles * p.pairs; item += clusters) {
      float upper[Columns / 2], lower[Columns / 2];
      int read = 0;
      for (int step = 0; step < p.steps; ++step) {
        shared.ring.wait_full(turn);
        const std::uint32_t x = shared_address(shared.stage[turn.stage].x) + warpgroup * 2 * next_rows,
                            weight = shared_address(shared.stage[turn.stage].weight);
        using Atom = typename sm90::Instruction<T, Columns, sm90::gmma::Major::K, sm90::gmma::Major::K>::Shared;
        sm90::pin(upper), sm90::pin(lower);
        sm90::wgmma_begin();
        [&]<int... I>(std::integer_sequence<int, I...>) {
#pragma unroll
          for (int k = 0; k < patch_depth / 16; ++k) {
            const auto scale = k > 0 || step > 0 ? sm90::gmma::ScaleOut::One : sm90::gmma::ScaleOut::Zero;
            const std::uint64_t b = at(weight_rows, weight + k * 32);
            Atom::fma(at(x_rows, x + k * next_x), b, upper[I]..., scale);
            Atom::fma(at(x_rows, x + k * next_x + next_rows), b, lower[I]..., scale);
          }
        }(std::make_integer_sequence<int, Columns / 2>{});
        sm90::wgmma_commit();
        sm90::wgmma_wait<1>();
        // A step's patches come from both blocks, so that both producers have had the stages of the last tile's results: they
        // must not be given back before.
        if (step > 0)
          release(read);
        else if (staged >= 0)
          for (int i = 0; i < patch_consumers; ++i) release((staged + i) % patch_stages);
        read = turn.stage;
        turn.next();
      }
      sm90::wgmma_wait<0>();
      sm90::pin(upper), sm90::pin(lower);
      release(read);
      const int row = item / p.pairs * patch_rows + warpgroup * 128, column = (item % p.pairs * patch_blocks + rank) * Columns;
      staged = turn.stage;
      for (int i = 0; i < patch_consumers; ++i, turn.next()) {
        if (i != warpgroup) continue;
        char* const to = reinterpret_cast<char*>(&shared.stage[turn.stage]);
        shared.ring.wait_full(turn);
        stage_patches<T, Columns>(p, upper, to, column);
        send_patches<Columns>(p, to, row, column);
        cutlass::arch::NamedBarrier::sync(128, 1 + threadIdx.x / 128);  // it has left
        stage_patches<T, Columns>(p, lower, to, column);
        send_patches<Columns>(p, to, row + 64, column);
        __syncwarp();
      }
    }
  }
  cute::cluster_sync();  // nobody ends while the other block still writes its memory or signals its barriers
}

}  // namespace effcore::cuda::conv3d::hopper
