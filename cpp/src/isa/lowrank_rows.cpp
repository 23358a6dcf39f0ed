// Products of few rows with many weights that lie row-major as a checkpoint has them, nothing packed but the few rows; and
// activations on their own.
//
// Bound: bytes of the weights. Each is loaded once from memory for all rows. Two engines:
//   Dots   c[m, n] = Σ rows[m, k] weights[n, k] in vectors along k, 16 (8) running sums in registers for 4 weights of 4, 2 or 1
//          rows; Lanes says what a vector of weights is
//   Tiles  bfloat16 on AMX: Cᵀ [weights, rows] = W [weights, k] rowsᵀ. The weights are the left operand, which tiles read
//          row-major from where they lie; only the rows are packed. 16 weights x 16 rows x 32 steps an instruction.
#include "../lowrank_kernels.h"
#include "../scratch.h"
#include "activation.h"
#include "engine_pairs.h"

namespace effcore::lowrank::EFFCORE_ISA {
namespace {

using simd::least, simd::most, simd::round_up;

constexpr std::int64_t block = 32;  // weights of a task

// A block's sums c [rows][block] with bias, activation and rounding, to where they are wanted.
template <class Storage, class T>
void finish(const Product& p, std::int64_t first, T* c) {
  const std::int64_t n = least(block, p.columns - first);
  T bias[block] = {};
  if (p.bias != nullptr) simd::load_row(bias, static_cast<const Storage*>(p.bias) + first, n, block);
  for (std::int64_t m = 0; m < p.rows; ++m, c += block) {
    for (std::int64_t i = 0; i < block; i += width<T>) simd::store(c + i, simd::load(c + i) + simd::load(bias + i));
    if (p.sums != nullptr) simd::load_row(static_cast<T*>(p.sums) + m * p.sums_stride + first, c, n, n);
    if (p.before != nullptr) simd::store_row(static_cast<Storage*>(p.before) + m * p.before_stride + first, c, n, T{1});
    if (p.out == nullptr) continue;
    activate_row(c, n, p.activation);
    simd::store_row(static_cast<Storage*>(p.out) + m * p.out_stride + first, c, n, T{1});
  }
}

// A vector of numbers as the accumulators have them.
template <class StorageType, class Sum>
struct Lanes {
  using Storage = StorageType;
  using T = Sum;
  using Operand = T;
  using Weights = Vector<T>;
  static constexpr std::int64_t step = width<T>;
  static constexpr bool operand_from_sums = true;

  [[gnu::always_inline]] static Weights read(const Storage* from) { return simd::load_as(from, T{}); }
  static Weights read_rest(const Storage* from, std::int64_t n) {
    T rest[step];
    simd::load_row(rest, from, n, step);
    return simd::load(static_cast<const T*>(rest));
  }
  [[gnu::always_inline]] static Vector<T> add(Vector<T> sum, const Operand* row, Weights y) {
    return sum + simd::load(row) * y;
  }
};

#if defined(__AVX512BF16__)
// A vector of pairs, multiplied as they are: half the instructions, and the rows in half the bytes.
struct PairLanes {
  using Storage = simd::bfloat16;
  using T = float;
  using Operand = Storage;
  using Weights = __m512bh;
  static constexpr std::int64_t step = 2 * width<T>;
  static constexpr bool operand_from_sums = false;

  [[gnu::always_inline]] static Weights read(const Storage* from) {
    return reinterpret_cast<Weights>(_mm512_loadu_si512(from));
  }
  static Weights read_rest(const Storage* from, std::int64_t n) {
    return reinterpret_cast<Weights>(_mm512_maskz_loadu_epi16((1u << n) - 1, from));
  }
  [[gnu::always_inline]] static Vector<T> add(Vector<T> sum, const Operand* row, Weights y) {
    return reinterpret_cast<Vector<T> >(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), read(row), y));
  }
};
#endif

template <class L>
struct Dots {
  using Storage = typename L::Storage;
  using Operand = typename L::Operand;
  using T = typename L::T;
  static constexpr int sums = simd::vector_bytes == 64 ? 16 : 8;  // of 32 or 16 registers

  static std::int64_t operand_bytes(std::int64_t rows, std::int64_t k) {
    return rows * round_up(k, L::step) * static_cast<std::int64_t>(sizeof(Operand));
  }
  static void prepare(void* operand, const void* rows_, std::int64_t stride, std::int64_t m, std::int64_t k) {
    const auto* rows = static_cast<const Storage*>(rows_);
    const std::int64_t padded = round_up(k, L::step);
    for (std::int64_t i = 0; i < m; ++i)
      simd::load_row(static_cast<Operand*>(operand) + i * padded, rows + i * stride, k, padded);
  }

  // part[m][n] = a vector whose sum is c[m][n], for `rows` rows and a few weights, of which the ones from `valid` on repeat the
  // last. Few weights at a time are few streams of memory; what is left of the registers hides the latency of the sums.
  template <int rows>
  struct Tile {
    static constexpr int columns = sums / rows < 4 ? sums / rows : 4, ways = sums / rows / columns;

    static void multiply(std::int64_t k, const Operand* a, std::int64_t a_row, const char* weights, std::int64_t stride,
                         std::int64_t valid, Vector<T>* part) {
      Vector<T> sum[ways][rows * columns] = {};
      const Storage* w[columns];
      for (int n = 0; n < columns; ++n) w[n] = reinterpret_cast<const Storage*>(weights + least(n, valid - 1) * stride);
      const auto step = [&](int way, std::int64_t i, const auto& weight) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int n = 0; n < columns; ++n) {
          // The next weights at the same depth: the processor itself looks ahead along one row, and rows are short.
          __builtin_prefetch(reinterpret_cast<const char*>(w[n] + i) + columns * stride, 0, 2);
          const typename L::Weights y = weight(n);
#pragma GCC unroll 4
          for (int m = 0; m < rows; ++m) {
            Vector<T>& x = sum[way][m * columns + n];
            x = L::add(x, a + m * a_row + i, y);
          }
        }
      };
      std::int64_t i = 0;
      for (; i + ways * L::step <= k; i += ways * L::step)
#pragma GCC unroll 4
        for (int way = 0; way < ways; ++way) {
          const std::int64_t at = i + way * L::step;
          step(way, at, [&](int n) __attribute__((always_inline)) { return L::read(w[n] + at); });
        }
      for (; i + L::step <= k; i += L::step)
        step(0, i, [&](int n) __attribute__((always_inline)) { return L::read(w[n] + i); });
      if (i < k) step(0, i, [&](int n) __attribute__((always_inline)) { return L::read_rest(w[n] + i, k - i); });
#pragma GCC unroll 4
      for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < columns; ++n) {
          Vector<T> x = sum[0][m * columns + n];
#pragma GCC unroll 4
          for (int way = 1; way < ways; ++way) x += sum[way][m * columns + n];
          part[m * block + n] = x;
        }
    }
  };

  template <int rows>
  static void across(const Product& p, std::int64_t first, std::int64_t m, T* c) {
    constexpr int columns = Tile<rows>::columns;
    const std::int64_t a_row = round_up(p.k, L::step), n = least(block, p.columns - first);
    const Operand* a = static_cast<const Operand*>(p.operand) + m * a_row;
    Vector<T> part[rows * block];
    for (std::int64_t j = 0; j < n; j += columns)
      Tile<rows>::multiply(p.k, a, a_row, p.weights + (first + j) * p.weight_stride, p.weight_stride, n - j, part + j);
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < n; j += width<T>)
        simd::store(c + (m + i) * block + j, simd::sum_across<T>(part + i * block + j));
  }

  static void multiply(const Product& p, std::int64_t task) {
    const std::int64_t first = task * block;
    T* c = static_cast<T*>(scratch::get(scratch::Slot::local, p.rows * block * sizeof(T)));
    std::int64_t m = 0;
    for (; m + 4 <= p.rows; m += 4) across<4>(p, first, m, c);
    for (; m + 2 <= p.rows; m += 2) across<2>(p, first, m, c);
    if (m < p.rows) across<1>(p, first, m, c);
    finish<Storage, T>(p, first, c);
  }
};

#if defined(__AMX_BF16__)
struct Tiles {
  using Storage = simd::bfloat16;
  static constexpr std::int64_t tile = simd::tile, steps = simd::tile_steps;
  static_assert(block == 2 * tile);

  static std::int64_t operand_bytes(std::int64_t rows, std::int64_t k) { return round_up(rows, tile) * round_up(k, steps) * 2; }
  static void prepare(void* operand, const void* rows, std::int64_t stride, std::int64_t m, std::int64_t k) {
    simd::Pairs::pack_transposed(static_cast<Storage*>(operand), k, 0, static_cast<const Storage*>(rows), stride, m, 0, m);
  }

  // Cᵀ [block][columns of `wide` tiles] (+)= weights [block, k] rowsᵀ
  static void multiply_block(std::int64_t k, const Storage* weights, std::int64_t stride, const Storage* operand,
                             std::int64_t panel, std::int64_t wide, float* c, bool add) {
    for (std::int64_t j = 0; j < wide; j += 2)
      (j + 1 < wide ? simd::multiply_tiles<2, 2> : simd::multiply_tiles<2, 1>)(k, weights, stride, operand + j * panel, panel,
                                                                               c + j * tile, wide * tile, add);
  }

  static void multiply(const Product& p, std::int64_t task) {
    const std::int64_t first = task * block, n = least(block, p.columns - first);
    const std::int64_t wide = (p.rows + tile - 1) / tile, depth = round_up(p.k, steps), panel = depth * tile;
    // A block of fewer weights and the last steps of k go through a padded copy: a tile must not read what is not there.
    const std::int64_t whole = n == block ? p.k / steps * steps : 0, rest = depth - whole;
    char* const memory = static_cast<char*>(
        scratch::get(scratch::Slot::local, (2 * block * wide * tile) * sizeof(float) + block * rest * sizeof(Storage)));
    float* const transposed = reinterpret_cast<float*>(memory);
    float* const c = transposed + block * wide * tile;
    Storage* const copy = reinterpret_cast<Storage*>(c + block * wide * tile);
    const char* const weights = p.weights + first * p.weight_stride;
    const auto* const operand = static_cast<const Storage*>(p.operand);
    {
      const simd::Pairs::Session session;
      if (whole > 0)
        multiply_block(whole, reinterpret_cast<const Storage*>(weights), p.weight_stride / 2, operand, panel, wide, transposed,
                       false);
      if (rest > 0 || whole == 0) {
        for (std::int64_t i = 0; i < block; ++i)
          simd::load_row(copy + i * rest, reinterpret_cast<const Storage*>(weights + least(i, n - 1) * p.weight_stride) + whole,
                         i < n ? p.k - whole : 0, rest);
        multiply_block(rest, copy, rest, operand + whole * tile, panel, wide, transposed, whole > 0);
      }
    }
    for (std::int64_t j = 0; j < wide * tile; j += tile)
      for (std::int64_t i = 0; i < block; i += tile) {
        Vector<float> x[tile];
        for (std::int64_t r = 0; r < tile; ++r) x[r] = simd::load(transposed + (i + r) * wide * tile + j);
        simd::transpose<float>(x);
        for (std::int64_t r = 0; r < least(tile, p.rows - j); ++r) simd::store(c + (j + r) * block + i, x[r]);
      }
    finish<Storage, float>(p, first, c);
  }

  static constexpr ProductKernels table = {block, false, operand_bytes, prepare, multiply};
};
#endif

template <class Storage, class T>
struct Activations {
  static constexpr std::int64_t piece = 64;  // elements; whole vectors

  static void activate(void* out_, const void* in_, std::int64_t n, Activation activation) {
    auto* out = static_cast<Storage*>(out_);
    const auto* in = static_cast<const Storage*>(in_);
    for (std::int64_t i = 0; i < n; i += piece) {
      T x[piece];
      const std::int64_t some = least(piece, n - i);
      simd::load_row(x, in + i, some, piece);
      activate_row(x, some, activation);
      simd::store_row(out + i, static_cast<const T*>(x), some, T{1});
    }
  }

  static void backward(void* dz_, const void* dout_, const void* before_, std::int64_t n, Activation activation) {
    auto* dz = static_cast<Storage*>(dz_);
    const auto *dout = static_cast<const Storage*>(dout_), *before = static_cast<const Storage*>(before_);
    for (std::int64_t i = 0; i < n; i += piece) {
      T x[piece], g[piece];
      const std::int64_t some = least(piece, n - i);
      simd::load_row(x, before + i, some, piece);
      simd::load_row(g, dout + i, some, piece);
      dispatch(activation, [&](auto f) {
        for (std::int64_t j = 0; j < some; j += width<T>)
          simd::store(g + j, simd::load(g + j) * derivative<f(), T>(simd::load(x + j)));
      });
      simd::store_row(dz + i, static_cast<const T*>(g), some, T{1});
    }
  }

  static constexpr ActivationKernels table = {activate, backward};
};

template <class L>
constexpr ProductKernels dots = {block, L::operand_from_sums, Dots<L>::operand_bytes, Dots<L>::prepare, Dots<L>::multiply};

}  // namespace

const ProductKernels& product_kernels(DType dtype) {
#if defined(__AMX_BF16__)
  (void)dtype;  // asked for bfloat16 alone, as the next is
  return Tiles::table;
#elif defined(__AVX512BF16__)
  (void)dtype;
  return dots<PairLanes>;
#else
  switch (dtype) {
    case DType::float64: return dots<Lanes<double, double> >;
    case DType::bfloat16: return dots<Lanes<simd::bfloat16, float> >;
    case DType::float16: return dots<Lanes<simd::float16, float> >;
    default: return dots<Lanes<float, float> >;
  }
#endif
}

const ActivationKernels& activation_kernels(DType dtype) {
  switch (dtype) {
    case DType::float64: return Activations<double, double>::table;
    case DType::bfloat16: return Activations<simd::bfloat16, float>::table;
    case DType::float16: return Activations<simd::float16, float>::table;
    default: return Activations<float, float>::table;
  }
}

}  // namespace effcore::lowrank::EFFCORE_ISA
