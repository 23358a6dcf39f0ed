// Products of few rows with many weights that lie row-major as a checkpoint has them, nothing packed but the few rows; and
// activations on their own.
//
// Bound: bytes of the weights. Each is loaded once from memory for all rows. Two engines:
//   Dots   c[m, n] = Σ rows[m, k] weights[n, k] in vectors along k, a tile of 4 x 4 (2 x 8, 1 x 16) running sums in registers
//   Tiles  bfloat16 on AMX: Cᵀ [weights, rows] = W [weights, k] rowsᵀ. The weights are the left operand, which tiles read
//          row-major from where they lie; only the rows are packed. 16 weights x 16 rows x 32 steps an instruction.
#include "../lowrank_kernels.h"
#include "../scratch.h"
#include "activation.h"
#include "engine_amx.h"

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

template <class Storage, class T>
struct Dots {
  static constexpr int sums = simd::vector_bytes == 64 ? 16 : 8;  // of 32 or 16 registers

  static std::int64_t operand_bytes(std::int64_t rows, std::int64_t k) {
    return rows * round_up(k, width<T>) * static_cast<std::int64_t>(sizeof(T));
  }
  static void prepare(void* operand, const void* rows_, std::int64_t stride, std::int64_t m, std::int64_t k) {
    const auto* rows = static_cast<const Storage*>(rows_);
    const std::int64_t padded = round_up(k, width<T>);
    for (std::int64_t i = 0; i < m; ++i) simd::load_row(static_cast<T*>(operand) + i * padded, rows + i * stride, k, padded);
  }

  // c[m][n] for `rows` rows and sums / rows weights, of which the ones from `valid` on repeat the last.
  template <int rows>
  static void tile(std::int64_t k, const T* a, std::int64_t a_row, const char* weights, std::int64_t stride, std::int64_t valid,
                   T* c) {
    constexpr int columns = sums / rows;
    Vector<T> sum[sums] = {};
    const Storage* w[columns];
    for (int n = 0; n < columns; ++n) w[n] = reinterpret_cast<const Storage*>(weights + least(n, valid - 1) * stride);
    const auto step = [&](std::int64_t i, const auto& weight) __attribute__((always_inline)) {
      Vector<T> x[rows];
#pragma GCC unroll 16
      for (int m = 0; m < rows; ++m) x[m] = simd::load(a + m * a_row + i);
#pragma GCC unroll 16
      for (int n = 0; n < columns; ++n) {
        const Vector<T> y = weight(n);
#pragma GCC unroll 16
        for (int m = 0; m < rows; ++m) sum[m * columns + n] += x[m] * y;
      }
    };
    std::int64_t i = 0;
    for (; i + width<T> <= k; i += width<T>)
      step(i, [&](int n) __attribute__((always_inline)) { return simd::load_as(w[n] + i, T{}); });
    if (i < k)
      step(i, [&](int n) __attribute__((always_inline)) {
        T rest[width<T>];
        simd::load_row(rest, w[n] + i, k - i, width<T>);
        return simd::load(static_cast<const T*>(rest));
      });
    T flat[sums];
#pragma GCC unroll 16
    for (int group = 0; group < sums; group += width<T>) simd::store(flat + group, simd::sum_across<T>(sum + group));
    for (int m = 0; m < rows; ++m) std::memcpy(c + m * block, flat + m * columns, columns * sizeof(T));
  }

  template <int rows>
  static void across(const Product& p, std::int64_t first, std::int64_t m, T* c) {
    constexpr int columns = sums / rows;
    const std::int64_t a_row = round_up(p.k, width<T>), n = least(block, p.columns - first);
    for (std::int64_t j = 0; j < n; j += columns)
      tile<rows>(p.k, static_cast<const T*>(p.operand) + m * a_row, a_row, p.weights + (first + j) * p.weight_stride,
                 p.weight_stride, n - j, c + m * block + j);
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
    simd::Amx::pack_transposed(static_cast<Storage*>(operand), k, 0, static_cast<const Storage*>(rows), stride, m, 0, m);
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
      const simd::Amx::Session session;
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

  static constexpr ProductKernels table = {block, 64, false, operand_bytes, prepare, multiply};
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

template <class Storage, class T>
constexpr ProductKernels dots = {block, 16, true, Dots<Storage, T>::operand_bytes, Dots<Storage, T>::prepare,
                                 Dots<Storage, T>::multiply};

}  // namespace

const ProductKernels& product_kernels(DType dtype) {
#if defined(__AMX_BF16__)
  if (dtype == DType::bfloat16) return Tiles::table;
#endif
  switch (dtype) {
    case DType::float64: return dots<double, double>;
    case DType::bfloat16: return dots<simd::bfloat16, float>;
    case DType::float16: return dots<simd::float16, float>;
    default: return dots<float, float>;
  }
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
