// C [m, n] (+)= A [m, k] B [k, n] on blocks that fit the caches: the one matrix product of the SIMD engine.
//
// Bound: FLOPs. A register tile of tile_rows x tile_vectors accumulators takes, for each step of k, tile_vectors loads of B
// and tile_rows broadcasts of A: with 6 x 4 zmm 10 loads (2 a cycle) beside 24 multiply-adds (2 a cycle).
//
// A has any strides (a transposed operand costs nothing: its elements are broadcast one by one). B is packed in panels of
// `panel` columns, [columns / panel][k][panel], so that a panel of 64 steps (16 KiB) stays in the first-level cache for all
// rows and power-of-two strides of the tensor never meet in one cache set. C is row-major, its rows padded to whole vectors.
#pragma once
#include "simd.h"

namespace effcore::attention::EFFCORE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int tile_rows = 6, tile_vectors = 4;
#else
constexpr int tile_rows = 6, tile_vectors = 2;  // 16 registers: 12 sums, 2 of B, 1 of A
#endif
template <class T>
constexpr std::int64_t panel = tile_vectors * width<T>;

template <class Operand, class T = Operand>
struct Product {
  std::int64_t m = 0, n = 0, k = 0;
  const Operand* a = nullptr;
  std::int64_t a_row = 0, a_column = 1;
  const Operand* b = nullptr;
  std::int64_t b_panel = 0;  // elements from one panel to the next
  T* c = nullptr;
  std::int64_t c_row = 0;
  bool add = true;
  // What a causal or ragged block leaves out, by row of C (null: nothing): columns that are not needed, and the range of k
  // where A is not zero. Neither may fall from one row to the next; the product may compute more than that.
  const std::int32_t* columns = nullptr;
  const std::int32_t* k_begin = nullptr;
  const std::int32_t* k_end = nullptr;
};

template <class T, int rows, int vectors>
[[gnu::noinline]] void multiply_tile(std::int64_t k, const T* a, std::int64_t a_row, std::int64_t a_column, const T* b, T* c,
                                     std::int64_t c_row, bool add) {
  Vector<T> sum[rows][vectors] = {};
  for (std::int64_t step = 0; step < k; ++step, a += a_column, b += panel<T>) {
    Vector<T> x[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) x[v] = load(b + v * width<T>);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vector<T> y = broadcast(a[r * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[r][v] += y * x[v];
    }
  }
  // C is added at the end: its addresses then need no registers during the loop.
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r, c += c_row)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(c + v * width<T>, add ? load(c + v * width<T>) + sum[r][v] : sum[r][v]);
}

// Multiplies block by block. Tiles says how many rows and columns of C it takes at once, of which panel of B, and so many steps
// of k that B's stay in the first-level cache while all rows pass over them; k begins at a multiple of its `steps`.
template <class Tiles, class Operand, class T>
void multiply_blocks(const Product<Operand, T>& p) {
  // The first step of k initialises C even where nothing is added after it.
  for (std::int64_t k0 = 0; k0 == 0 || k0 < p.k; k0 += Tiles::most_steps) {
    const std::int64_t k1 = least(k0 + Tiles::most_steps, p.k);
    const bool add = p.add || k0 > 0;
    for (std::int64_t j = 0; j < p.n; j += Tiles::columns)
      for (std::int64_t i = 0; i < p.m; i += Tiles::rows) {
        const std::int64_t rows = least(Tiles::rows, p.m - i), last = i + rows - 1;
        const std::int64_t columns = least(Tiles::columns, (p.columns != nullptr ? p.columns[last] : p.n) - j);
        const std::int64_t begin = p.k_begin != nullptr ? most(k0, p.k_begin[i] / Tiles::steps * Tiles::steps) : k0;
        const std::int64_t end = p.k_end != nullptr ? least(k1, p.k_end[last]) : k1;
        if (columns <= 0 || (add && end <= begin)) continue;
        Tiles::multiply(p, rows, columns, end - begin, p.a + i * p.a_row + begin * p.a_column,
                        p.b + j / Tiles::panel * p.b_panel + begin * Tiles::panel, p.c + i * p.c_row + j, add);
      }
  }
}

template <class T, class>
struct VectorTable;
template <class T, int... index>
struct VectorTable<T, std::integer_sequence<int, index...> > {
  static constexpr decltype(&multiply_tile<T, 1, 1>) tiles[] = {
      multiply_tile<T, index / tile_vectors + 1, index % tile_vectors + 1>...};
};

template <class T>
struct VectorTiles {
  static constexpr std::int64_t rows = tile_rows, columns = attention::EFFCORE_ISA::panel<T>, panel = columns;
  static constexpr std::int64_t steps = 1, most_steps = 128;

  static void multiply(const Product<T>& p, std::int64_t rows, std::int64_t columns, std::int64_t k, const T* a, const T* b,
                       T* c, bool add) {
    using Table = VectorTable<T, std::make_integer_sequence<int, tile_rows * tile_vectors> >;
    Table::tiles[(rows - 1) * tile_vectors + (columns - 1) / width<T>](k, a, p.a_row, p.a_column, b, c, p.c_row, add);
  }
};

// B = the rows [0, rows) of a matrix with n columns; steps [first, first + rows) of the packed [k, n]. Rows out of
// [valid_begin, valid_end) (numbered from 0) become 0: what nobody sees must not bring its NaN along.
template <class T, class Storage>
void pack_rows(T* packed, std::int64_t k, std::int64_t first, const Storage* from, std::int64_t row_stride, std::int64_t rows,
               std::int64_t n, std::int64_t valid_begin, std::int64_t valid_end) {
  for (std::int64_t j = 0; j < n; j += panel<T>) {
    T* to = packed + j * k + first * panel<T>;
    const std::int64_t columns = least(panel<T>, n - j);
    for (std::int64_t r = 0; r < rows; ++r)
      load_row(to + r * panel<T>, from + r * row_stride + j, r >= valid_begin && r < valid_end ? columns : 0, panel<T>);
  }
}

// B = the transpose of such rows: columns [first, first + rows) of the packed [k, n], first a multiple of the vector width;
// what is left of the last vector becomes 0.
template <class T, class Storage>
void pack_transposed(T* packed, std::int64_t k, std::int64_t first, const Storage* from, std::int64_t row_stride,
                     std::int64_t rows, std::int64_t valid_begin, std::int64_t valid_end) {
  constexpr std::int64_t n = width<T>;
  for (std::int64_t j = 0; j < rows; j += n) {
    T* to = packed + (first + j) / panel<T> * panel<T> * k + (first + j) % panel<T>;
    for (std::int64_t step = 0; step < k; step += n) {
      Vector<T> x[n];
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t row = j + i;
        const Storage* source = from + row * row_stride + step;
        if (row >= rows || row < valid_begin || row >= valid_end)
          x[i] = Vector<T>{};
        else if (step + n <= k)
          x[i] = load_as(source, T{});
        else
          for (std::int64_t d = 0; d < n; ++d) x[i][d] = step + d < k ? to_float(source[d]) : T(0);
      }
      transpose<T>(x);
      for (std::int64_t d = 0; d < least(n, k - step); ++d) store(to + (step + d) * panel<T>, x[d]);
    }
  }
}

}  // namespace
}  // namespace effcore::attention::EFFCORE_ISA
