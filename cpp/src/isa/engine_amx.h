// The engine of bfloat16 on AMX tiles: C [16, 16] float += A [16 rows, 32 steps] B [16 pairs of steps, 16 columns].
//
// Bound: a TDPBF16PS takes 16 cycles for 16 x 16 x 32 multiply-adds, 16 times the rate of AVX-512 in float32: what remains of
// attention is then the softmax. 2 x 2 tiles of C share two tiles of A and two of B, so that 4 tile loads (8 cycles each)
// hide behind 4 products. Left operands are row-major; right operands are panels of 16 columns in which two consecutive steps
// stand side by side ("VNNI"), [columns / 16][steps / 2][16][2]: each tile is 1 KiB on end.
#pragma once
#if defined(__AMX_BF16__)
#include "engine.h"

namespace effcore::attention::EFFCORE_ISA {
namespace {

constexpr std::int64_t tile = 16, tile_steps = 32;

// The intrinsics do not say that they touch memory: everything stored before must be there, and nothing may be read early.
[[gnu::always_inline]] inline void memory_fence() {
  __asm__ volatile("" ::: "memory");
}

template <int rows, int columns>
[[gnu::noinline]] void multiply_tiles(std::int64_t k, const bfloat16* a, std::int64_t a_row, const bfloat16* b,
                                      std::int64_t b_panel, float* c, std::int64_t c_row, bool add) {
  const std::int64_t a_bytes = a_row * 2, c_bytes = c_row * 4;
  float* lower = c + tile * c_row;
  memory_fence();
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (columns > 1) _tile_loadd(1, c + tile, c_bytes);
    if constexpr (rows > 1) _tile_loadd(2, lower, c_bytes);
    if constexpr (rows > 1 && columns > 1) _tile_loadd(3, lower + tile, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (std::int64_t step = 0; step < k; step += tile_steps, a += tile_steps, b += tile_steps * tile) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (columns > 1) {
      _tile_loadd(7, b + b_panel, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (rows > 1) {
      _tile_loadd(5, a + tile * a_row, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (columns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (columns > 1) _tile_stored(1, c + tile, c_bytes);
  if constexpr (rows > 1) _tile_stored(2, lower, c_bytes);
  if constexpr (rows > 1 && columns > 1) _tile_stored(3, lower + tile, c_bytes);
  memory_fence();
}

// Two rows of n numbers side by side, as 32-bit lanes.
[[gnu::always_inline]] inline __m512i interleave(const bfloat16* even, const bfloat16* odd, std::int64_t n) {
  const __mmask16 mask = static_cast<__mmask16>(n >= 16 ? 0xffff : (1 << n) - 1);
  const __m512i low = even == nullptr ? _mm512_setzero_si512() : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even));
  const __m512i high = odd == nullptr ? _mm512_setzero_si512() : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

struct Amx {
  using Storage = bfloat16;
  using Accumulator = float;
  using Operand = bfloat16;
  static constexpr std::int64_t panel = tile, steps = tile_steps;
  static constexpr std::int64_t row_block = 128, forward_keys = 512, backward_keys = 128;

  // The shapes of the tiles are a state of the thread; released, they cost no context switch.
  struct Session {
    Session() {
      struct alignas(64) {
        std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
        std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      __asm__ volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
  };

  // Blocks of C and rows of A are allocated to multiples of a tile; what a product computes there is never read.
  static void multiply(const Product<bfloat16, float>& p) {
    const auto block = [&](std::int64_t i, std::int64_t j) {
      const std::int64_t rows = least(2 * tile, p.m - i), last = i + rows - 1;
      const std::int64_t columns = least(2 * tile, (p.columns != nullptr ? p.columns[last] : p.n) - j);
      const std::int64_t begin = p.k_begin != nullptr ? p.k_begin[i] / steps * steps : 0;
      const std::int64_t end = p.k_end != nullptr ? least(p.k, p.k_end[last]) : p.k;
      if (columns <= 0 || (p.add && end <= begin)) return;
      const auto multiply = rows > tile ? (columns > tile ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                                        : (columns > tile ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
      multiply(end - begin, p.a + i * p.a_row + begin, p.a_row, p.b + j / panel * p.b_panel + begin * panel, p.b_panel,
               p.c + i * p.c_row + j, p.c_row, p.add);
    };
    for (std::int64_t j = 0; j < p.n; j += 2 * tile)
      for (std::int64_t i = 0; i < p.m; i += 2 * tile) block(i, j);
  }

  static void pack_rows(bfloat16* packed, std::int64_t depth, std::int64_t first, const bfloat16* from, std::int64_t row_stride,
                        std::int64_t rows, std::int64_t n, std::int64_t valid_begin, std::int64_t valid_end) {
    const auto row = [&](std::int64_t r) {
      return r < rows && r >= valid_begin && r < valid_end ? from + r * row_stride : nullptr;
    };
    for (std::int64_t r = 0; r < round_up(rows, steps); r += 2) {
      const bfloat16 *even = row(r), *odd = row(r + 1);
      for (std::int64_t j = 0; j < n; j += panel)
        _mm512_storeu_si512(packed + j * depth + (first + r) * panel,
                            interleave(even ? even + j : nullptr, odd ? odd + j : nullptr, n - j));
    }
  }

  // Pairs of steps lie side by side in a row already: a transpose of 32-bit lanes.
  static void pack_transposed(bfloat16* packed, std::int64_t n, std::int64_t first, const bfloat16* from,
                              std::int64_t row_stride, std::int64_t rows, std::int64_t valid_begin, std::int64_t valid_end) {
    const std::int64_t depth = round_up(n, steps);
    for (std::int64_t j = 0; j < rows; j += panel)
      for (std::int64_t d = 0; d < n; d += steps) {
        const __mmask32 mask = static_cast<__mmask32>(n - d >= steps ? 0xffffffffu : (1u << (n - d)) - 1);
        Vector<float> x[tile];
        for (std::int64_t i = 0; i < tile; ++i) {
          const std::int64_t row = j + i;
          const bool valid = row < rows && row >= valid_begin && row < valid_end;
          x[i] = valid ? reinterpret_cast<Vector<float>>(_mm512_maskz_loadu_epi16(mask, from + row * row_stride + d))
                       : Vector<float>{};
        }
        transpose<float>(x);
        bfloat16* to = packed + (first + j) * depth + d * panel;
        for (std::int64_t i = 0; i < tile; ++i) std::memcpy(to + i * 2 * panel, &x[i], sizeof x[i]);
      }
  }

  // The transpose in `space`, [columns][row_block]: rows are the steps of this product, so they are padded with zeros.
  static void set_transposed(Product<bfloat16, float>& p, const bfloat16* matrix, std::int64_t row_stride, std::int64_t rows,
                             std::int64_t columns, bfloat16* space) {
    for (std::int64_t j = 0; j < columns; j += tile)
      for (std::int64_t r = 0; r < rows; r += steps) {
        Vector<float> x[tile];
        for (std::int64_t i = 0; i < tile; ++i) {
          const std::int64_t row = r + 2 * i;
          x[i] =
              reinterpret_cast<Vector<float>>(interleave(row < rows ? matrix + row * row_stride + j : nullptr,
                                                         row + 1 < rows ? matrix + (row + 1) * row_stride + j : nullptr, tile));
        }
        transpose<float>(x);
        for (std::int64_t i = 0; i < tile; ++i) std::memcpy(space + (j + i) * row_block + r, &x[i], sizeof x[i]);
      }
    p.a = space;
    p.a_row = row_block;
    p.a_column = 1;
  }
  static constexpr std::int64_t transposed_elements = backward_keys * row_block;
};

}  // namespace
}  // namespace effcore::attention::EFFCORE_ISA
#endif
