// The engine of bfloat16 where the processor multiplies pairs of it: on AMX tiles (product_amx.h), or with AVX-512's dot
// products of pairs (product_dot.h). Both add in float32 and take numbers below the normal range for zero.
//
// Left operands are row-major; right operands are panels of 16 columns in which two consecutive steps stand side by side
// ("VNNI"), [columns / 16][steps / 2][16][2]: 32 steps of a panel are 1 KiB on end.
#pragma once
#if defined(__AVX512BF16__)
#include "engine.h"

namespace effcore::attention::EFFCORE_ISA {
namespace {
constexpr std::int64_t tile = 16, tile_steps = 32;
}
}  // namespace effcore::attention::EFFCORE_ISA

#if defined(__AMX_BF16__)
#include "product_amx.h"
#else
#include "product_dot.h"
#endif

namespace effcore::attention::EFFCORE_ISA {
namespace {

// Two rows of n numbers side by side, as 32-bit lanes.
[[gnu::always_inline]] inline __m512i interleave(const bfloat16* even, const bfloat16* odd, std::int64_t n) {
  const __mmask16 mask = static_cast<__mmask16>(n >= 16 ? 0xffff : (1 << n) - 1);
  const __m512i low = even == nullptr ? _mm512_setzero_si512() : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even));
  const __m512i high = odd == nullptr ? _mm512_setzero_si512() : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

struct Pairs {
  using Storage = bfloat16;
  using Accumulator = float;
  using Operand = bfloat16;
  using Tiles = PairTiles;
  using Session = PairSession;
  static constexpr std::int64_t panel = tile, steps = tile_steps;
  static constexpr std::int64_t row_block = 128, forward_keys = 512, backward_keys = 128;

  static void multiply(const Product<bfloat16, float>& p) { multiply_blocks<Tiles>(p); }

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
