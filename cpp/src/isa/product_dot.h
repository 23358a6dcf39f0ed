// Products of pairs by AVX-512's VDPBF16PS, for engine_pairs.h: 16 sums += 16 pairs of B with one pair of A, broadcast.
//
// Bound: FLOPs, twice those of AVX-512 in float32 an instruction. A register tile of 6 rows x 4 panels takes 4 loads of B and 6
// broadcasts of A beside 24 products for every two steps of k, as that of product.h does for each.
#pragma once
#include "product.h"

namespace effcore::attention::EFFCORE_ISA {
namespace {

constexpr int pair_rows = 6, pair_panels = 4;

template <int rows, int panels>
[[gnu::noinline]] void multiply_pairs(std::int64_t k, const bfloat16* a, std::int64_t a_row, const bfloat16* b,
                                      std::int64_t b_panel, float* c, std::int64_t c_row, bool add) {
  __m512 sum[rows][panels] = {};
  for (std::int64_t step = 0; step < k; step += 2, a += 2, b += 2 * tile) {
    __m512bh x[panels];
#pragma GCC unroll 8
    for (int v = 0; v < panels; ++v) x[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + v * b_panel));
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      std::int32_t pair;
      std::memcpy(&pair, a + r * a_row, sizeof pair);
      const __m512bh y = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 8
      for (int v = 0; v < panels; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], y, x[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r, c += c_row)
#pragma GCC unroll 8
    for (int v = 0; v < panels; ++v)
      _mm512_storeu_ps(c + v * tile, add ? _mm512_add_ps(_mm512_loadu_ps(c + v * tile), sum[r][v]) : sum[r][v]);
}

using MultiplyPairs = void (*)(std::int64_t, const bfloat16*, std::int64_t, const bfloat16*, std::int64_t, float*, std::int64_t,
                               bool);
template <class>
struct PairTiles;
template <int... index>
struct PairTiles<std::integer_sequence<int, index...> > {
  static constexpr MultiplyPairs table[] = {multiply_pairs<index / pair_panels + 1, index % pair_panels + 1>...};
};

struct PairProducts {
  static constexpr std::int64_t rows_at_once = pair_rows;  // of C

  struct Session {};

  // Rows of C are padded to whole vectors. What lies beyond an odd number of steps is zero in one operand and finite in the
  // other, as for tiles.
  static void multiply(const Product<bfloat16, float>& p) {
    constexpr auto& tiles = PairTiles<std::make_integer_sequence<int, pair_rows * pair_panels> >::table;
    // Steps of k whose panels of B, 4 of 8 KiB, stay in the first-level cache while all rows pass over them.
    constexpr std::int64_t product_pairs = 256;
    for (std::int64_t k0 = 0; k0 == 0 || k0 < p.k; k0 += product_pairs) {
      const std::int64_t k1 = least(k0 + product_pairs, p.k);
      const bool add = p.add || k0 > 0;
      for (std::int64_t j = 0; j < p.n; j += pair_panels * tile)
        for (std::int64_t i = 0; i < p.m; i += pair_rows) {
          const std::int64_t rows = least(pair_rows, p.m - i), last = i + rows - 1;
          const std::int64_t columns = least(pair_panels * tile, (p.columns != nullptr ? p.columns[last] : p.n) - j);
          const std::int64_t begin = p.k_begin != nullptr ? most(k0, p.k_begin[i] / 2 * 2) : k0;
          const std::int64_t end = p.k_end != nullptr ? least(k1, p.k_end[last]) : k1;
          if (columns <= 0 || (add && end <= begin)) continue;
          tiles[(rows - 1) * pair_panels + (columns - 1) / tile](end - begin, p.a + i * p.a_row + begin, p.a_row,
                                                                 p.b + j / tile * p.b_panel + begin * tile, p.b_panel,
                                                                 p.c + i * p.c_row + j, p.c_row, add);
        }
    }
  }
};

}  // namespace
}  // namespace effcore::attention::EFFCORE_ISA
