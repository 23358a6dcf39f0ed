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

template <class>
struct PairTable;
template <int... index>
struct PairTable<std::integer_sequence<int, index...> > {
  static constexpr decltype(&multiply_pairs<1, 1>) tiles[] = {
      multiply_pairs<index / pair_panels + 1, index % pair_panels + 1>...};
};

struct PairSession {};

// Rows of C are padded to whole vectors. What lies beyond an odd number of steps is zero in one operand and finite in the
// other, as for tiles.
struct PairTiles {
  static constexpr std::int64_t rows = pair_rows, columns = pair_panels * tile, panel = tile;
  static constexpr std::int64_t steps = 2, most_steps = 256;

  static void multiply(const Product<bfloat16, float>& p, std::int64_t rows, std::int64_t columns, std::int64_t k,
                       const bfloat16* a, const bfloat16* b, float* c, bool add) {
    using Table = PairTable<std::make_integer_sequence<int, pair_rows * pair_panels> >;
    Table::tiles[(rows - 1) * pair_panels + (columns - 1) / tile](k, a, p.a_row, b, p.b_panel, c, p.c_row, add);
  }
};

}  // namespace
}  // namespace effcore::attention::EFFCORE_ISA
