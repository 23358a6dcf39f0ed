// Products of pairs on AMX tiles, for engine_pairs.h: C [16, 16] float += A [16 rows, 32 steps] B [16 pairs of steps, 16
// columns].
//
// Bound: a TDPBF16PS takes 16 cycles for 16 x 16 x 32 multiply-adds, 16 times the rate of AVX-512 in float32: what remains of
// attention is then the softmax. 2 x 2 tiles of C share two tiles of A and two of B, so that 4 tile loads (8 cycles each)
// hide behind 4 products.
#pragma once
#include "product.h"

namespace effcore::attention::EFFCORE_ISA {
namespace {

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

// The shapes of the tiles are a state of the thread; released, they cost no context switch.
struct PairSession {
  PairSession() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~PairSession() { _tile_release(); }
  PairSession(const PairSession&) = delete;
};

// Blocks of C and rows of A are allocated to multiples of a tile; what a product computes there is never read.
struct PairTiles {
  static constexpr std::int64_t rows = 2 * tile, columns = 2 * tile, panel = tile;
  static constexpr std::int64_t steps = tile_steps, most_steps = std::int64_t{1} << 40;  // B streams from any cache

  static void multiply(const Product<bfloat16, float>& p, std::int64_t rows, std::int64_t columns, std::int64_t k,
                       const bfloat16* a, const bfloat16* b, float* c, bool add) {
    const auto multiply = rows > tile ? (columns > tile ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                                      : (columns > tile ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
    multiply(k, a, p.a_row, b, p.b_panel, c, p.c_row, add);
  }
};

}  // namespace
}  // namespace effcore::attention::EFFCORE_ISA
