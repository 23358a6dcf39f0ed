// Products of 16 x 16 blocks by one warp: C[16 x 16] += A[16 x 16] B[16 x 16], accumulated in float32.
//
// Layout (that of mma.sync.m16n8k16), with r = lane / 4 and c = 2 * (lane % 4); each entry is the pair of columns c, c + 1:
//   A  rows x depth   [0] (r, c)  [1] (r + 8, c)  [2] (r, c + 8)  [3] (r + 8, c + 8)
//   B  depth x columns, pairs along the depth   [0] (c, r)  [1] (c + 8, r)  [2] (c, r + 8)  [3] (c + 8, r + 8)
//   C  two accumulators of 8 columns, each {(r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1)}
// Two neighbouring accumulators are therefore an A operand of the next product once they are rounded: P never leaves registers.
//
// bfloat16 and float16 run on the tensor cores. float32 runs on the FMA units with the same layout: operands reach their lanes
// by shuffles, which bound it to about a quarter of the FMA peak; it is there to be right, and no TF32 rounding is.
#pragma once
#include "common/element.cuh"

namespace effcore::cuda {

template <class T>
struct Operand {
  std::uint32_t reg[4];
};
template <>
struct Operand<float> {
  float reg[8];
};

template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const Operand<T>& a, std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b0), "r"(b1));
}

template <class T>
__device__ __forceinline__ void multiply_add(float (&left)[4], float (&right)[4], const Operand<T>& a, const Operand<T>& b) {
  if constexpr (is_16bit<T>) {
    mma_16x8x16<T>(left, a, b.reg[0], b.reg[1]);
    mma_16x8x16<T>(right, a, b.reg[2], b.reg[3]);
  } else {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int depth = 0; depth < 16; ++depth) {
      const int half = depth / 8, element = depth % 2, holder = (depth % 8) / 2;
      const float a0 = __shfl_sync(~0u, a.reg[4 * half + element], (lane & ~3) | holder);
      const float a1 = __shfl_sync(~0u, a.reg[4 * half + 2 + element], (lane & ~3) | holder);
      const int column = 8 * (lane & 3) + holder;  // of the lane that holds B's column c; column c + 1 is four lanes on
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float (&c)[4] = side == 0 ? left : right;
        const float b0 = __shfl_sync(~0u, b.reg[4 * side + 2 * half + element], column);
        const float b1 = __shfl_sync(~0u, b.reg[4 * side + 2 * half + element], column + 4);
        c[0] = fmaf(a0, b0, c[0]), c[1] = fmaf(a0, b1, c[1]);
        c[2] = fmaf(a1, b0, c[2]), c[3] = fmaf(a1, b1, c[3]);
      }
    }
  }
}

// accumulators[m] += A B over `depth` blocks of 16, with operands that a(m, k) and b(k, n) give: `rows` blocks of 16 rows share
// every operand B. float32 keeps the loop over the depth rolled where A comes from memory (one block is 100 shuffles and 128
// FMAs). Asking for the next operands ahead of these products was tried: ptxas orders them alike, and D = 128 loses 5 % to
// spills.
template <class T, int rows, int depth, int columns, bool a_in_registers = false, class A, class B>
__device__ __forceinline__ void product(float (*accumulators)[2 * columns][4], const A& a, const B& b) {
  constexpr int unroll = is_16bit<T> || a_in_registers ? depth : 1;
#pragma unroll unroll
  for (int k = 0; k < depth; ++k) {
    Operand<T> a_operands[rows];
#pragma unroll
    for (int m = 0; m < rows; ++m) a_operands[m] = a(m, k);
#pragma unroll
    for (int n = 0; n < columns; ++n) {
      const Operand<T> b_operand = b(k, n);
#pragma unroll
      for (int m = 0; m < rows; ++m) multiply_add(accumulators[m][2 * n], accumulators[m][2 * n + 1], a_operands[m], b_operand);
    }
  }
}

// Two neighbouring accumulators as the A operand of the next product, and back.
template <class T>
__device__ __forceinline__ Operand<T> as_operand(const float (&left)[4], const float (&right)[4]) {
  Operand<T> a;
  if constexpr (is_16bit<T>) {
    a.reg[0] = pack<T>(left[0], left[1]), a.reg[1] = pack<T>(left[2], left[3]);
    a.reg[2] = pack<T>(right[0], right[1]), a.reg[3] = pack<T>(right[2], right[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) a.reg[i] = left[i], a.reg[4 + i] = right[i];
  }
  return a;
}
template <class T>
__device__ __forceinline__ void as_accumulators(const Operand<T>& a, float (&left)[4], float (&right)[4]) {
  if constexpr (is_16bit<T>) {
    const float2 x0 = unpack<T>(a.reg[0]), x1 = unpack<T>(a.reg[1]), y0 = unpack<T>(a.reg[2]), y1 = unpack<T>(a.reg[3]);
    left[0] = x0.x, left[1] = x0.y, left[2] = x1.x, left[3] = x1.y;
    right[0] = y0.x, right[1] = y0.y, right[2] = y1.x, right[3] = y1.y;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] = a.reg[i], right[i] = a.reg[4 + i];
  }
}

// The four lanes of a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

template <int Tiles>
__device__ __forceinline__ void clear(float (&accumulators)[Tiles][4]) {
#pragma unroll
  for (int n = 0; n < Tiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) accumulators[n][i] = 0.0f;
}

}  // namespace effcore::cuda
