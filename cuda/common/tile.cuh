// Tiles of a matrix in shared memory: rows of `Columns` elements whose 16-byte chunks are swizzled by the row (chunk ^ row %
// 8), so that the eight rows that an ldmatrix reads stand in different banks. A tile starts at a multiple of 1024 bytes.
#pragma once
#include "common/fragment.cuh"

namespace effcore::cuda {

// One head's matrix in device memory: rows `stride` elements apart, `columns` of them contiguous.
template <class T>
struct Matrix {
  const T* data;
  std::int64_t stride;
  int columns;
  bool aligned;  // base, stride and width are multiples of 16 bytes
};

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes, or writes zeros where !valid; completes with async_wait.
__device__ __forceinline__ void async_copy_16(std::uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void async_copy_4(std::uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int Pending>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

template <class T, int Columns>
struct Tile {
  static constexpr int chunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int row_bytes = Columns * static_cast<int>(sizeof(T));
  static_assert(row_bytes >= 128, "the swizzle needs eight chunks a row");

  char* data;

  __device__ explicit Tile(void* p) : data(static_cast<char*>(p)) {}

  __device__ static int offset(int row, int column) {
    return row * row_bytes + (((column / chunk) ^ (row & 7)) * 16) + (column % chunk) * static_cast<int>(sizeof(T));
  }
  __device__ T* at(int row, int column) const { return reinterpret_cast<T*>(data + offset(row, column)); }

  // Operands out of the tile; row and column are multiples of 16 (of 8 for rows). "Transposed": the tile holds A^T (depth x
  // rows) or B as depth x columns; otherwise A as rows x depth and B^T as columns x depth.
  __device__ Operand<T> a(int row, int depth) const { return load<false, false>(row, depth); }
  __device__ Operand<T> a_transposed(int depth, int row) const { return load<true, true>(depth, row); }
  __device__ Operand<T> b(int column, int depth) const { return load<true, false>(column, depth); }
  __device__ Operand<T> b_transposed(int depth, int column) const { return load<false, true>(depth, column); }

 private:
  // The four 8 x 8 blocks of a 16 x 16 operand come in one of two orders: down first, or across first.
  template <bool AcrossFirst, bool Transposed>
  __device__ __forceinline__ Operand<T> load(int row, int column) const {
    Operand<T> out;
    const int lane = threadIdx.x & 31;
    if constexpr (is_16bit<T>) {
      const int down = AcrossFirst ? (lane & 16) / 2 : lane & 8, across = AcrossFirst ? (lane & 8) / 8 : (lane & 16) / 16;
      // The lane's own place is computed once; a column moves it by XOR (tiles are aligned to their rows), a row by addition.
      const std::uint32_t place = shared_address(data) + ((lane & 7) + down) * row_bytes + ((across ^ (lane & 7)) * 16);
      const std::uint32_t address = (place ^ (column * 2)) + row * row_bytes;
      if constexpr (Transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(out.reg[0]), "=r"(out.reg[1]), "=r"(out.reg[2]), "=r"(out.reg[3])
                     : "r"(address)
                     : "memory");
      else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(out.reg[0]), "=r"(out.reg[1]), "=r"(out.reg[2]), "=r"(out.reg[3])
                     : "r"(address)
                     : "memory");
    } else {
      const int r = lane / 4, c = 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int down = AcrossFirst ? i / 2 * 8 : i % 2 * 8, across = AcrossFirst ? i % 2 * 8 : i / 2 * 8;
#pragma unroll
        for (int e = 0; e < 2; ++e)
          out.reg[2 * i + e] =
              Transposed ? *at(row + down + c + e, column + across + r) : *at(row + down + r, column + across + c + e);
      }
    }
    return out;
  }
};

// Starts copying rows [row0, row0 + Rows) of `m` into the tile; rows outside [low, high) and columns beyond the matrix become
// zeros (so that memory which no query may see, NaN or not, is never multiplied). Unaligned matrices are copied element by
// element.
template <int Rows, int Threads, class T, int Columns>
__device__ __forceinline__ void load_tile(const Tile<T, Columns>& tile, const Matrix<T>& m, int row0, int low, int high) {
  constexpr int chunks = Columns / Tile<T, Columns>::chunk, step = Threads / chunks;
  static_assert(Threads % chunks == 0 && (Rows % step == 0 || Rows < step));
  if (m.aligned) {
    const int column = threadIdx.x % chunks * Tile<T, Columns>::chunk, first = threadIdx.x / chunks;
    const bool inside = column < m.columns;
    const T* from = m.data + (row0 + first) * m.stride + column;
    const std::uint32_t base = shared_address(tile.data);
#pragma unroll
    for (int r = 0; r < Rows; r += step) {
      const int row = row0 + first + r;
      const bool valid = inside && row >= low && row < high;
      if (Rows >= step || first < Rows) async_copy_16(base + tile.offset(first + r, column), valid ? from : m.data, valid);
      from += step * m.stride;
    }
  } else {
    for (int i = threadIdx.x; i < Rows * Columns; i += Threads) {
      const int r = i / Columns, column = i % Columns, row = row0 + r;
      const bool valid = column < m.columns && row >= low && row < high;
      *tile.at(r, column) = valid ? m.data[row * m.stride + column] : from_float<T>(0.0f);
    }
  }
}

}  // namespace effcore::cuda
