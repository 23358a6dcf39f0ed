// result = alpha * X^T X + beta * previous, one block of the upper triangle at a time, and its mirror.
//
// Bound: FLOPs, half of those of a general product: 256 x 256 blocks on and above the diagonal, and in a block on the diagonal
// only the vectors that reach above it. X is packed once a segment as the right operand of product.h or of the pairs,
// and read from there for both sides: X^T of the SIMD engine is the packed panel itself, walked along its columns; pairs need
// their left operand row-major, a transpose of 32-bit lanes of the packed tiles.
#include "../kronecker_kernels.h"
#include "../scratch.h"
#include "engines.h"

namespace effcore::kronecker::EFFCORE_ISA {
namespace {

namespace simd = effcore::attention::EFFCORE_ISA;
using simd::least, simd::round_up, simd::width;

// The left operand of one engine: X^T, from the packed right operand.
template <class E>
struct Left {  // SIMD: element (i, step) of a panel is packed[step * panel + i]
  using Operand = typename E::Operand;
  static constexpr std::int64_t rows = E::panel;
  static constexpr bool by_vector = true;  // on the diagonal, vectors of columns below it are left out
  static std::int64_t elements(std::int64_t, std::int64_t) { return 0; }
  static void pack(Operand*, const Operand*, std::int64_t, std::int64_t, std::int64_t, std::int64_t) {}
  template <class Product>
  static void set(Product& p, const Operand*, const Operand* right, std::int64_t depth, std::int64_t row, std::int64_t step) {
    p.a = right + row / E::panel * E::panel * depth + step * E::panel + row % E::panel;
    p.a_row = 1;
    p.a_column = E::panel;
  }
};

#if defined(__AVX512BF16__)
template <>
struct Left<simd::Pairs> {
  using Operand = simd::bfloat16;
  static constexpr std::int64_t rows = round_up(2 * simd::tile, simd::Pairs::Tiles::rows);
  static constexpr bool by_vector = false;
  // Rows an odd number of cache lines apart: the sixteen rows of a tile fall into different sets.
  static std::int64_t stride(std::int64_t depth) { return round_up(depth, 64) + simd::tile_steps; }
  static std::int64_t elements(std::int64_t depth, std::int64_t dim) { return round_up(dim, gram_block) * stride(depth); }
  static void pack(Operand* left, const Operand* right, std::int64_t depth, std::int64_t dim, std::int64_t first,
                   std::int64_t steps) {
    for (std::int64_t j = 0; j < dim; j += simd::tile)
      for (std::int64_t s = first; s < first + steps; s += simd::tile_steps) {
        const Operand* from = right + j * depth + s * simd::tile;
        simd::Vector<float> x[simd::tile];
        for (std::int64_t i = 0; i < simd::tile; ++i) std::memcpy(&x[i], from + i * 2 * simd::tile, sizeof x[i]);
        simd::transpose<float>(x);
        for (std::int64_t i = 0; i < simd::tile; ++i) std::memcpy(left + (j + i) * stride(depth) + s, &x[i], sizeof x[i]);
      }
  }
  template <class Product>
  static void set(Product& p, const Operand* left, const Operand*, std::int64_t depth, std::int64_t row, std::int64_t step) {
    p.a = left + row * stride(depth) + step;
    p.a_row = stride(depth);
    p.a_column = 1;
  }
};
#endif

// Of a block's two operands, 256 KiB each in float32: 256 columns of 256 steps. Pairs take twice the steps in the same bytes.
template <class Operand>
constexpr std::int64_t k_block = 1024 / sizeof(Operand);

template <class E>
struct Gram {
  using Storage = typename E::Storage;
  using Operand = typename E::Operand;
  using T = typename E::Accumulator;

  // A row of 256 floats is 1 KiB: one vector more keeps a column's rows out of one cache set.
  static constexpr std::int64_t sums_row = gram_block + width<T>;

  static std::int64_t right_elements(std::int64_t tokens, std::int64_t dim) {
    return round_up(dim, gram_block) * simd::depth<E>(tokens);
  }
  static std::int64_t packed_bytes(std::int64_t tokens, std::int64_t dim) {
    const std::int64_t left = Left<E>::elements(simd::depth<E>(tokens), dim);
    return round_up((right_elements(tokens, dim) + left) * static_cast<std::int64_t>(sizeof(Operand)), 64);
  }

  static void pack(const GramJob& job, const Segment& s, std::int64_t first) {
    const std::int64_t tokens = s.end - s.begin, dim = job.x.size[1], depth = simd::depth<E>(tokens);
    const std::int64_t rows = least(gram_pack, tokens - first), stride = job.x.stride[0];
    auto* const right = reinterpret_cast<Operand*>(s.packed);
    const auto* from = static_cast<const Storage*>(job.x.data) + (s.begin + first) * stride;
    E::pack_rows(right, depth, first, from, stride, rows, dim, 0, rows);
    Left<E>::pack(right + right_elements(tokens, dim), right, depth, dim, first, simd::depth<E>(rows));
  }

  static void block(const GramJob& job, const Segment& s, std::int64_t row, std::int64_t column) {
    const std::int64_t tokens = s.end - s.begin, dim = job.x.size[1], depth = simd::depth<E>(tokens);
    const std::int64_t rows = least(gram_block, dim - row), columns = least(gram_block, dim - column);
    const auto* const right = reinterpret_cast<const Operand*>(s.packed);
    const auto* const left = right + right_elements(tokens, dim);
    auto* const sums = static_cast<T*>(scratch::get(scratch::Slot::local, gram_block * sums_row * sizeof(T)));
    {
      [[maybe_unused]] const typename E::Session session;
      // Steps outermost: a block's operands for `k_block` steps stay in the second-level cache beside its sums.
      for (std::int64_t step = 0; step == 0 || step < depth; step += k_block<Operand>) {
        const auto multiply = [&](std::int64_t r, std::int64_t m, std::int64_t c, std::int64_t n) {
          if (m <= 0 || n <= 0) return;
          simd::Product<Operand, T> p;
          p.m = m;
          p.n = n;
          p.k = least(k_block<Operand>, depth - step);
          Left<E>::set(p, left, right, depth, row + r, step);
          p.b = right + (column + c) / E::panel * E::panel * depth + step * E::panel + c % E::panel;
          p.b_panel = depth * E::panel;
          p.c = sums + r * sums_row + c;
          p.c_row = sums_row;
          p.add = step > 0;
          E::multiply(p);
        };
        for (std::int64_t r = 0; r < rows; r += Left<E>::rows) {
          const std::int64_t m = least(Left<E>::rows, rows - r);
          if (row != column) {
            multiply(r, m, 0, columns);
          } else if constexpr (Left<E>::by_vector) {
            for (std::int64_t i = 0; i < m; i += width<T>)
              multiply(r + i, least(width<T>, m - i), r + i, least(E::panel - i, columns - r - i));
            multiply(r, m, r + E::panel, columns - r - E::panel);
          } else {
            multiply(r, m, r / E::panel * E::panel, columns - r / E::panel * E::panel);
          }
        }
      }
    }
    write(job, s, sums, row, column, rows, columns);
  }

  // Scales the sums, then writes the block row by row and its mirror in columns of one vector: either way whole lines of the
  // result, each beside the last.
  static void write(const GramJob& job, const Segment& s, T* sums, std::int64_t row, std::int64_t column, std::int64_t rows,
                    std::int64_t columns) {
    const std::int64_t dim = job.x.size[1];
    const bool diagonal = row == column;
    T* const out = static_cast<T*>(job.result) + s.expert * dim * dim;
    if (job.alpha != 1 || s.previous != nullptr) {
      const T alpha = static_cast<T>(job.alpha), beta = static_cast<T>(s.beta);
      const T* const previous = s.previous != nullptr ? static_cast<const T*>(s.previous) + row * dim + column : nullptr;
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t c = diagonal ? r : 0; c < columns; ++c) {
          T& sum = sums[r * sums_row + c];
          sum = previous != nullptr ? sum * alpha + previous[r * dim + c] * beta : sum * alpha;
        }
    }
    if (diagonal) mirror<false>(sums, sums_row, sums, rows, columns, true);
    if (job.streams && s.previous == nullptr)
      write_to<true>(out, dim, sums, row, column, rows, columns);
    else
      write_to<false>(out, dim, sums, row, column, rows, columns);
  }

  template <bool streams>
  static void write_to(T* out, std::int64_t dim, const T* sums, std::int64_t row, std::int64_t column, std::int64_t rows,
                       std::int64_t columns) {
    constexpr std::int64_t w = width<T>;
    const std::int64_t whole = columns / w * w;
    for (std::int64_t r = 0; r < rows; ++r) {
      T* const to = out + (row + r) * dim + column;
      for (std::int64_t c = 0; c < whole; c += w) put<streams>(to + c, simd::load(sums + r * sums_row + c));
      for (std::int64_t c = whole; c < columns; ++c) to[c] = sums[r * sums_row + c];
    }
    if (row != column) mirror<streams>(out + column * dim + row, dim, sums, rows, columns, false);
    if constexpr (streams) simd::stream_fence();
  }

  // to[c, r] = sums[r, c]; of a block on the diagonal the part below it, where `to` may be the sums themselves.
  template <bool streams>
  static void mirror(T* to, std::int64_t to_row, const T* sums, std::int64_t rows, std::int64_t columns, bool diagonal) {
    constexpr std::int64_t w = width<T>;
    for (std::int64_t c = 0; c < columns; c += w)
      for (std::int64_t r = 0; r < (diagonal ? c + 1 : rows); r += w) {
        if (!(diagonal && r == c) && r + w <= rows && c + w <= columns) {
          simd::Vector<T> x[w];
          for (std::int64_t k = 0; k < w; ++k) x[k] = simd::load(sums + (r + k) * sums_row + c);
          simd::transpose<T>(x);
          for (std::int64_t k = 0; k < w; ++k) put<streams>(to + (c + k) * to_row + r, x[k]);
          continue;
        }
        for (std::int64_t k = c; k < least(c + w, columns); ++k)
          for (std::int64_t l = r; l < least(r + w, diagonal ? k : rows); ++l) to[k * to_row + l] = sums[l * sums_row + k];
      }
  }

  template <bool streams>
  [[gnu::always_inline]] static void put(T* to, simd::Vector<T> x) {
    if constexpr (streams)
      simd::stream(to, x);
    else
      simd::store(to, x);
  }

  static constexpr GramKernels kernels{packed_bytes, pack, block};
};

}  // namespace

const GramKernels& gram_kernels(DType dtype) {
  return simd::choose<Gram>(dtype);
}

}  // namespace effcore::kronecker::EFFCORE_ISA
