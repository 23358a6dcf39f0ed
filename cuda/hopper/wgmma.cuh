// Products of 64-row tiles by one warpgroup: D[64 x N] += A[64 x 16] B[16 x N], asynchronous, accumulated in float32, on CuTe's
// instruction wrappers.
//
// Operands in shared memory are panels of 64 elements (128 bytes) a row in the 128-byte swizzle that TMA writes, each panel at
// a multiple of 1024 bytes; `rows * 128` bytes further stands the panel of the next 64 columns. Read along the rows (the depth
// of the product runs along a panel's columns) or transposed (the depth runs down its rows).
//
// Layout of D, with thread t of the warpgroup, r = t / 32 * 16 + t % 32 / 4 and c = 2 * (t % 4): d[4 n .. 4 n + 3] are
// (r, 8 n + c), (r, 8 n + c + 1), (r + 8, 8 n + c), (r + 8, 8 n + c + 1). Rounded and paired, d[8 j .. 8 j + 7] are the A
// operand of the next product for its depth 16 j .. 16 j + 15.
#pragma once
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "common/fragment.cuh"
#include "common/tile.cuh"

namespace effcore::cuda::hopper {

namespace gmma = cute::SM90::GMMA;

constexpr int panel_columns = 64, panel_row_bytes = 128;

// The instruction for N columns of T.
template <class T, int N, gmma::Major a, gmma::Major b>
struct Instruction;
#define EFFCORE_WGMMA(N)                                                       \
  template <gmma::Major a, gmma::Major b>                                      \
  struct Instruction<bf16, N, a, b> {                                          \
    using Shared = gmma::MMA_64x##N##x16_F32BF16BF16_SS<a, b>;                 \
    using Registers = gmma::MMA_64x##N##x16_F32BF16BF16_RS<gmma::Major::K, b>; \
  };                                                                           \
  template <gmma::Major a, gmma::Major b>                                      \
  struct Instruction<fp16, N, a, b> {                                          \
    using Shared = gmma::MMA_64x##N##x16_F32F16F16_SS<a, b>;                   \
    using Registers = gmma::MMA_64x##N##x16_F32F16F16_RS<gmma::Major::K, b>;   \
  };
EFFCORE_WGMMA(32)
EFFCORE_WGMMA(64)
EFFCORE_WGMMA(96)
EFFCORE_WGMMA(128)
EFFCORE_WGMMA(192)
EFFCORE_WGMMA(256)
#undef EFFCORE_WGMMA

constexpr gmma::Major major(bool transposed) {
  return transposed ? gmma::Major::MN : gmma::Major::K;
}

// A value that all lanes have, said to the compiler by a shuffle: what follows from it stays in uniform registers, where wgmma
// takes its descriptors from, rather than moving there before each product. The lane is added so that the shuffle is not
// dropped as one that changes nothing.
__device__ __forceinline__ int uniform(int x) {
  return __shfl_sync(~0u, x + static_cast<int>(threadIdx.x % 32), 0);
}

// An operand in shared memory: `rows` rows of panels from `address`, a multiple of 1024, on.
template <bool transposed>
struct SharedOperand {
  std::uint32_t low;
  std::uint32_t panel_step;  // in units of 16 bytes, as all of a descriptor

  // `say_uniform` where it is built before a batch of products; between batches under way its shuffle would serialise them.
  __device__ __forceinline__ SharedOperand(std::uint32_t address, int rows, bool say_uniform = true)
      : low(static_cast<std::uint32_t>(rows * panel_row_bytes / 16) << 16 | (address & 0x3ffff) >> 4),
        panel_step(static_cast<std::uint32_t>(rows * panel_row_bytes / 16)) {
    if (say_uniform) low = static_cast<std::uint32_t>(uniform(static_cast<int>(low)));
  }

  // Block k of 16 along the depth.
  __device__ __forceinline__ std::uint64_t at(int k) const {
    constexpr std::uint64_t swizzle_128 = 1ull << 62, next_8_rows = 1024 / 16;
    const std::uint32_t step = transposed
                                   ? static_cast<std::uint32_t>(k * panel_row_bytes)
                                   : static_cast<std::uint32_t>(k / 4) * panel_step + static_cast<std::uint32_t>(k % 4 * 2);
    return swizzle_128 | next_8_rows << 32 | (low + step);
  }
};

// d (+)= A B over `depth` blocks of 16, with both operands in shared memory.
template <class T, int N, int depth, bool a_transposed, bool b_transposed>
__device__ __forceinline__ void multiply(float (&d)[N / 2], const SharedOperand<a_transposed>& a,
                                         const SharedOperand<b_transposed>& b, bool accumulate) {
  using Atom = typename Instruction<T, N, major(a_transposed), major(b_transposed)>::Shared;
#pragma unroll
  for (int k = 0; k < depth; ++k) {
    const auto scale = k > 0 || accumulate ? gmma::ScaleOut::One : gmma::ScaleOut::Zero;
    [&]<int... I>(std::integer_sequence<int, I...>) {
      Atom::fma(a.at(k), b.at(k), d[I]..., scale);
    }(std::make_integer_sequence<int, N / 2>{});
  }
}

// The same with A in registers.
template <class T, int N, int depth, bool b_transposed>
__device__ __forceinline__ void multiply(float (&d)[N / 2], const std::uint32_t (&a)[depth][4],
                                         const SharedOperand<b_transposed>& b, bool accumulate) {
  using Atom = typename Instruction<T, N, gmma::Major::K, major(b_transposed)>::Registers;
#pragma unroll
  for (int k = 0; k < depth; ++k) {
    const auto scale = k > 0 || accumulate ? gmma::ScaleOut::One : gmma::ScaleOut::Zero;
    [&]<int... I>(std::integer_sequence<int, I...>) {
      Atom::fma(a[k][0], a[k][1], a[k][2], a[k][3], b.at(k), d[I]..., scale);
    }(std::make_integer_sequence<int, N / 2>{});
  }
}

// Around products: `begin` before the first of a batch, `commit` behind the last, `wait` until at most `Pending` batches are
// under way. The compiler must not move accumulators across: `pin` them.
__device__ __forceinline__ void wgmma_begin() {
  cute::warpgroup_arrive();
}
__device__ __forceinline__ void wgmma_commit() {
  cute::warpgroup_commit_batch();
}
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  cute::warpgroup_wait<Pending>();
}
template <int Count>
__device__ __forceinline__ void pin(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) cute::warpgroup_fence_operand(d[i]);
}

}  // namespace effcore::cuda::hopper
