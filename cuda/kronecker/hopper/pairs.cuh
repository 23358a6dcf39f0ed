// Tiles of the upper triangle two by two: what a block of the kernel for sm_90a computes at a time.
//
// Rows 2i and 2i + 1 share the columns right of them; at column 2i + 1 the second tile lies on the diagonal and its rows are
// the columns already. What is left, the diagonal's tiles (2i, 2i), goes in pairs that share nothing. So three operands of 128
// columns make two tiles, and two operands do where the diagonal is met: 85 FLOPs a byte of x instead of 64.
#pragma once

namespace effcore::cuda::kronecker::hopper {

struct Pair {
  int rows[2];     // the tiles' rows, in blocks; rows[1] is rows[0] where there is one tile alone
  int columns[2];  // and columns
  __device__ bool alone() const { return rows[0] == rows[1]; }
  // Which of the operands rows[0], rows[1], columns[0] a tile's columns are.
  __device__ int operand(int tile) const { return columns[tile] == rows[tile] ? tile : columns[tile] == rows[1] ? 1 : 2; }
  __device__ int operands() const { return alone() ? 1 : operand(0) == 2 ? 3 : 2; }
};

// Of a triangle of n blocks.
__host__ __device__ constexpr int pairs(int n) {
  const int full = n / 2, diagonal = n - full;
  return full * (n - full) + (diagonal + 1) / 2;
}

__device__ __forceinline__ Pair pair(int number, int n) {
  for (int row = 0, length = n - 1; length > 0; row += 2, length -= 2) {
    const int column = row + 1 + number;
    if (number < length) return {{row, row + 1}, {column, column}};
    number -= length;
  }
  const int first = 4 * number, second = first + 2 < n ? first + 2 : first;
  return {{first, second}, {first, second}};
}

}  // namespace effcore::cuda::kronecker::hopper
